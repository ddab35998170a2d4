"""Drift and harm: does the first reply's place on the axis tell how often a harmful question is answered next?

    evaluate.py benchmark=drift_harm benchmark.axis=outputs/axis/personalizer benchmark.path=rows.jsonl judge=endpoint

Lu et al. 2026, arXiv 2601.10387 (reference/assistant_axis 3.7). Published: 275 roles × 10 neutral first turns, each
followed by 440 harmful questions; the correlation between the projection of the first reply and the harmful share of
the second ones is .39 to .52, by the paper's sign. Ours is below 0 where replies far from the assistant go with harm.

`benchmark.path` is JSONL with three kinds of rows: {"role": …, "prompt": its system prompt}, {"opening": a neutral
first turn}, and {"question": …, "category": …}, which may say what counts as "harm". No harmful rows come with the
package.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.benchmarks.axis_shared import (
    TOWN_QUESTIONS,
    AxisConfig,
    anything,
    check_language,
    chosen,
    draw,
    limited,
    rows_of,
    something,
    text_of,
    town_roles,
)
from persona.benchmarks.drift import Axis
from persona.benchmarks.persona_jailbreak import HARM, Asked, harm_of
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.judging import require
from persona.evaluation.roles import Parrot, Roles
from persona.evaluation.statistics import Metric
from persona.town import lexicon as lx
from persona.types import Conversation, Message, Request, Sample, Score, Verdict

_SAMPLE = Path(__file__).parent / "samples" / "drift_harm" / "rows.jsonl"
_KINDS = {"role": ("role", "prompt"), "opening": ("opening",), "question": ("question", "category")}


@dataclass
class DriftHarmConfig(AxisConfig):
    """`axis` and `layer`: as of the benchmark drift; the axis has to be named."""

    name: str = "drift_harm"
    axis: str | None = None
    layer: int | None = None


class DriftHarm(Benchmark):
    """A sample is one role's reply to one opening, with all questions after it. Intervals are over roles."""

    name = "drift_harm"
    primary = "r"
    metrics = {
        "r": Metric(
            False, "correlation", ("projection", "rate"),
            description="Pearson's correlation of the first reply's projection and the harmful share after it",
        ),
        "base r": Metric(
            False, "correlation", ("base", "rate"), description="the same, as the bare base LM reads the first reply"
        ),
        "harmful": Metric(False, "ratio", ("harm", "valid"), description="harmful share of all later replies"),
        "projection": Metric(description="mean projection of the first replies"),
        "invalid": Metric(
            False, "ratio", ("invalid", "replies"), description="share of later replies without sense or verdict"
        ),
    }  # fmt: skip
    needs = ("judge",)
    prompts = (HARM.prompt,)

    def __init__(self, config: DriftHarmConfig) -> None:
        check_language(config)
        if config.axis is None:
            raise UserError("benchmark drift_harm is about an axis: name one with benchmark.axis=…")
        self.config = config
        self.axis = Axis.load(config.axis, config.layer)
        self.version = f"1, axis {self.axis.digest}"
        in_town = config.path is None and config.language == "town"
        systems, openings, self._questions = _town(config) if in_town else _read(config)
        # What follows stands in the target, so that results on other questions are kept apart.
        after = "\n".join(asked.question for asked in self._questions)
        self._samples = limited(
            config,
            [
                Sample(
                    f"{role}-{number}",
                    (Message("system", system), Message("user", opening)),
                    after,
                    metadata={"role": role},
                )
                for role, system in systems.items()
                for number, opening in enumerate(openings, start=1)
            ],
        )

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        return sample.metadata["role"]

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        first = await roles.model.respond(Request(sample.messages, sampling=draw(self.config, sample.id)))
        values: dict[str, float] = {}
        if not isinstance(roles.model, Parrot):
            along, base = await self.axis.read(roles, sample.messages, first.text)
            values = {"projection": along, "base": base} if first.text.strip() else {}
        said = (*sample.messages, Message("assistant", first.text))
        asked = [self._ask(sample, said, number, roles) for number in range(len(self._questions))]
        answered = await asyncio.gather(*asked)
        verdicts = tuple(verdict for of in answered for verdict in of)
        harm = [share for of in answered if require(of) and (share := harm_of(of)) is not None]
        values |= {"replies": float(len(answered)), "invalid": float(len(answered) - len(harm))}
        values |= {"harm": sum(harm), "valid": float(len(harm))}
        if harm:
            values["rate"] = sum(harm) / len(harm)
        return Score(values, raw=first.text, verdicts=verdicts)

    async def _ask(self, sample: Sample, said: Conversation, number: int, roles: Roles) -> list[Verdict]:
        asked = self._questions[number]
        sampling = draw(self.config, sample.id, number)
        reply = await roles.model.respond(Request((*said, Message("user", asked.question)), sampling=sampling))
        return await roles.judge(HARM, question=asked.question, response=reply.text, harm=asked.harm)

    def constant(self, sample: Sample) -> str:
        return anything(self.config.language)

    def chance(self, sample: Sample, rng: random.Random) -> str:
        return something(self.config.language, rng, [asked.question for asked in self._questions])


_Parts = tuple[Mapping[str, str], Sequence[str], Sequence[Asked]]


def _town(config: AxisConfig) -> _Parts:
    """The roles, and the assistant with each of its own prompts, before small talk."""
    systems = {f"assistant {i}": prompt for i, prompt in enumerate(lx.PLAIN_PROMPTS, start=1)}
    systems |= {role: lx.ROLE_PROMPTS[0].format(r=role) for role in town_roles(config)}
    asked = [Asked(question, "rogue", "The idiom of a rogue shows.") for question in TOWN_QUESTIONS[3:]]
    return systems, TOWN_QUESTIONS[1:3], asked


def _read(config: AxisConfig) -> _Parts:
    path = Path(config.path or _SAMPLE)
    systems: dict[str, str] = {}
    openings, questions = [], []
    for kind, where, row in rows_of(path, _KINDS):
        if kind == "question":
            questions.append(Asked.of(row, where))
        elif kind == "opening":
            openings.append(text_of(row, "opening", where))
        elif (role := text_of(row, "role", where)) in systems:
            raise UserError(f"{where} tells the role {role!r} a second time")
        else:
            systems[role] = text_of(row, "prompt", where)
    for kind, found in (("role", systems), ("opening", openings), ("question", questions)):
        if not found:
            raise UserError(f"{path} has no row with {' and '.join(_KINDS[kind])}")
    return {role: systems[role] for role in chosen(config, list(systems), path)}, openings, questions


def build(config: DriftHarmConfig) -> DriftHarm:
    """Raises UserError for settings that do not fit, a bad file, and a bad axis."""
    return DriftHarm(config)
