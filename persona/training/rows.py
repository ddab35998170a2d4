"""What TRL's trainers are given: rows of tokens that fit, padded; what does not fit is counted and listed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from persona.errors import UserError
from persona.files import write_lines
from persona.lm import BaseLM

logger = logging.getLogger(__name__)

# A row: token ids of a prompt and of its reply.
Tokens = tuple[Sequence[int], Sequence[int]]


def room(base: BaseLM, max_length: int | None) -> int:
    """Tokens that a row may have: `max_length`, and never more than the base LM has positions.

    Raises UserError for an encoder-decoder base LM: TRL's trainers are for decoder-only ones.
    """
    if base.is_encoder_decoder:
        raise UserError(f"{base.name} is an encoder-decoder LM: this trainer is for decoder-only LMs (use finetune)")
    return min(length for length in (max_length, base.max_positions, 2**31) if length is not None)


def report_dropped(dropped: Sequence[dict[str, Any]], of: int, what: str, limit: int, out: Path) -> None:
    """List every row that is too long in `out/dropped.jsonl` and say how many there are.

    `dropped` holds at least "tokens" of each; `of` is the number of all. Raises UserError when none is left.
    """
    listing = out / "dropped.jsonl"
    if PartialState().is_main_process:
        write_lines(listing, dropped)
    if dropped:
        longest = max(row["tokens"] for row in dropped)
        said = f"{len(dropped)} of {of} {what} have more than {limit} tokens, the longest {longest}"
        if len(dropped) == of:
            raise UserError(f"{said}: raise max_length, there is nothing left to train on")
        logger.warning("%s: they are left out, %s names them", said, listing)


def padded(rows: Sequence[Tokens], pad: int) -> dict[str, Tensor]:
    """[B, T] each, padded on the right: input_ids, attention_mask, and labels with -100 outside the replies."""
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids[i, :end] = torch.tensor([*prompt, *reply])
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
