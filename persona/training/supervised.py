"""Supervised training on conversations, on TRL's SFTTrainer, into a LoRA adapter: loss on every assistant turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from persona.errors import UserError
from persona.lm import BaseLM
from persona.training.lora import LoraSettings, adapted, save_adapter, spare_head
from persona.training.rows import report_dropped, room
from persona.training.trainer import OwnTrainer, TrainerConfig, arguments, run
from persona.types import Conversation


class SupervisedTrainer(OwnTrainer, SFTTrainer):
    """TRL's SFTTrainer: cross entropy per token, over all tokens of an optimizer step, whatever holds them (processes,
    accumulated batches)."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        for metrics in self._metrics.values():
            metrics.pop("num_tokens", None)  # tokens so far, which TRL counts from 0 again after a resume
        super().log(*args, **kwargs)


def encode(
    base: BaseLM, conversation: Conversation, limit: int | None = None, last_only: bool = False
) -> tuple[list[dict], list[dict]]:
    """The conversation as rows {"input_ids", "labels"}, and the turns {"turn", "tokens"} that are longer than `limit`.

    Each assistant turn is learned behind exactly the tokens that the model sees when it is to reply there
    (`base.render`), its end-of-turn included. One row holds all turns where the template goes on from one to the next;
    where it does not (it drops the thoughts of earlier turns, or there is no template and no end-of-turn in a prompt),
    a turn begins a new row. With `last_only` the conversation's last message alone is learned.
    Raises UserError when a reply does not come back out of its tokens.
    """
    rows: list[dict] = []
    dropped: list[dict] = []
    ids: list[int] = []
    for number, message in enumerate(conversation):
        if message.role != "assistant" or (last_only and number < len(conversation) - 1):
            continue
        before = conversation[:number]
        prompt, reply = base.render(before), base.render_reply(before, message.content)
        _check(base, reply, message.content)
        if len(prompt) + len(reply) > (limit or len(prompt) + len(reply)):
            dropped.append({"turn": number, "tokens": len(prompt) + len(reply)})
            continue
        if not rows or prompt[: len(ids)] != ids:
            rows.append({"labels": []})
            ids = []
        rows[-1]["labels"] += [-100] * (len(prompt) - len(ids)) + reply
        ids = rows[-1]["input_ids"] = prompt + reply
    return rows, dropped


def _check(base: BaseLM, reply: list[int], content: str) -> None:
    """The content as the tokenizer gives it back (some drop accents or unknown words) must be in the decoded span."""
    decoded = base.tokenizer.decode(reply, skip_special_tokens=True)
    own = base.tokenizer(content, add_special_tokens=False)["input_ids"]
    if base.tokenizer.decode(own, skip_special_tokens=True).strip() not in decoded:
        raise UserError(
            f"an assistant turn does not come back out of its tokens: they hold {decoded[:200]!r}, the turn is "
            f"{content[:200]!r}"
        )


def train_supervised(
    base: BaseLM,
    conversations: Sequence[Conversation],
    *,
    lora: LoraSettings,
    below: Sequence[Path] = (),
    max_length: int | None,
    trainer: TrainerConfig,
    out: Path,
    last_only: bool = False,
) -> Path:
    """Train a new adapter over `base` (and the frozen ones `below`) on every assistant turn (`last_only`: on the last
    message of each conversation); its folder in PEFT's format is `out/adapter`.

    A turn that ends after more than `max_length` tokens is left out, counted, and listed in `out/dropped.jsonl`; the
    turns before it stay. A second call goes on from `out/checkpoints`.
    Raises UserError for an encoder-decoder base LM, a conversation without an assistant turn, no turn that fits, and
    what `run` raises.
    """
    limit = room(base, max_length)
    rows: list[dict] = []
    dropped: list[dict[str, Any]] = []
    turns = 0
    for number, conversation in enumerate(conversations):
        own = sum(message.role == "assistant" for message in conversation)
        if not own:
            raise UserError(f"conversation {number} has no assistant turn to learn from")
        turns += own
        try:
            found, long = encode(base, conversation, limit, last_only)
        except UserError as error:
            raise UserError(f"conversation {number}: {error}") from error
        rows += found
        dropped += [{"conversation": number, **turn} for turn in long]
    if not turns:
        raise UserError("there is no conversation to train on")
    report_dropped(dropped, turns, "assistant turns", limit, out)
    torch.manual_seed(trainer.seed)
    with adapted(base, lora, below) as peft_model:
        spare_head(base)
        loop = SupervisedTrainer(
            model=base.model,
            args=arguments(
                trainer, out, False, SFTConfig, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
        )
        run(loop, trainer, out)
        return save_adapter(peft_model, out / "adapter")
