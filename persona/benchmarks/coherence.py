"""Coherence: of two replies, which is more the character's, and sensible? Against the stored replies of another stack.

Maiya et al. 2025, arXiv 2511.01689 (reference/open_character_training §3.9 d). The other stack has been through
`benchmark=character` before; its replies to the plain questions are read from that results folder.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.benchmarks.character import (
    DEFAULT,
    QuestionsConfig,
    anything,
    asked_in,
    characters,
    held_out,
    questions,
    sampling,
    something,
)
from persona.data.base import People
from persona.data.rows import first_few
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark, Unscored
from persona.evaluation.judges.judging import Rubric
from persona.evaluation.judges.pairs import PAIR_METRICS, compare
from persona.evaluation.judges.parsing import parse_choice
from persona.evaluation.results import Row, load_run
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Request, Sample, Score

ANSWERS = ("A", "B", "tie")


def _answer(reply: str) -> str:
    return parse_choice(reply, ANSWERS)


BETTER = Rubric.load(
    Path(__file__).parent / "prompts" / "coherence" / "better.md",
    _answer,
    ANSWERS,
    example="<answer>{answer}</answer>",
)


@dataclass
class CoherenceConfig(QuestionsConfig):
    """`against`: the results folder of another stack on benchmark=character, with the same questions and people."""

    name: str = "coherence"
    against: str | None = None


class Coherence(Benchmark):
    """A sample is one question to one character; judges see both replies in both orders. Intervals are over questions.

    A question that is asked twice is two samples, each with its own two replies, and one cluster.
    """

    name = "coherence"
    version = "1"
    primary = "win_rate"
    needs = ("judge",)
    prompts = (BETTER.prompt,)
    metrics = {
        "win_rate": Metric(description="share of pairs won; a tie, or a choice that changes with the order, is half"),
        "win_rate_decided": Metric(
            description="share of pairs won, of those decided alike in both orders (as published)"
        ),
        **PAIR_METRICS,
    }

    def __init__(self, config: CoherenceConfig, people: People) -> None:
        self.config = config
        self._asked = held_out(questions(config), people)
        self._samples = [
            asked_in(DEFAULT, "{question}", persona, id, question)
            for persona in characters(people, self.name)
            for id, question in self._asked.items()
        ]
        self._theirs = self._stored()

    def _stored(self) -> dict[str, Row]:
        """The other stack's row of each sample. Raises UserError where there is none."""
        if self.config.against is None:
            raise UserError(
                "benchmark.against has no value: it should be the results folder of the stack to compare with, "
                "outputs/<name>/evaluation/character/<stack>"
            )
        run = load_run(self.config.against)
        if run.summary.benchmark != "character":
            raise UserError(f"benchmark.against={run.folder} holds {run.summary.benchmark}, where character should be")
        rows = {row.id: row for row in run.rows if row.groups["variant"] == DEFAULT}
        asked = {id: row.messages[-1]["content"] for id, row in rows.items()}
        lacking = [s.id for s in self._samples if asked.get(s.id) != s.messages[-1].content]
        if lacking:
            raise UserError(
                f"benchmark.against={run.folder} has no reply to {len(lacking)} of {len(self._samples)} questions "
                f"({first_few(lacking)}): benchmark.path, limit, seed, language and data.path should be as there"
            )
        return rows

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        return self._asked[sample.metadata["question"]]

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        assert sample.persona is not None
        theirs = self._theirs[sample.id]
        if not theirs.raw and not theirs.verdicts:
            raise Unscored(f"the stack compared with has no reply: {theirs.reason}")
        draw = sampling(self.config, sample.id)
        reply = await roles.model.respond(Request(sample.messages, sample.persona, draw))
        pair = await compare(
            roles, BETTER, reply.text, theirs.raw,
            character="\n".join(sample.persona.statements), question=sample.messages[-1].content,
        )  # fmt: skip
        if pair.value is None:
            return Score(reason=pair.reason, raw=reply.text, verdicts=pair.verdicts)
        values = {"win_rate": pair.value, **pair.values}
        if pair.consistent == 1 and pair.value != 0.5:
            values["win_rate_decided"] = pair.value
        return Score(values, raw=reply.text, verdicts=pair.verdicts)

    def constant(self, sample: Sample) -> str:
        return anything(self.config.language)

    def chance(self, sample: Sample, rng: random.Random) -> str:
        return something(self.config.language, list(self._asked.values()), rng)


def build(config: CoherenceConfig, people: People) -> Coherence:
    """Raises UserError for people without statements, bad questions, and results without replies to them."""
    return Coherence(config, people)
