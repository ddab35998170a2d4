"""Judges: a rubric and what it is about in, a verdict out, with the raw reply wherever it cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from persona.errors import UserError
from persona.evaluation.parsing import Unreadable as Unreadable
from persona.evaluation.prompts import Prompt
from persona.types import Request, Sampling, Verdict

if TYPE_CHECKING:
    from persona.evaluation.roles import Speaker


@dataclass(frozen=True)
class Rubric:
    """A prompt file and how the reply to it is read. `parse` returns the value or raises Unreadable.

    `answers` are all values that `parse` can return, or the two ends of a scale of numbers.
    """

    prompt: Prompt
    parse: Callable[[str], float | str]
    answers: tuple[float | str, ...]
    max_new_tokens: int = 512

    @staticmethod
    def load(
        path: Path | str,
        parse: Callable[[str], float | str],
        answers: Sequence[float | str],
        max_new_tokens: int = 512,
    ) -> Rubric:
        """Raises UserError for a file that is missing, empty or no template."""
        return Rubric(Prompt.load(path), parse, tuple(answers), max_new_tokens)

    @property
    def name(self) -> str:
        return self.prompt.name

    def verdict(self, judge: str, reply: str) -> Verdict:
        """The reply read."""
        try:
            value, reason = self.parse(reply), ""
        except Unreadable as error:
            value, reason = None, str(error)
        return Verdict(judge, self.name, self.prompt.hash, value, reason, reply)


class Judge(Protocol):
    """`name` is its identity in every row: the model and how it is asked."""

    name: str

    async def ask(self, rubric: Rubric, **slots: object) -> Verdict: ...


class ModelJudge:
    """A language model as the judge, greedy unless `temperature` is set."""

    def __init__(self, speaker: Speaker, temperature: float = 0.0) -> None:
        self.speaker, self.temperature = speaker, temperature
        self.name = speaker.name

    async def ask(self, rubric: Rubric, **slots: object) -> Verdict:
        sampling = Sampling(rubric.max_new_tokens, temperature=self.temperature)
        reply = await self.speaker.respond(Request(rubric.prompt.messages(**slots), sampling=sampling))
        return rubric.verdict(self.name, reply.text)


class ScriptedJudge:
    """A judge that is a function of the rubric and what it is about: for tests, for rules, for random verdicts."""

    def __init__(self, name: str, reply: Callable[[Rubric, Mapping[str, object]], str]) -> None:
        self.name, self.reply = name, reply

    async def ask(self, rubric: Rubric, **slots: object) -> Verdict:
        rubric.prompt.messages(**slots)  # the slots have to fit, as for any judge
        return rubric.verdict(self.name, self.reply(rubric, slots))


def require(verdicts: Sequence[Verdict]) -> list[float | str]:
    """The values of readable verdicts. Raises UserError when there are no verdicts at all (no judge)."""
    if not verdicts:
        raise UserError("there is no judge: choose one with judge=endpoint, say")
    return [verdict.value for verdict in verdicts if verdict.value is not None]
