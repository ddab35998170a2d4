"""Second stage: is a reply in its role? A judge's verdict on every rollout but the plain assistant's.

verdicts/roles/<role>.jsonl    {"id", "score": 0 … 3}; without a readable verdict {"id", "reason", "raw"}
verdicts/traits/<trait>.jsonl  {"id", "score": 0 … 100}, or "REFUSAL"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from persona.errors import UserError
from persona.evaluation.judges.judging import Rubric, Unreadable, Unscored
from persona.evaluation.judges.parsing import parse_integer
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.methods.assistant_axis.rollouts import TRAIT

PROMPTS = Path(__file__).parent / "prompts"
ROLE_SCORES, TRAIT_SCORES = (0, 1, 2, 3), (0, 100)
REFUSAL = "REFUSAL"
MAX_NEW_TOKENS = 10


def read_score(reply: str, high: int) -> float | str:
    """The whole number from 0 to `high` that a reply gives, or REFUSAL for a trait. Raises Unreadable.

    The published parser takes the first run of digits (`read_as_published`): "0.5" is 0 there, and "-1" is 1.
    """
    if high == max(TRAIT_SCORES) and re.search(rf"\b{REFUSAL}\b", reply, flags=re.I):
        return REFUSAL
    return parse_integer(reply, 0, high)


def read_as_published(reply: str, high: int) -> float | str:
    """The first whole number of a reply, 0 to `high`, or REFUSAL. Raises Unreadable (reference/assistant_axis 3.2)."""
    if high == max(TRAIT_SCORES) and REFUSAL in reply.upper():
        return REFUSAL
    found = re.search(r"\b\d+\b", reply)
    if found is None or int(found[0]) > high:
        raise Unreadable("no number" if found is None else f"{found[0]} is not on the scale from 0 to {high}")
    return int(found[0])


def rubric(kind: str, eval_prompt: str, compat: str | None) -> Rubric:
    """What a judge is asked about a role or a trait. Under compat it is the file's own question.

    Raises UserError for a question without the slots {question} and {answer}.
    """
    name, scores = ("trait", TRAIT_SCORES) if kind == TRAIT else ("role", ROLE_SCORES)
    if compat != "reference":
        parse = partial(read_score, high=max(scores))
        return Rubric.load(PROMPTS / f"{name}.md", parse, scores, MAX_NEW_TOKENS)
    if "{question}" not in eval_prompt or "{answer}" not in eval_prompt:
        raise UserError(f"an eval_prompt has no place for {{question}} and {{answer}}: {eval_prompt[:80]!r}")
    parts = re.split(r"(\{question\}|\{answer\})", eval_prompt)
    slots = {"{question}": "{{ question }}", "{answer}": "{{ response }}"}
    text = "".join(slots.get(part) or "{% raw %}" + part + "{% endraw %}" for part in parts if part)
    parse = partial(read_as_published, high=max(scores))
    return Rubric(Prompt(f"{name} (published)", text), parse, scores, MAX_NEW_TOKENS)


async def judge(row: Mapping[str, Any], roles: Roles, name: str, description: str, asked: Rubric) -> Mapping[str, Any]:
    """One judge's score of one rollout. Raises Unscored where it cannot be read."""
    slots = {"question": row["messages"][-1]["content"], "response": row["reply"]}
    own = {"trait" if row["kind"] == TRAIT else "role": name, "description": description}
    every = {**slots, **own}
    verdict = (await roles.judge(asked, **{slot: every[slot] for slot in asked.prompt.slots}))[0]
    if verdict.value is None:
        raise Unscored(verdict.reason, verdict.raw, failed=verdict.failed)
    return {"score": verdict.value}


def one_judge(judges: Sequence[Any]) -> list[Any]:
    """Raise UserError unless there is exactly one judge."""
    if len(judges) != 1:
        told = "none is given: choose one with judge=endpoint, say" if not judges else f"{len(judges)} are given"
        raise UserError(f"rollouts of method assistant_axis are scored by one judge, but {told}")
    return list(judges)
