"""Preference training: DPO with an NLL and a squared log-ratio term, on TRL's DPOTrainer, into a LoRA adapter.

The reference is the model without the adapter that is trained: the base LM under the adapters `below`, if any. There
is no second model in memory; its per-token log-probs are computed once, before the first step (reference.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from persona.errors import UserError
from persona.files import sha256
from persona.lm import BaseLM
from persona.training.lora import CONFIG, WEIGHTS, LoraSettings, adapted, save_adapter, spare_head
from persona.training.losses import preference_loss
from persona.training.reference import Reference, reference_logps
from persona.training.remainder import NOTHING
from persona.training.rows import Tokens, padded, report_dropped, room
from persona.training.trainer import OwnTrainer, TrainerConfig, arguments, run
from persona.types import Conversation


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one conversation. The loss of a pair is chosen_weight · -log σ(beta·m) + rejected_weight ·
    -log σ(-beta·m) with the margin m of chosen over rejected: 1 and 0 say that `chosen` is better, P and 1 - P that it
    is with probability P. The NLL term is about `chosen` whatever the weights."""

    messages: Conversation
    chosen: str
    rejected: str
    chosen_weight: float = 1.0
    rejected_weight: float = 0.0


# ---- data ----------------------------------------------------------------------------------------------------------


class Encoded:
    """Pairs as token ids. `rows` holds every different (prompt, reply) once; a pair names its two by number."""

    def __init__(self, base: BaseLM, limit: int):
        self.base, self.limit = base, limit
        self.rows: list[Tokens] = []
        self.dropped: list[dict[str, Any]] = []
        self._numbers: dict[Tokens, int] = {}

    def add(self, pairs: Sequence[Pair], split: str) -> Dataset:
        """Columns chosen and rejected (numbers of rows), and their weights. A pair with a reply that does not fit is
        left out whole."""
        columns: dict[str, list] = {"chosen": [], "rejected": [], "chosen_weight": [], "rejected_weight": []}
        for number, pair in enumerate(pairs):
            try:
                prompt = self.base.render(pair.messages)
                replies = [self.base.render_reply(pair.messages, reply) for reply in (pair.chosen, pair.rejected)]
            except UserError as error:
                raise UserError(f"{split} pair {number}: {error}") from error
            tokens = len(prompt) + max(map(len, replies))
            if tokens > self.limit:
                self.dropped.append({"split": split, "pair": number, "tokens": tokens})
                continue
            for name, reply in zip(("chosen", "rejected"), replies, strict=True):
                row = (tuple(prompt), tuple(reply))
                columns[name].append(self._numbers.setdefault(row, len(self.rows)))
                if columns[name][-1] == len(self.rows):
                    self.rows.append(row)
            columns["chosen_weight"].append(float(pair.chosen_weight))
            columns["rejected_weight"].append(float(pair.rejected_weight))
        return Dataset.from_dict(columns)


@dataclass
class Collate:
    """Pairs → one batch of 2B rows, the chosen replies first; `ref_logps` [2B, T - 1] stand as `labels[:, 1:]` do."""

    rows: Sequence[Tokens]
    pad: int
    reference: Reference

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        numbers = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
        rows = [self.rows[number] for number in numbers]
        batch = padded(rows, self.pad)
        logps = torch.zeros(batch["labels"].shape[0], batch["labels"].shape[1] - 1)
        for i, (number, (prompt, reply)) in enumerate(zip(numbers, rows, strict=True)):
            logps[i, len(prompt) - 1 : len(prompt) + len(reply) - 1] = self.reference[number]
        weights = [[pair["chosen_weight"], pair["rejected_weight"]] for pair in pairs]
        return {**batch, "ref_logps": logps, "weights": torch.tensor(weights)}


# ---- training ------------------------------------------------------------------------------------------------------


