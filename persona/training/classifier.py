"""A sequence classifier of texts: a pretrained model by name or path under a new head, fine-tuned whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from persona.errors import UserError
from persona.files import atomic_folder
from persona.lm.load import resolve
from persona.metrics.nli import longest_input
from persona.training.trainer import TrainerConfig, fit


def train_classifier(
    base: str,
    texts: Sequence[str],
    labels: Sequence[str],
    config: TrainerConfig,
    out: Path,
    *,
    key: str = "model",
) -> Path:
    """Fine-tune `base` to tell the labels apart; returns `out/classifier`, a model folder whose id2label names them.

    Checkpoints stay in `out`. Texts that are too long lose their end. Raises UserError naming `key` when `base` cannot
    be loaded, and for fewer than two labels.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classes = sorted(set(labels))
    if len(classes) < 2:
        raise UserError(
            f"a classifier needs texts of two labels at least, and has those of {', '.join(classes) or 'none'}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(base), padding_side="right")
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # the new head's weights
            model = AutoModelForSequenceClassification.from_pretrained(
                resolve(base),
                dtype=torch.float32,
                id2label=dict(enumerate(classes)),
                label2id={label: number for number, label in enumerate(classes)},
            )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{key}={base} could not be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    length = longest_input(tokenizer, model.config)

    def collate(batch: list[tuple[str, int]]) -> dict[str, Any]:
        inputs = tokenizer(
            [t for t, _ in batch], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return {**known, "labels": torch.tensor([label for _, label in batch])}

    numbers = {label: number for number, label in enumerate(classes)}
    rows = _Rows([(text, numbers[label]) for text, label in zip(texts, labels, strict=True)])
    fit(_Loss(model), rows, None, collate, config, out)
    if PartialState().is_main_process:
        with atomic_folder(out / "classifier") as temporary:
            model.eval().save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    PartialState().wait_for_everyone()
    return out / "classifier"


class _Rows(Dataset):
    def __init__(self, rows: list[tuple[str, int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[str, int]:
        return self.rows[place]


class _Loss(nn.Module):
    """Cross entropy as `fit` wants it: summed over rows, divided by their number in the whole step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, num_items_in_batch: Any = None, **inputs: Tensor) -> dict[str, Tensor]:
        losses = cross_entropy(self.model(**inputs).logits, labels, reduction="sum")
        return {"loss": losses / (len(labels) if num_items_in_batch is None else num_items_in_batch)}
