"""A beginning that rows share (a system prompt, a persona, a long context) is computed once and copied to each row.

A batch keeps its layout: left-padded rows of L columns. The keys and values of its first C columns come from one
forward over each distinct beginning, shifted to where each row starts; only the other columns are computed per row.
Since every key stands where it stood, windows and positions see no difference. Only for rows that nothing edits: an
edit of modules may depend on the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from persona.lm.batch import Edit, Row, assemble, batches, prompts
from persona.lm.load import BaseLM

SHORTEST = 32  # tokens: a shorter beginning is not looked for
PART = 4  # a beginning is at least a quarter of its row; a batch has to save at least a quarter of its tokens,
LEAST = 256  # and no fewer than these, for a second forward has a price of its own


class Shared:
    """What the rows of one call have in common. `edit` None: nothing edits modules, so beginnings may be shared."""

    def __init__(self, base: BaseLM, rows: Sequence[Row], edit: Edit | None):
        self.base, self.rows = base, rows
        self.lengths = [row.length for row in rows]
        families = (
            find_families(_symbols(rows)) if edit is None and len(rows) > 1 and can_share(base) else []
        )  # a family: how long a beginning which rows have in common
        self.family = {i: number for number, (_, members) in enumerate(families) for i in members}
        self.common = {i: n for n, members in families for i in members}

    def batches(self, size: int) -> Iterator[list[int]]:
        """Indices in batches of at most `size`, longest first as without sharing; families stay together, so that
        rows and batches are no more than without."""
        if not self.family:
            yield from batches(self.lengths, size)
            return
        longest: dict[int, int] = {}
        for i, number in self.family.items():
            longest[number] = max(longest.get(number, 0), self.lengths[i])

        def place(i: int) -> tuple[int, int, int]:
            number = self.family.get(i, -1)
            return -longest.get(number, self.lengths[i]), number, -self.lengths[i]

        order = sorted(range(len(self.rows)), key=place)
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def cache(self, batch: Sequence[int]) -> DynamicCache | None:
        """Keys and values of the batch's first columns (as many as the cache's length), or None where sharing would
        not pay. Memory: rows x columns as without sharing, and one layer more while copying."""
        lengths = [self.lengths[i] for i in batch]
        width = max(lengths)
        columns, owners = self._plan(batch)
        if not columns:
            return None
        # Per row the tokens that come from the cache; per beginning the row with the most of them stands for it.
        known = [max(0, columns - (width - length)) for length in lengths]
        heads: dict[int, int] = {}
        for k, owner in enumerate(owners):
            if owner is not None and known[k] > known[heads.setdefault(owner, k)]:
                heads[owner] = k
        number = {owner: n for n, owner in enumerate(heads)}
        inputs = assemble(self.base, [_cut(self.rows[batch[k]], known[k]) for k in heads.values()])
        computed = DynamicCache()  # whole for all layers, windows too: rows need different ends of it
        with prompts([lengths[k] for k in heads.values()]):
            self.base.model(
                inputs_embeds=inputs.embeds,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                past_key_values=computed,
                use_cache=True,
                logits_to_keep=1,
            )
        # Row k takes beginning `source` moved right by `shift`; what wraps around lands on its padding.
        source = [0 if owner is None else number[owner] for owner in owners]
        shift = [0 if owner is None else known[heads[owner]] - known[k] for k, owner in enumerate(owners)]
        cache = DynamicCache(config=self.base.model.config)
        for index, layer in enumerate(computed.layers):
            cache.update(_spread(layer.keys, source, shift), _spread(layer.values, source, shift), index)
            layer.keys = layer.values = None
        return cache

    def _plan(self, batch: Sequence[int]) -> tuple[int, list[int | None]]:
        """How many columns to take from beginnings (0: none), and per row whose beginning (None: it needs none).

        Of all numbers of columns it takes the one that computes the fewest tokens, padding included: a row of a family
        shares where its own part fits into the other columns, any other row is a beginning of its own.
        """
        lengths = [self.lengths[i] for i in batch]
        width, plain = max(lengths), len(batch) * max(lengths)
        own = [length - min(self.common.get(i, 0), length - 1) for i, length in zip(batch, lengths, strict=True)]
        best = plain
        chosen: tuple[int, list[int | None]] = (0, [])
        for rest in sorted({n for i, n in zip(batch, own, strict=True) if i in self.family and n < width}):
            owners = [
                None if length <= rest else (self.family[i] if n <= rest and i in self.family else -1 - k)
                for k, (i, n, length) in enumerate(zip(batch, own, lengths, strict=True))
            ]
            computed = len(set(owners) - {None}) * (width - rest) + len(batch) * rest
            if computed < best:
                best, chosen = computed, (width - rest, owners)
        enough = plain - best >= max(LEAST, plain / PART)
        return chosen if enough and chosen[0] >= SHORTEST else (0, [])


def can_share(base: BaseLM) -> bool:
    """Whether a row's cache can be put together from keys and values: plain or sliding attention in every layer, and
    rotary angles that do not depend on the length of the whole sequence."""
    if base.is_encoder_decoder:
        return False
    rope = str(getattr(base.model.config.get_text_config(decoder=True), "rope_parameters", None))
    by_length = any(kind in rope for kind in ("'dynamic'", "'longrope'"))
    return is_plain(DynamicCache(config=base.model.config)) and not by_length


def is_plain(cache: DynamicCache) -> bool:
    """Whether each layer holds keys and values of columns, and nothing else."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _symbols(rows: Sequence[Row]) -> list[list[int]]:
    """Rows as comparable sequences: token ids, and one negative number for each distinct vector in front."""
    known: dict[bytes, int] = {}
    sequences = []
    for row in rows:
        vectors = [] if row.prefix is None else row.prefix.detach().contiguous().view(torch.uint8).cpu().numpy()
        sequences.append([known.setdefault(vector.tobytes(), -1 - len(known)) for vector in vectors] + row.prompt)
    return sequences


