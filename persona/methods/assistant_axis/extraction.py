"""Third stage: mean activations of a role's rollouts, summed by score as they come; none of them is kept.

sums/<role>.safetensors    keys [n, 2] (score, half of the questions), counts [n], sums [n, layers, hidden] float32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.files import atomic_write
from persona.lm.residual import Site, blocks
from persona.lm.sums import Sums, rollout_sums
from persona.methods.assistant_axis.axis import trait_pairs
from persona.methods.assistant_axis.judging import REFUSAL
from persona.methods.assistant_axis.rollouts import DEFAULT, TRAIT
from persona.personalizer import LanguageModel
from persona.types import Conversation, Message, Request

HALVES = 2  # of the questions: a direction that both give is not an accident of what was asked


def groups(kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """What each rollout that counts is summed under, by its id: (score, half of the questions).

    The score is a role's, 0 for the plain assistant; of a trait's pairs of rollouts that differ enough, 1 for the
    positive and 0 for the negative side. Rows have a "score" where the judge gave one; others do not count.
    """
    if kind == TRAIT:
        scored = _sides(rows)
    elif kind == DEFAULT:
        scored = {row["id"]: 0 for row in rows}
    else:
        scored = {row["id"]: int(row["score"]) for row in rows if "score" in row}
    return {row["id"]: (scored[row["id"]], seed_of(0, "half", row["question"]) % HALVES)
            for row in rows if row["id"] in scored}  # fmt: skip


def _sides(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["prompt"], row["question"]), {})[row["pole"]] = row
    pairs = [(pair["pos"], pair["neg"]) for pair in found.values() if len(pair) == 2]
    positive, negative = ([None if row.get("score") == REFUSAL else row.get("score") for row in side]
                          for side in (zip(*pairs, strict=True) if pairs else ((), ())))  # fmt: skip
    kept = trait_pairs(positive, negative)
    return {row["id"]: side for (more, less), keep in zip(pairs, kept, strict=True) if keep
            for side, row in ((1, more), (0, less))}  # fmt: skip


def layers(under: LanguageModel) -> list[Site]:
    """The outputs of all decoder blocks."""
    return [Site(layer) for layer in range(len(blocks(under.base.model)))]


def conversations(under: LanguageModel, rows: Sequence[Mapping[str, Any]]) -> list[Conversation]:
    """Rollouts as the LM reads them again: what was asked, as the stack of `under` writes it, and the reply.

    Raises UserError for a stack that puts vectors in front of prompts: sums are not taken under it.
    """
    requests = [Request(tuple(Message(**message) for message in row["messages"])) for row in rows]
    if any(prefix is not None for prefix in under.prefixes(requests[:1])):
        raise UserError("the Assistant Axis is not read under a personalizer that puts vectors in front of prompts")
    for personalizer in under.personalizers:
        requests = personalizer.prompt(requests)
    return [
        (*request.messages, Message("assistant", row["reply"])) for request, row in zip(requests, rows, strict=True)
    ]


def read(
    under: LanguageModel,
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[Any],
    where: str = "reply",
    axis: np.ndarray | None = None,
) -> Sums:
    """Every rollout's activations, the mean over its reply's tokens or those of the prompt's last token (`where`),
    [layers, hidden], summed under its key; with `axis` also their projections onto it. All processes share the
    rollouts and get the same."""
    asked = [Request(tuple(Message(**message) for message in row["messages"])) for row in rows]
    towards = None if axis is None else torch.from_numpy(axis)
    return rollout_sums(
        under.base, conversations(under, rows), keys, layers(under), towards,
        lambda indices: under.edit([asked[i] for i in indices]), under.batch_size, where,
    )  # fmt: skip


@dataclass(frozen=True)
class RoleSums:
    """A role's sums of mean activations [layers, hidden] by (score, half), and of how many rollouts each is."""

    sums: Mapping[tuple[int, int], np.ndarray]
    counts: Mapping[tuple[int, int], int]

    @staticmethod
    def load(path: Path) -> RoleSums:
        found = load_file(path)
        keys = [(int(score), int(half)) for score, half in found["keys"]]
        sums = dict(zip(keys, found["sums"].astype(np.float64), strict=True))
        return RoleSums(sums, dict(zip(keys, map(int, found["counts"]), strict=True)))

    def count(self, score: int, half: int | None = None) -> int:
        return sum(n for key, n in self.counts.items() if key[0] == score and half in (None, key[1]))

    def sum(self, score: int, half: int | None = None) -> Any:
        """0 where no rollout has the score."""
        return sum(total for key, total in self.sums.items() if key[0] == score and half in (None, key[1]))

    def mean(self, score: int, half: int | None = None) -> np.ndarray:
        return self.sum(score, half) / self.count(score, half)


def save_sums(path: Path, found: Sums, under: LanguageModel) -> None:
    """Write what `RoleSums.load` reads."""
    keys: list[Any] = sorted(found.sums)  # type: ignore[type-var]  # pairs of numbers
    shape = len(keys), len(layers(under)), under.base.hidden_size
    save(path, {
        "keys": np.array(keys, dtype=np.int64).reshape(-1, 2),
        "counts": np.array([found.counts[key] for key in keys], dtype=np.int64),
        "sums": np.array([found.sums[key].numpy() for key in keys], dtype=np.float32).reshape(shape),
    })  # fmt: skip


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file whole or not at all."""
    with atomic_write(path) as temporary:
        save_file(dict(tensors), temporary)
