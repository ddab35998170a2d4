"""First stage: from a few questions for each trait to many prompts (notes 3.2; the paper's section on distillation).

The teacher is shown a trait with its questions and asked for more user messages that would bring it out. A message is
taken when it is a whole sentence and not too much like one that is already there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.data.constitution import Trait
from persona.data.rows import field, read_jsonl
from persona.errors import UserError
from persona.evaluation.roles import Roles
from persona.methods.character.prompts import SHIPPED, PromptSet, read_lines
from persona.methods.character.sampling import SamplingConfig
from persona.types import Request

_NUMBERED = re.compile(r"^[ \t]*\d+[.)][ \t]+(\S.*?)[ \t]*$", flags=re.MULTILINE)
_AT_ONCE = 50  # messages asked for in one go, as published


@dataclass
class ExpandConfig:
    """`per_trait`: prompts wanted for each trait; the constitution's are all taken and count. `tries`: how often
    the teacher is asked for one trait before it stays short. `overlap`: share of a message's words above which it
    counts as known."""

    per_trait: int = 50
    tries: int = 20
    overlap: float = 0.5
    max_new_tokens: int = 2048


def numbered(text: str) -> list[str]:
    """The messages of a numbered list ("1. …" or "1) …", one a line); other lines are passed over."""
    return _NUMBERED.findall(text)


def too_similar(new: str, old: str, overlap: float = 0.5) -> bool:
    """Whether more than `overlap` of `new`'s words (split at white space) occur in `old`, or both are the same.

    Not symmetric, as published: a short message inside a long one is known, the long one is new.
    """
    words = new.split()
    known = set(old.split())
    return new == old or sum(word in known for word in words) > overlap * len(words)


def refusal(new: str, old: Iterable[str], overlap: float = 0.5) -> str:
    """Why a message is not taken; "" where it is."""
    if not new.endswith(("?", ".")):
        return "does not end in ? or ."
    if not new[:1].isalpha():
        return "does not begin with a letter"
    if any(too_similar(new, known, overlap) for known in old):
        return "too similar to one that is there"
    return ""


async def expand(
    trait: Trait, roles: Roles, prompts: PromptSet, config: ExpandConfig, sampling: SamplingConfig, seed: int
) -> dict[str, Any]:
    """Ask the model until there are `per_trait` prompts for the trait, at most `tries` times.

    Returns {"prompts": all, hand-written first; "refused": {reason: count}; "tries": times asked}.
    """
    kept = list(dict.fromkeys((*trait.questions, *trait.additional)))
    refused: Counter[str] = Counter()
    tries = 0
    while len(kept) < config.per_trait and tries < config.tries:
        count = min(_AT_ONCE, config.per_trait - len(kept))
        messages = prompts.fill("expand", trait=trait.text, questions=trait.questions, count=count)
        drawn = sampling.of(config.max_new_tokens, seed, f"expand/{trait.text}/{tries}")
        reply = await roles.model.respond(Request(messages, sampling=drawn))
        tries += 1
        for message in numbered(reply.text):
            if reason := refusal(message, kept, config.overlap):
                refused[reason] += 1
            elif len(kept) < config.per_trait:
                kept.append(message)
    return {"prompts": kept, "refused": dict(sorted(refused.items())), "tries": tries}


def extra_prompts(path: str) -> tuple[str, ...]:
    """Prompts that belong to no trait, from a text file with one a line, or from JSONL: a row's `prompt`, the first of
    its `conversations` (as LIMA has them), or the first user turn of its `messages`. `path` may also name a shipped
    prompt set. Raises UserError."""
    shipped = SHIPPED / path / "extra.txt"
    file = shipped if shipped.is_file() else Path(path)
    if file.suffix != ".jsonl":
        return read_lines(file)
    found = tuple(_first_prompt(row, f"{file}, line {line}") for line, row, _ in read_jsonl(file))
    if not found:
        raise UserError(f"{file} has no rows: it should hold one prompt a row")
    return found


def _first_prompt(row: dict[str, Any], where: str) -> str:
    turns: Sequence[Any] = row.get("conversations") or row.get("messages") or ()
    if "prompt" in row or not isinstance(turns, list) or not turns:
        return field(row, "prompt", where)
    if isinstance(turns[0], str):
        return turns[0]
    asked = [
        turn for turn in turns if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human")
    ]
    return (
        field(asked[0], "content" if "content" in asked[0] else "value", where)
        if asked
        else field(row, "prompt", where)
    )
