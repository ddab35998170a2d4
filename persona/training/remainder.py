"""Rows that are left over at the end of an epoch: every row counts once, whatever the number of processes.

accelerate would fill the last batches up with rows of the epoch's beginning, which then count twice. Here the last
batch is as short as it is, and a process that gets no batch at all takes part with one that counts nothing.
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
    """Mixin for a Trainer whose loss is summed over `labels` and divided by `num_items_in_batch`."""

    _left: LeftOver | None = None

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        if is_training and isinstance(loader.batch_sampler, BatchSamplerShard):
            self._left = loader.batch_sampler
            self._left.__class__ = LeftOver
        return loader

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        ends = self.model.training and self.accelerator.gradient_state.end_of_dataloader  # dev data are read, too
        if ends and self._left is not None and self._left.missing:
            last = batch_samples[-1]
            batch_samples[-1] = {**last, "labels": torch.full_like(last["labels"], -100), NOTHING: True}
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nothing = inputs.pop(NOTHING, False)
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * 0 if nothing else loss