@dataclass
class _Node:
    """Neighbours in the sorted order that have `depth` symbols in common: families found below, and rows in none."""

    depth: int
    families: list[tuple[int, list[int]]] = field(default_factory=list)
    loose: list[int] = field(default_factory=list)


def find_families(sequences: Sequence[list[int]]) -> list[tuple[int, list[int]]]:
    """[(n, rows)]: rows whose first n symbols are the same, n at least SHORTEST and a quarter of each of them.

    A row is in one family at most. Small families with long beginnings stay apart where that saves more than joining
    their neighbours with a shorter one (few questions on one context, under a system prompt that all share).
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    arrays = [np.asarray(sequences[i], dtype=np.int64) for i in order]
    stack = [_Node(0)]
    for k, i in enumerate(order):
        after = _common(arrays[k], arrays[k + 1]) if k + 1 < len(order) else 0
        after = after if after >= SHORTEST else 0
        if after > stack[-1].depth:
            stack.append(_Node(after))
        stack[-1].loose.append(i)
        while stack[-1].depth > after:
            node = stack.pop()
            if stack[-1].depth < after:
                stack.append(_Node(after))
            _close(node, stack[-1], sequences)
    return stack[0].families


def _close(node: _Node, parent: _Node, sequences: Sequence[Sequence[int]]) -> None:
    """All rows of a node are known: make its families, and hand them and the rows in none to its parent."""
    fits = {i for i in node.loose if PART * node.depth >= len(sequences[i])}
    for n, members in node.families:
        joined = all(PART * node.depth >= len(sequences[i]) for i in members)
        if joined and (len(members) - 1) * n <= len(members) * node.depth:
            fits.update(members)
        else:
            parent.families.append((n, members))
    if len(fits) > 1:
        parent.families.append((node.depth, sorted(fits)))
    else:
        parent.loose.extend(fits)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n


def _cut(row: Row, n: int) -> Row:
    """The row's first n vectors and tokens."""
    in_front = 0 if row.prefix is None else len(row.prefix)
    prefix = None if row.prefix is None else row.prefix[:n]
    return Row(row.prompt[: max(0, n - in_front)], prefix, row.request)


def _spread(states: Tensor, source: Sequence[int], shift: Sequence[int]) -> Tensor:
    """[G, heads, C, d] → [B, heads, C, d]: row k is states[source[k]], moved right by shift[k] columns."""
    return torch.stack([states[g].roll(by, dims=1) if by else states[g] for g, by in zip(source, shift, strict=True)])
