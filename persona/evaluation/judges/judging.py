"""Judges: a rubric and what it is about in, a verdict out, with the raw reply wherever it cannot be read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from persona.errors import UserError
from persona.evaluation.judges.parsing import Unreadable as Unreadable
from persona.evaluation.prompts import Prompt
from persona.types import Request, Sampling, Verdict

if TYPE_CHECKING:
    from persona.evaluation.roles import Speaker


class Unscored(Exception):
    """Raised inside an episode whose outcome cannot be read: counted as unscored with this reason, never as zero.

    `failed`: a call to an endpoint got no reply. It may get one another time, so the next start asks again.
    """

    def __init__(self, reason: str, raw: str = "", *, failed: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.raw, self.failed = reason, raw, failed


@dataclass(frozen=True)
class Rubric:
    """A prompt file and how the reply to it is read. `parse` returns the value or raises Unreadable, and nothing else.

    `answers` are all values that `parse` can return, or the two ends of a scale of numbers. `example` writes a reply
    that gives an answer, as text with the place {answer} or a function of the answer; `parse` has to read it back.
    """

    prompt: Prompt
    parse: Callable[[str], float | str]
    answers: tuple[float | str, ...]
    max_new_tokens: int = 512
    example: str | Callable[[float | str], str] = "{answer}"

    @staticmethod
    def load(
        path: Path | str,
        parse: Callable[[str], float | str],
        answers: Sequence[float | str],
        max_new_tokens: int = 512,
        example: str | Callable[[float | str], str] = "{answer}",
    ) -> Rubric:
        """Raises UserError for a file that is missing, empty or no template."""
        return Rubric(Prompt.load(path), parse, tuple(answers), max_new_tokens, example)

    @property
    def name(self) -> str:
        return self.prompt.name

    def reply(self, answer: float | str) -> str:
        """A reply that gives `answer`."""
        if callable(self.example):
            return self.example(answer)
        return self.example.replace("{answer}", f"{answer:g}" if isinstance(answer, float) else str(answer))

    def verdict(self, judge: str, reply: str) -> Verdict:
        """The reply read."""
        value: float | str | None
        try:
            value, reason = self.parse(reply), ""
        except Unreadable as error:
            value, reason = None, str(error)
        if isinstance(value, float) and not math.isfinite(value):
            value, reason = None, f"{value} is no verdict"
        return Verdict(judge, self.name, self.prompt.hash, value, reason, reply)

    def no_verdict(self, judge: str, reason: str, raw: str = "", *, failed: bool = False) -> Verdict:
        """What a judge gives that has nothing to say (`failed`: as it could not be asked, see `Unscored`)."""
        return Verdict(judge, self.name, self.prompt.hash, None, reason, raw, failed)


class Judge(Protocol):
    """`name` is its identity in every row: the model and how it is asked.

    `ask` raises UserError where the run has to end; a question that it fails on is a verdict without a value, so that
    what other judges said on it is kept.
    """

    name: str

    async def ask(self, rubric: Rubric, /, **slots: object) -> Verdict: ...


class ModelJudge:
    """A language model as the judge, greedy unless `temperature` is set."""

    def __init__(self, speaker: Speaker, temperature: float = 0.0) -> None:
        self.speaker, self.temperature = speaker, temperature
        self.name = f"{speaker.name}, temperature {temperature:g}" if temperature else speaker.name

    async def ask(self, rubric: Rubric, /, **slots: object) -> Verdict:
        """Its verdict; one without a value when the speaker raises Unscored (an endpoint that gave no reply)."""
        sampling = Sampling(rubric.max_new_tokens, temperature=self.temperature)
        try:
            reply = await self.speaker.respond(Request(rubric.prompt.messages(**slots), sampling=sampling))
        except Unscored as error:
            return rubric.no_verdict(self.name, error.reason, error.raw, failed=error.failed)
        verdict = rubric.verdict(self.name, reply.text)
        if verdict.value is None and reply.finish_reason == "length":
            cut = f"cut off after {rubric.max_new_tokens} tokens: {verdict.reason}"
            return rubric.no_verdict(self.name, cut, reply.text)
        return verdict


class ScriptedJudge:
    """A judge that is a function of the rubric and what it is about: for tests, for rules, for random verdicts."""

    def __init__(self, name: str, reply: Callable[[Rubric, Mapping[str, object]], str]) -> None:
        self.name, self.reply = name, reply

    async def ask(self, rubric: Rubric, /, **slots: object) -> Verdict:
        rubric.prompt.messages(**slots)  # the slots have to fit, as for any judge
        return rubric.verdict(self.name, self.reply(rubric, slots))


def random_judge(seed: int) -> ScriptedJudge:
    """Valid verdicts without any judgement, drawn evenly by seed, rubric file and question: what chance earns.

    Of a scale given by its two ends, whole numbers are drawn; of one at most 1 long with a fraction at an end
    (answers (0.0, 1.0)), tenths of it.
    """

    def reply(rubric: Rubric, slots: Mapping[str, object]) -> str:
        question = json.dumps(slots, sort_keys=True, ensure_ascii=False, default=repr)
        rng = random.Random(f"{seed}-{rubric.prompt.hash}-{question}")
        return rubric.reply(rng.choice(_steps(rubric.answers)))

    return ScriptedJudge(f"random, seed {seed}", reply)


def _steps(answers: Sequence[float | str]) -> Sequence[float | str]:
    if len(answers) != 2 or any(isinstance(answer, str | bool) for answer in answers):
        return answers
    low, high = (float(answer) for answer in answers)
    if high - low <= 1 and any(isinstance(answer, float) for answer in answers):
        return [round(low + (high - low) * tenth / 10, 10) for tenth in range(11)]
    return list(range(math.ceil(low), math.floor(high) + 1))


def require(verdicts: Sequence[Verdict]) -> list[float | str]:
    """The values of readable verdicts. Raises UserError when there are no verdicts at all (no judge)."""
    if not verdicts:
        raise UserError("there is no judge: choose one with judge=endpoint, say")
    return [verdict.value for verdict in verdicts if verdict.value is not None]
