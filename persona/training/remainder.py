"""Rows that are left over at the end of an epoch: every row counts once, whatever the number of processes.

accelerate would fill the last batches up with rows of the epoch's beginning, which then count twice. Here the last
batch is as short as it is, and a process that gets no batch at all takes part with one that counts nothing. Of dev
data transformers would leave out the later processes of the last round, and take the mean of the batches' means.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin: it stands before the Trainer in the bases

NOTHING = "counts_nothing"  # in a batch's inputs


class LeftOver(BatchSamplerShard):
    """Batch i of the epoch is that of process i modulo their number; who has none left gets the first row."""

    @property
    def missing(self) -> bool:
        """Whether this process's last batch is one that counts nothing."""
        return 0 < self.total_length % self.num_processes <= self.process_index

    def __iter__(self) -> Iterator[list[int]]:
        for number, batch in enumerate(self.batch_sampler):
            if number % self.num_processes == self.process_index:
                yield batch
        if self.missing:
            yield [0]


class EveryRowOnce(_Trainer):
    """Mixin for a Trainer whose loss is summed over `labels` and divided by `num_items_in_batch`.

    The dev loss is the mean over all labels of the dev data, however they are put into batches.
    """

    _left: LeftOver | None = None
    _dev_left: LeftOver | None = None
    _dev: Tensor | None = None  # [2], while dev data are read: what this process's batches lose, and labels so far

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            loader.batch_sampler.__class__ = LeftOver
            if is_training:
                self._left = loader.batch_sampler
            else:
                self._dev_left = loader.batch_sampler
        return loader

    def counted(self, inputs: dict[str, Any]) -> Tensor:
        """How many labels the mean loss of a batch is the mean of."""
        return inputs["labels"].ne(-100).sum()

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ends = self.accelerator.gradient_state.end_of_dataloader
        nothing = ends and self._dev_left is not None and self._dev_left.missing
        count = 0 if nothing else int(self.counted(inputs))
        if nothing:
            inputs = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if count and self._dev is not None:
            self._dev += torch.tensor([float(found[0]) * count, count], dtype=torch.float64)
        return found

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._dev = torch.zeros(2, dtype=torch.float64)
        try:
            found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            total, count = self.accelerator.reduce(self._dev.to(self.args.device)).tolist()
        finally:
            self._dev = None
        found.metrics[f"{metric_key_prefix}_loss"] = total / count if count else float("nan")
        return found

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # Not by `model.training`: between an evaluation and the next step it is off.
        if self._dev is not None:
            return None  # of dev data each batch has its mean, and `evaluation_loop` the mean of all
        ends = self.accelerator.gradient_state.end_of_dataloader
        if ends and self._left is not None and self._left.missing:
            last = batch_samples[-1]
            batch_samples[-1] = {**last, "labels": torch.full_like(last["labels"], -100), NOTHING: True}
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nothing = inputs.pop(NOTHING, False)
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * 0 if nothing else loss
