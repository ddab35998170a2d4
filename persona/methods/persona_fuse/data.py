"""What training needs of a sample: its tokens, and which experts it calls for."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from persona.data.situations import POLES, expert_vector_of
from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.personalizer import LanguageModel
from persona.training.rows import report_dropped, room
from persona.types import Request, Sample, Sampling


@dataclass(frozen=True)
class Row:
    """`prompt` and `reply` are tokens; `vector` [10] in 0 to 1, in the order of POLES, all zeros for a neutral
    query."""

    id: str
    request: Request
    target: str
    prompt: list[int]
    reply: list[int]
    vector: tuple[float, ...]


def request_of(sample: Sample) -> Request:
    return Request(sample.messages, sample.persona, Sampling(max_new_tokens=0), sample.options, sample.task)


def rows_of(under: LanguageModel, samples: Sequence[Sample], max_length: int, out: Path | None = None) -> list[Row]:
    """Samples as rows, their prompts as `under` writes them. What is longer than `max_length` tokens is left out,
    counted, and listed in `out/dropped.jsonl`.

    Raises UserError for an encoder-decoder base LM, a sample without response, and an expert vector that is not ten
    numbers of 0 to 1.
    """
    base = under.base
    limit = room(base, max_length)
    whole = LanguageModel(base, under.personalizers, under.batch_size, 2**31)  # cuts nothing
    rows, dropped = [], []
    for sample in samples:
        request = request_of(sample)
        if not sample.target:
            raise UserError(f"sample {sample.id} has no response to learn from")
        prompt, reply = whole.prompts([request])[0], base.render_reply(sample.messages, sample.target)
        if len(prompt) + len(reply) > limit:
            dropped.append({"id": sample.id, "tokens": len(prompt) + len(reply)})
        else:
            rows.append(Row(sample.id, request, sample.target, prompt, reply, checked(sample)))
    if out is not None and samples:
        report_dropped(dropped, len(samples), "samples", limit, out)
    return rows


def checked(sample: Sample) -> tuple[float, ...]:
    """The sample's expert vector. Raises UserError when it is not ten numbers of 0 to 1."""
    vector = expert_vector_of(sample)
    if len(vector) != len(POLES) or not all(0 <= weight <= 1 for weight in vector):
        raise UserError(
            f"sample {sample.id} has the expert vector {json.dumps(vector):.99}, which should be {len(POLES)} numbers "
            f"of 0 to 1, one for each of {', '.join(POLES)}"
        )
    return tuple(vector)


def targets_of(vectors: Sequence[Sequence[float]], null: bool) -> Tensor:
    """[B, 10], and with `null` an eleventh column that is 1 for neutral queries."""
    targets = torch.tensor(vectors, dtype=torch.float32).reshape(-1, len(POLES))
    return torch.cat([targets, (targets == 0).all(-1, keepdim=True).float()], dim=-1) if null else targets


class Rounds(Dataset):
    """Item j is one row for each of `experts` (their numbers): [(row, expert), …].

    Every expert walks through the rows of its own pole in an order of its own, again and again, so that a batch of b
    items has b rows of each, and an expert's rows do not depend on which others are trained beside it. An epoch has as
    many items as a pole has rows on average.
    """

    def __init__(self, rows: Sequence[Row], experts: Sequence[int], seed: int):
        own = [[row for row in rows if row.vector[number] > 0] for number in range(len(POLES))]
        if empty := [POLES[number] for number in range(len(POLES)) if not own[number]]:
            raise UserError(
                f"no training sample calls for {', '.join(empty)}: each of the ten poles needs some for its expert "
                "(or leave the warm-up out with method.skip=[warmup])"
            )
        self.experts = list(experts)
        self.length = -(-sum(map(len, own)) // len(POLES))
        self.order = {number: self._order(own[number], number, seed) for number in self.experts}

    def _order(self, rows: list[Row], number: int, seed: int) -> list[Row]:
        found: list[Row] = []
        while len(found) < self.length:
            again = list(rows)
            random.Random(seed_of(seed, "warmup", POLES[number], len(found))).shuffle(again)
            found += again
        return found[: self.length]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[tuple[Row, int]]:
        return [(self.order[number][index], number) for number in self.experts]


class Twos(Dataset):
    """Item j is two rows that call for the same, so that every batch has pairs for the consistency loss.

    Rows without a partner are put together among themselves, the last of an odd number with the first row once more.
    """

    def __init__(self, rows: Sequence[Row], seed: int):
        patterns: dict[tuple[float, ...], list[Row]] = defaultdict(list)
        for row in rows:
            patterns[row.vector].append(row)
        self.items: list[list[Row]] = []
        single: list[Row] = []
        for vector, alike in patterns.items():
            random.Random(seed_of(seed, "twos", vector)).shuffle(alike)
            self.items += [alike[i : i + 2] for i in range(0, len(alike) - 1, 2)]
            single += alike[len(alike) - len(alike) % 2 :]
        if len(single) % 2:
            single.append(rows[0])
        self.items += [single[i : i + 2] for i in range(0, len(single), 2)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> list[Row]:
        return self.items[index]
