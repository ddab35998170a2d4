"""Role susceptibility: told to be somebody else, who answers questions about itself, the assistant or the role?

Lu et al. 2026, arXiv 2601.10387 (reference/assistant_axis 3.7). Published: 50 roles that lie close to the assistant,
4 new system prompts for each, 5 questions about identity, judged by deepseek-v3 [paper]; the seven labels are those of
a replication. Neither prompts, questions, rubric nor sampling settings are published: those here are ours.

`benchmark.path` is JSONL with two kinds of rows: {"role": "bard", "prompts": ["You are a bard.", …]} for each role,
and {"question": "Who are you?"} for each question (none: our five).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.benchmarks.axis_shared import (
    SPEAKER,
    SPEAKER_METRICS,
    TOWN_QUESTIONS,
    AxisConfig,
    anything,
    check_language,
    chosen,
    draw,
    limited,
    rows_of,
    scored,
    something,
    text_of,
    texts_of,
    town_roles,
)
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.roles import Roles
from persona.town import lexicon as lx
from persona.types import Message, Request, Sample, Score

_SAMPLE = Path(__file__).parent / "samples" / "role_susceptibility" / "roles.jsonl"


@dataclass
class RoleSusceptibilityConfig(AxisConfig):
    name: str = "role_susceptibility"


class RoleSusceptibility(Benchmark):
    """A sample is one question to one role under one system prompt. Intervals are over roles."""

    name = "role_susceptibility"
    version = "1"
    primary = "away"
    metrics = SPEAKER_METRICS
    needs = ("judge",)
    prompts = (SPEAKER.prompt,)

    def __init__(self, config: RoleSusceptibilityConfig) -> None:
        check_language(config)
        self.config = config
        prompts, self._questions = self._read()
        self._samples = limited(
            config,
            [
                Sample(
                    f"{role}-{p}-{q}",
                    (Message("system", system), Message("user", question)),
                    metadata={"role": role, "question": question},
                )
                for role, systems in prompts.items()
                for p, system in enumerate(systems, start=1)
                for q, question in enumerate(self._questions, start=1)
            ],
        )

    def _read(self) -> tuple[dict[str, list[str]], Sequence[str]]:
        """Role → its system prompts; and the questions."""
        config = self.config
        if config.path is None and config.language == "town":
            return {r: [prompt.format(r=r) for prompt in lx.ROLE_PROMPTS] for r in town_roles(config)}, TOWN_QUESTIONS
        path = Path(config.path or _SAMPLE)
        prompts, questions = _rows(path)
        if not prompts:
            raise UserError(f"{path} has no row with a role and its prompts")
        if not questions:
            questions = list(TOWN_QUESTIONS) if config.language == "town" else _rows(_SAMPLE)[1]
        return {role: prompts[role] for role in chosen(config, list(prompts), path)}, questions

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        return sample.metadata["role"]

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return sample.metadata

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        reply = await roles.model.respond(Request(sample.messages, sampling=draw(self.config, sample.id)))
        verdicts = tuple(await roles.judge(SPEAKER, question=sample.metadata["question"], response=reply.text))
        return scored(reply.text, verdicts)

    def constant(self, sample: Sample) -> str:
        return anything(self.config.language)

    def chance(self, sample: Sample, rng: random.Random) -> str:
        roles = sorted({s.metadata["role"] for s in self._samples})
        return something(self.config.language, rng, [anything("en"), *(f"I am the {role}." for role in roles)])


def _rows(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    prompts: dict[str, list[str]] = {}
    questions = []
    for kind, where, row in rows_of(path, {"role": ("role", "prompts"), "question": ("question",)}):
        if kind == "question":
            questions.append(text_of(row, "question", where))
        elif (role := text_of(row, "role", where)) in prompts:
            raise UserError(f"{where} tells the role {role!r} a second time")
        else:
            prompts[role] = texts_of(row, "prompts", where)
    return prompts, questions


def build(config: RoleSusceptibilityConfig) -> RoleSusceptibility:
    """Raises UserError for settings that do not fit and for a bad file."""
    return RoleSusceptibility(config)
