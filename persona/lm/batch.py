"""From rows (token ids, vectors in front, replies) to one padded forward batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from persona import heartbeat
from persona.errors import UserError
from persona.lm.load import BaseLM
from persona.types import Request

# What the third door does to one forward: called with the indices of the rows in it, entered around it.
Edit = Callable[[Sequence[int]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Row:
    """One row of a batch: `prompt` token ids, `prefix` [n, hidden] put in front of their embeddings (or None)."""

    prompt: list[int]
    prefix: Tensor | None
    request: Request

    @property
    def length(self) -> int:
        return len(self.prompt) + (0 if self.prefix is None else len(self.prefix))


class Running:
    """What edits of states ask about the forwards that run: `prompts` [B], how many of the decoder's positions come
    before each row's reply, and `going` [B], whether a row's reply goes on (None: all do)."""

    prompts: Tensor | None = None
    going: Tensor | None = None


running = Running()


@contextmanager
def prompts(lengths: Sequence[int]) -> Iterator[None]:
    """Within the context forwards are over rows whose first `lengths` positions, vectors in front included, are the
    prompt and what follows is the reply. Whatever runs forwards in `persona.lm` says so; edits read it."""
    before = running.prompts, running.going
    running.prompts, running.going = torch.tensor(list(lengths)), None
    try:
        yield
    finally:
        running.prompts, running.going = before


@contextmanager
def entered(edit: Edit | None, indices: Sequence[int], lengths: Sequence[int]) -> Iterator[None]:
    """The third door around one forward over these rows (None: it is shut), whose prompts have `lengths` positions."""
    with prompts(lengths), nullcontext() if edit is None else edit(indices):
        yield


def prompt_lengths(base: BaseLM, rows: Sequence[Row]) -> list[int]:
    """Per row how many positions of the decoder come before the reply: in an encoder-decoder its start token."""
    return [1 if base.is_encoder_decoder else row.length for row in rows]


class Inputs(NamedTuple):
    """A padded batch. `embeds` [B, L, hidden], `mask` [B, L] (1 = real), `positions` [B, L] counted from the first
    real token; `labels` [B, L or T] with -100 where there is nothing to predict (None without replies)."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor | None


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, longest first: neighbours pad little, and running out of memory shows
    at once rather than after an hour."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def assemble(base: BaseLM, rows: Sequence[Row], replies: Sequence[Sequence[int]] | None = None) -> Inputs:
    """Pad rows to one batch, on the left, so that every row ends where generation starts.

    Decoder-only: a reply follows its prompt in the same sequence, and `labels` [B, L] marks the reply's tokens.
    Encoder-decoder: the reply goes to the decoder, `labels` [B, T]. Gradients flow into the rows' prefixes.
    """
    decoder_only = not base.is_encoder_decoder
    sequences = [
        row.prompt + (list(replies[i]) if replies is not None and decoder_only else []) for i, row in enumerate(rows)
    ]
    prefixes = [0 if row.prefix is None else len(row.prefix) for row in rows]
    longest = max(p + len(s) for p, s in zip(prefixes, sequences, strict=True))
    pad = base.tokenizer.pad_token_id
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), -100, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, longest - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        mask[i, longest - len(sequence) - prefixes[i] :] = 1
        if replies is not None and decoder_only and len(replies[i]):
            labels[i, longest - len(replies[i]) :] = torch.tensor(list(replies[i]), dtype=torch.long)
    heartbeat.counted(int(mask.sum()), mask.numel())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    device = base.device
    embeds = base.embed(ids.to(device))
    if any(prefixes):
        # Out of place (index_put on a clone), so that autograd sees the prefix vectors.
        where_row = torch.cat([torch.full((n,), i) for i, n in enumerate(prefixes) if n])
        where_column = torch.cat(
            [torch.arange(n) + longest - len(sequences[i]) - n for i, n in enumerate(prefixes) if n]
        )
        values = torch.cat([row.prefix for row in rows if row.prefix is not None and len(row.prefix)])
        embeds = embeds.index_put((where_row.to(device), where_column.to(device)), values.to(embeds))
    if replies is not None and not decoder_only:
        width = max(len(reply) for reply in replies)
        labels = torch.full((len(rows), width), -100, dtype=torch.long)
        for i, reply in enumerate(replies):
            labels[i, : len(reply)] = torch.tensor(list(reply), dtype=torch.long)
        heartbeat.counted(sum(map(len, replies)), labels.numel())
    return Inputs(embeds, mask.to(device), positions.to(device), None if replies is None else labels.to(device))


def forward_logits(base: BaseLM, inputs: Inputs, model: torch.nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Logits [B, T, vocab] and the tokens [B, T] they predict (-100 = none), for a batch with replies; T is the length
    of the longest one. Prompts get no logits: over a large vocabulary those would take most of the memory."""
    model = base.model if model is None else model
    assert inputs.labels is not None
    if base.is_encoder_decoder:
        with prompts([1] * len(inputs.labels)):
            output = model(inputs_embeds=inputs.embeds, attention_mask=inputs.mask, labels=inputs.labels)
        return output.logits, inputs.labels
    replies = (inputs.labels != -100).sum(-1)
    # Replies end where their row ends; the first one's token is predicted by the position in front of it.
    kept = min(max(1, int(replies.max())) + 1, inputs.labels.shape[1])
    with prompts((inputs.mask.sum(-1) - replies).tolist()):
        output = model(
            inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=False,
            logits_to_keep=kept,
        )  # fmt: skip
    return output.logits[:, :-1], inputs.labels[:, -kept:][:, 1:]


def nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood over the targets that are not -100, in float32. Zero when there are none."""
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def check_numbers(base: BaseLM, logps: Tensor) -> None:
    """Raises UserError when log-probabilities [T] of a reply hold NaN: what was chosen by them means nothing."""
    if bool(logps.isnan().any()):
        raise UserError(
            f"{base.name} gives log-probabilities that are not numbers: it overflows in {base.dtype}, or weights that "
            "it or a personalizer brings are not finite"
        )
