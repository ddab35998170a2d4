"""APC by a judge: is a statement relevant to a question, and what does a reply do to it? (reference/apc.md 3.1, 3.3)

The same two questions label what discriminators are trained on, where the paper asked GPT-4.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from persona.evaluation.judges.judging import Judge, Rubric, Unscored
from persona.evaluation.judges.parsing import parse_choice, parse_yes_no
from persona.metrics.apc import Probabilities, Question
from persona.metrics.nli import CONTRADICTION, ENTAILMENT, NEUTRAL
from persona.types import Verdict

_PROMPTS = Path(__file__).parent / "prompts"
ENTAILED, NEITHER, CONTRADICTED = NLI_LABELS = ("entailed", "neutral", "contradicted")
MEANING = {ENTAILED: ENTAILMENT, NEITHER: NEUTRAL, CONTRADICTED: CONTRADICTION}
# Judges of both spellings say the same; the published scorer knew one of them only (docs/errata.md).
_SPELLINGS = {"entailed": ENTAILED, "entails": ENTAILED, "entail": ENTAILED, "entailment": ENTAILED,
              "neutral": NEITHER, "contradicted": CONTRADICTED, "contradicts": CONTRADICTED,
              "contradict": CONTRADICTED, "contradiction": CONTRADICTED}  # fmt: skip


def _yes_or_no(reply: str) -> str:
    return "yes" if parse_yes_no(reply) else "no"


def _label(reply: str) -> str:
    return _SPELLINGS[parse_choice(reply, tuple(_SPELLINGS))]


RELEVANCE = Rubric.load(_PROMPTS / "apc_relevance.md", _yes_or_no, ("no", "yes"), max_new_tokens=16)
NLI = Rubric.load(_PROMPTS / "apc_nli.md", _label, NLI_LABELS, max_new_tokens=16)


class Judged(NamedTuple):
    """Of one reply: probabilities, 0 or 1, relevance [S], entailment and contradiction [1, S], or why there are none;
    and all verdicts, relevance of each statement first, then what the reply does to each."""

    found: Probabilities | Unscored
    verdicts: tuple[Verdict, ...]


async def judged(judge: Judge, question: Question, compat: str | None = None) -> list[Judged]:
    """What a judge says of each reply.

    The relevance of each statement is asked once for all replies. A reply with a verdict that cannot be read is
    unscored: left out of the sum, its statement would count as neither followed nor denied. `compat` "reference"
    scores as published: the reply "contradicted", which the question asks for, speaks for no class, as does one that
    cannot be read, so that what a character denies costs nothing.
    """
    common = [{"character": question.character, "statement": s, "query": question.query} for s in question.statements]
    relevant, answered = await asyncio.gather(
        asyncio.gather(*(judge.ask(RELEVANCE, **slots) for slots in common)),
        asyncio.gather(
            *(
                asyncio.gather(*(judge.ask(NLI, **slots, response=reply) for slots in common))
                for reply in question.replies
            )
        ),
    )
    return [Judged(_probabilities(relevant, own, compat), (*relevant, *own)) for own in answered]


def _probabilities(
    relevant: Sequence[Verdict], verdicts: Sequence[Verdict], compat: str | None
) -> Probabilities | Unscored:
    if compat == "reference":
        yes, no = (np.array([_says(verdict, word) for verdict in relevant]) for word in ("yes", "no"))
        entailed, denied = (np.array([_says(v, word) for v in verdicts]) for word in ("entailed", "contradict"))
        # Where the relevance speaks for no class, nothing is earned: neither by entailment nor by silence.
        return Probabilities((~no).astype(float), (entailed & yes)[None].astype(float), denied[None].astype(float))
    unread = [verdict for verdict in (*relevant, *verdicts) if verdict.value is None]
    if unread:
        count = len(relevant) + len(verdicts)
        reason = f"{len(unread)} of {count} verdicts could not be read: {unread[0].reason}"
        return Unscored(reason, unread[0].raw, failed=any(verdict.failed for verdict in unread))
    active = np.array([verdict.value == "yes" for verdict in relevant], dtype=float)
    entailed, denied = (np.array([[v.value == label for v in verdicts]], float) for label in (ENTAILED, CONTRADICTED))
    return Probabilities(active, entailed, denied)


def _says(verdict: Verdict, word: str) -> bool:
    """As published: the whole reply is this word, in any case."""
    return verdict.raw.strip().casefold() == word