class _Head(nn.Module):
    """The base LM's head over hidden states that are known already, as something TRL can fuse with the loss."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.config, self.get_output_embeddings = model.config, model.get_output_embeddings
        add_fused_lm_head(self)

    def base_model(self, hidden: Tensor, use_cache: bool) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=hidden)

    def forward(self, hidden: Tensor) -> Tensor:  # what TRL wraps; only its fused path is used
        return self.get_output_embeddings()(hidden)


def reply_logps(model: PreTrainedModel) -> Callable[..., Tensor]:
    """A forward of `model` that gives log-probs of `labels[:, 1:]`, [B, T - 1] in float32; 0 where there is no label.

    TRL's fused head never holds logits of a whole batch. It is given the positions in front of labels only: most of a
    row is prompt.
    """
    head = _Head(model)

    def forward(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        known = labels[:, 1:] != -100
        hidden, targets = output.last_hidden_state[:, :-1][known], labels[:, 1:][known]
        logps = head(hidden=hidden[None], shift_labels=targets[None], fused_lm_head=True).log_probs[0]
        return logps.new_zeros(known.shape).masked_scatter(known, logps)

    return forward


class PreferenceTrainer(OwnTrainer, DPOTrainer):
    """TRL's DPOTrainer with the terms of losses.py, on rows that are tokens already and a reference that is known."""

    def __init__(self, *args: Any, beta: float, nll_coef: float, kl_coef: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.coefficients = {"beta": beta, "nll_coef": nll_coef, "kl_coef": kl_coef}
        self.loss_is_scaled_for_ga = True  # by the number of pairs in the whole step
        self.model.forward = reply_logps(self.model)  # in TRL's place, and away again with the adapter

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        super()._get_num_items_in_batch(batch_samples, device)  # marks what counts nothing
        pairs = sum(len(batch["weights"]) for batch in batch_samples if NOTHING not in batch)
        return self.accelerator.gather(torch.tensor(pairs, device=device)).sum()

    def counted(self, inputs: dict[str, Any]) -> Tensor:
        return torch.tensor(len(inputs["weights"]))  # pairs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The sum over the pairs of a batch, divided by their number in the whole step (over accumulated batches and
        processes); in evaluation the mean over the batch."""
        nothing = inputs.pop(NOTHING, False)
        known = (inputs["ref_logps"], inputs["labels"][:, 1:] != -100)
        logps = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
        chosen, rejected = zip(*(values.chunk(2) for values in (logps, *known)), strict=True)
        weights = inputs["weights"].unbind(-1)
        loss = preference_loss(
            *chosen, *rejected, **self.coefficients, chosen_weight=weights[0], rejected_weight=weights[1]
        )
        self._note(loss.dpo, loss.nll, loss.kl, loss.margin, nothing)
        if num_items_in_batch is None:
            return loss.total.mean()
        # The processes' gradients are averaged.
        return loss.total.sum() * (0 if nothing else self.accelerator.num_processes) / num_items_in_batch

    @torch.no_grad()
    def _note(self, dpo: Tensor, nll: Tensor, kl: Tensor, margin: Tensor, nothing: bool) -> None:
        values = torch.stack([dpo, nll, kl, self.coefficients["beta"] * margin, (margin > 0).float()], dim=-1)
        # Sums, and how many there are last: the processes' batches may differ in length.
        sums = torch.cat([values.sum(0), values.new_tensor([len(values)])]) * (not nothing)
        *totals, count = self.accelerator.reduce(sums).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(("dpo", "nll", "kl", "rewards/margins", "rewards/accuracies"), totals, strict=True):
            metrics[name].append(value / count)


def train_preferences(
    base: BaseLM,
    pairs: Sequence[Pair],
    dev: Sequence[Pair],
    *,
    beta: float,
    nll_coef: float = 0.0,
    kl_coef: float = 0.0,
    lora: LoraSettings,
    below: Sequence[Path] = (),
    max_length: int | None,
    trainer: TrainerConfig,
    out: Path,
) -> Path:
    """Train a new adapter over `base` (and the frozen ones `below`) to prefer the chosen replies; its folder in PEFT's
    format is `out/adapter`.

    The loss of a pair is that of `losses.preference_loss`; the reference is the model without the new adapter. A pair
    of which a reply does not fit into `max_length` tokens is left out, counted, and listed in `out/dropped.jsonl`. A
    second call goes on from `out/checkpoints`; reference log-probs are kept in `out/reference`. Metrics beside the
    loss: its terms, and margins and accuracies of the rewards beta · log-ratio.
    Raises UserError for an encoder-decoder base LM, no pair (or none that fits), and what `run` raises.
    """
    if not pairs:
        raise UserError("there is no preference pair to train on")
    limit = room(base, max_length)
    encoded = Encoded(base, limit)
    data, heldout = encoded.add(pairs, "train"), encoded.add(dev, "dev")
    report_dropped(encoded.dropped, len(pairs) + len(dev), "preference pairs", limit, out)
    if not len(data):
        raise UserError(f"no training pair fits into {limit} tokens: raise max_length")
    torch.manual_seed(trainer.seed)
    with adapted(base, lora, below) as peft_model:
        coefficients = {"beta": beta, "nll_coef": nll_coef, "kl_coef": kl_coef}
        run(prepare(base, peft_model, encoded, data, heldout, coefficients, below, trainer, out), trainer, out)
        return save_adapter(peft_model, out / "adapter")


def prepare(
    base: BaseLM,
    peft_model: Any,
    encoded: Encoded,
    data: Dataset,
    heldout: Dataset,
    coefficients: dict[str, float],
    below: Sequence[Path],
    trainer: TrainerConfig,
    out: Path,
) -> PreferenceTrainer:
    """The trainer of an adapted base, with the log-probs of its reference."""
    spare_head(base)
    args = arguments(
        trainer, out, len(heldout) > 0, DPOConfig, max_length=None, disable_dropout=False,
        precompute_ref_log_probs=True,  # the log-probs count as known: else TRL loads a second model
    )  # fmt: skip
    parts = [str(base.identity["fingerprint"]), str(base.dtype), trainer.precision]
    parts += [sha256(Path(folder) / name) for folder in below for name in (CONFIG, WEIGHTS)]
    autocast = torch.autocast(base.device.type, torch.bfloat16, enabled=trainer.precision == "bf16")
    with peft_model.disable_adapter(), autocast:
        reference = reference_logps(base, encoded.rows, out / "reference", parts, trainer.batch_size)
    return PreferenceTrainer(
        model=base.model,
        args=args,
        train_dataset=data,
        eval_dataset=heldout if len(heldout) else None,
        data_collator=Collate(encoded.rows, base.tokenizer.pad_token_id, reference),
        processing_class=base.tokenizer,
        **coefficients,
    )
