"""Running sums of what rollouts do to the residual stream: role vectors and projections without a dump of activations.

Memory and disk do not grow with the number of rollouts: a key (say a role and a judge's score) has one float64 sum of
[sites, hidden] and a count. Published code writes every rollout's activations first, 140 to 434 GB
(reference/assistant_axis.md 5.6).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from persona.errors import UserError
from persona.lm.batch import Edit
from persona.lm.edits import unit
from persona.lm.load import BaseLM
from persona.lm.residual import Site, span_means
from persona.types import Conversation

CHUNK = 256  # rollouts that one process reads at a time; sums are added chunk by chunk, in their order


@dataclass
class Sums:
    """`sums[key]` [sites, hidden] in float64 and `counts[key]`, over rollouts; `empty` are those (by their number)
    whose assistant said nothing, which are in no sum. `projections[number]` [sites] where an axis was given."""

    sums: dict[Hashable, Tensor] = field(default_factory=dict)
    counts: dict[Hashable, int] = field(default_factory=dict)
    empty: list[int] = field(default_factory=list)
    projections: dict[int, Tensor] = field(default_factory=dict)

    def add(self, key: Hashable, vector: Tensor) -> None:
        """One rollout's mean states [sites, hidden]."""
        self.sums[key] = self.sums[key] + vector.double() if key in self.sums else vector.double()
        self.counts[key] = self.counts.get(key, 0) + 1

    def merge(self, other: Sums) -> None:
        """Add another's sums and counts behind one's own: the order of merging is the order of adding."""
        for key, total in other.sums.items():
            self.sums[key] = self.sums[key] + total if key in self.sums else total
            self.counts[key] = self.counts.get(key, 0) + other.counts[key]
        self.empty += other.empty
        self.projections |= other.projections


def rollout_sums(
    base: BaseLM,
    conversations: Sequence[Conversation],
    keys: Sequence[Hashable],
    sites: Sequence[Site],
    axis: Tensor | None = None,
    edit: Edit | None = None,
    batch_size: int = 32,
    where: str = "reply",
) -> Sums:
    """Sum the mean states of each conversation under its key: the mean over the tokens of each of the assistant's
    messages, then over its messages (reference/assistant_axis.md 3.3), or `where` else `span_means` can read. `axis`
    [sites, hidden] gives projections of those means onto the unit axis as well, float32.

    Several processes share the chunks and all get the whole result, the same to the bit for any number of them:
    batches never cross chunks, and chunks are added in their order. `edit` gets indices of conversations.
    Raises UserError, in every process, as `span_means` does, and for an axis of another shape.
    """
    processes = PartialState()
    if len(keys) != len(conversations):
        raise ValueError(f"{len(conversations)} conversations have {len(keys)} keys")
    if axis is not None and len(axis) != len(sites):
        raise UserError(f"an axis with {len(axis)} layers does not fit {len(sites)} sites: it belongs to another LM")
    whole = Sums()
    chunks = range(0, len(conversations), CHUNK)
    for first in range(0, len(chunks), processes.num_processes):
        mine = first + processes.process_index
        part: Sums | UserError = Sums()
        if mine < len(chunks):
            numbers = range(chunks[mine], min(chunks[mine] + CHUNK, len(conversations)))
            try:
                part = _chunk(base, conversations, keys, numbers, sites, axis, edit, batch_size, where)
            except UserError as error:  # the others wait below
                part = error
        for found in gather_object([part]) if processes.num_processes > 1 else [part]:
            if isinstance(found, UserError):
                raise found
            whole.merge(found)
    return whole


def _chunk(
    base: BaseLM,
    conversations: Sequence[Conversation],
    keys: Sequence[Hashable],
    numbers: range,
    sites: Sequence[Site],
    axis: Tensor | None,
    edit: Edit | None,
    batch_size: int,
    where: str,
) -> Sums:
    found = Sums()
    there = None if edit is None else lambda indices: edit([numbers[i] for i in indices])
    talk = [conversations[i] for i in numbers]
    for place, turns in span_means(base, talk, sites, there, batch_size, where=where):
        said = turns[~turns[:, 0, 0].isnan()]
        if not len(said):
            found.empty.append(numbers[place])
            continue
        mean = said.mean(dim=0)
        found.add(keys[numbers[place]], mean)
        if axis is not None:
            found.projections[numbers[place]] = (mean * unit(axis)).sum(dim=-1)
    found.empty.sort()
    return found
