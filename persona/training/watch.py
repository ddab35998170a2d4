"""What a training says about itself: rates, memory and waiting beside the loss, and the steps of its heartbeat.

`Watched` is a mixin over transformers' Trainer that measures, `Metrics` the callback that writes one row per logging
window to metrics.jsonl, and the same row to wandb:

    samples_per_second, tokens_per_second   over the window and all processes, evaluating and saving taken out; tokens
                                            that the base LM was given, padding aside (`padding`: its share)
    seconds_per_step
    data_wait                               share of the window in which the next batch was waited for, by the process
                                            that waited longest
    grad_norm                               of all gradients before they are clipped, in the window's last step
    memory_gb, memory_reserved_gb           GPU: the most that tensors took since the start, and what PyTorch holds;
                                            CPU: resident memory; of the process with the most
    mfu                                     model FLOPs utilisation, on GPUs that persona/gpus.py knows
    slowest_process, slowest_over_mean      with several processes: who took longest to load and to run forward, and
                                            how many times the mean

mfu = FLOPs per position · positions per second / (processes · peak). FLOPs are counted, in the first batch, of the
matrix products and attention that autograd really runs, forward and backward: a frozen weight has no gradient of its
own and passes one on only where something below it is trained. What gradient checkpointing computes again does not
count; padding does, attention as if it were not causal, and what a fused backward computes twice. The peak is that of
the precision the products run in.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import TrainerCallback

from persona import heartbeat
from persona.files import LineWriter, atomic_write, read_lines, write_json
from persona.gpus import peak, precision_of

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer

    from persona.training.trainer import TrainerConfig
else:
    _Trainer = object  # a mixin: it stands before the Trainer in the bases

# What is measured, and so differs from run to run, or (padding) when a run goes on within a window.
MEASURED = (
    *("samples_per_second", "tokens_per_second", "seconds_per_step", "data_wait", "memory_gb", "memory_reserved_gb"),
    *("padding", "mfu", "slowest_process", "slowest_over_mean"),
)

# ---- counting -------------------------------------------------------------------------------------------------------


class Flops(TorchDispatchMode):
    """Counts in `total` the floating-point operations of matrix products, convolutions and attention inside, forward
    and backward, by PyTorch's own formulas. A forward that runs again within a backward pass (gradient checkpointing)
    does not count. `known` is False once a formula did not take an operation: the total is then too low."""

    total, known = 0, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        # Within a backward pass gradients are enabled only for what is computed again.
        again = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
        if formula is not None and not again:
            if "scaled_dot_product" in func._overloadpacket.__name__:
                args = ungrouped(args, first=int("backward" in func._overloadpacket.__name__))
            try:
                self.total += formula(*args, **(kwargs or {}), out_val=result)
            except (AssertionError, TypeError, ValueError):  # shapes that an older PyTorch has no formula for
                self.known = False
        return result


def ungrouped(args: tuple, first: int) -> tuple:
    """An attention's arguments, of which query, key and value [B, heads, T, d] stand at `first` and behind it, with as
    many heads in key and value (which have a shape alone) as the query has: older PyTorch has no formula for fewer."""
    heads = args[first].shape[1]
    wide = (one.new_empty((one.shape[0], heads, *one.shape[2:]), device="meta") for one in args[first + 1 : first + 3])
    return (*args[: first + 1], *wide, *args[first + 3 :])


def positions(batch: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a batch that is [B, T] already, and its positions with padding; (0, 0) for a batch of another kind,
    whose rows `persona.lm.batch.assemble` counts when it pads them."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        return int(mask.sum()), mask.numel()
    ids = batch.get("input_ids")
    return (ids.numel(), ids.numel()) if isinstance(ids, Tensor) else (0, 0)


@dataclass
class _Window:
    """What this process has done since the last row; times in seconds."""

    started: float = field(default_factory=time.perf_counter)
    tokens: int = field(default_factory=lambda: heartbeat.now.tokens)  # as they stood at the start
    positions: int = field(default_factory=lambda: heartbeat.now.positions)
    steps: int = 0
    batches: int = 0
    waited: float = 0.0
    aside: float = 0.0
    forward: float = 0.0
    events: list[tuple[Any, Any]] = field(default_factory=list)

    def own(self) -> float:
        """Loading and running forward: the part of a step in which nobody is waited for."""
        # The loss has been read by now, so these events are over.
        return self.waited + self.forward + sum(one.elapsed_time(other) for one, other in self.events) / 1000


class Watched(_Trainer):
    """Mixin for a Trainer: measures its windows, and says where it is. Costs no synchronisation with a GPU."""

    _window: _Window | None = None
    _flops_per_position = 0.0

    @property
    def window(self) -> _Window:
        if self._window is None:
            self._window = _Window()
        return self._window

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        window = self.window

        def timed() -> Iterator[Any]:
            while True:
                since = time.perf_counter()
                try:
                    with heartbeat.phase("loading data"):
                        batch = next(epoch_iterator)
                except StopIteration:
                    return
                finally:
                    window.waited += time.perf_counter() - since
                heartbeat.counted(*positions(batch))
                window.batches += 1
                yield batch

        return super().get_batch_samples(timed(), num_batches, device)

    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(heartbeat.phase("forward"))
        if self.model.training:
            stack.enter_context(self._forward())
        return stack

    @contextmanager
    def _forward(self) -> Iterator[None]:
        window = self.window
        if self.args.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            window.events.append((start, end))
            return
        since = time.perf_counter()
        yield
        window.forward += time.perf_counter() - since

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        with heartbeat.phase("backward"):  # but for the forward inside
            if self._flops_per_position or not self.peak:
                return super().training_step(model, inputs, num_items_in_batch)
            seen = heartbeat.now.positions
            with Flops() as flops:
                loss = super().training_step(model, inputs, num_items_in_batch)
            count = positions(inputs)[1] or heartbeat.now.positions - seen
            if flops.known and count:
                self._flops_per_position = flops.total / count
            else:
                self.peak = None  # not counted again, and no utilisation
            return loss

    @cached_property
    def peak(self) -> float | None:
        """Operations a second that this process's GPU could do; None where that is not known, as on a CPU."""
        if self.args.device.type != "cuda":
            return None
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.model.parameters():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        dtype = torch.bfloat16 if self.args.bf16 else max(sizes, key=lambda dtype: sizes[dtype])
        return peak(torch.cuda.get_device_name(self.args.device), precision_of(dtype))

    @contextmanager
    def _beside(self, name: str) -> Iterator[None]:
        """Work that is no training: neither its time nor its tokens count."""
        window, since = self.window, time.perf_counter()
        tokens, seen = heartbeat.now.tokens, heartbeat.now.positions
        with heartbeat.phase(name):
            yield
        window.aside += time.perf_counter() - since
        window.tokens += heartbeat.now.tokens - tokens
        window.positions += heartbeat.now.positions - seen

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._beside("evaluating"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._beside("saving"):
            super()._save_checkpoint(*args, **kwargs)

    def measured(self) -> dict[str, float]:
        """What the window since the last call gave, over all processes, which have to call it together."""
        window, self._window = self.window, _Window()
        seconds = time.perf_counter() - window.started - window.aside
        if not window.steps or seconds <= 0:
            return {}
        device = self.args.device
        on_gpu = device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
        mine = [
            heartbeat.now.tokens - window.tokens,
            heartbeat.now.positions - window.positions,
            window.batches * self.args.train_batch_size,
            window.waited,
            window.own(),
            memory,
            torch.cuda.max_memory_reserved(device) if on_gpu else 0,
        ]
        every = self.accelerator.gather(torch.tensor([mine], dtype=torch.float64, device=device)).cpu()
        tokens, seen, samples, waited, own, memory, reserved = every.T
        values = {
            "samples_per_second": float(samples.sum()) / seconds,
            "seconds_per_step": seconds / window.steps,
            "data_wait": min(1.0, float(waited.max()) / seconds),
            "memory_gb": float(memory.max()) / 1e9,
        }
        if on_gpu:
            values["memory_reserved_gb"] = float(reserved.max()) / 1e9
        if seen.sum():
            values["tokens_per_second"] = float(tokens.sum()) / seconds
            values["padding"] = 1 - float(tokens.sum() / seen.sum())
        if self._flops_per_position and self.peak:
            rate = self._flops_per_position * float(seen.sum()) / seconds
            values["mfu"] = rate / (len(every) * self.peak)
        if len(every) > 1:
            values["slowest_process"] = int(own.argmax())
            values["slowest_over_mean"] = float(own.max() / own.mean())
        return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}


# ---- writing --------------------------------------------------------------------------------------------------------


class Metrics(TrainerCallback):
    """Appends every logged value to `out`/metrics.jsonl, and to wandb; after a resume, lines of the file beyond the
    checkpoint are dropped."""

    def __init__(self, trainer: Any, config: TrainerConfig, out: Path):
        self.trainer, self.config, self.out = trainer, config, out
        self.path = out / "metrics.jsonl"
        self.writer: LineWriter | None = None  # of rank zero
        self.wandb: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        heartbeat.moved(state.global_step, state.max_steps)
        if not state.is_world_process_zero:
            return
        # The summary that closed an interrupted run goes too: the run is not over.
        rows = read_lines(self.path)
        kept = [row for row in rows if 0 < row["step"] <= state.global_step and "train_runtime" not in row]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.writer = LineWriter(self.path)
        if self.config.wandb != "disabled":
            self.wandb = start_wandb(self.config, self.out, goes_on=state.global_step > 0)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.window.steps += 1
        heartbeat.moved(state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs:
            return
        measured = self.trainer.measured() if "loss" in logs else {}  # all processes take part
        if self.writer is None:
            return
        row = {"step": state.global_step, **logs, "epoch": round(state.epoch or 0, 4), **measured}
        row.pop("train_loss", None)  # a mean over the steps since the last start, which after a resume says nothing
        self.writer.write(json.dumps(row).encode() + b"\n")
        if self.wandb is not None:
            self.wandb.log(row)

    def close(self) -> None:
        """The wandb run ends with the training, so that the next stage's has one of its own."""
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(config: TrainerConfig, out: Path, goes_on: bool) -> Any:
    """A wandb run with the keys of metrics.jsonl, over `step`; in `out`/wandb unless the environment says otherwise.

    A training that `goes_on` from a checkpoint goes on in the run whose id is in `out`/wandb.json. Offline every start
    leaves a folder of its own, all with that id: `wandb sync` makes one run of them.
    Its configuration is the run's config.yaml, which holds no key or password: those are read from the environment.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    # A stage trains below its run's folder: the run is where state.json is.
    files = [folder / "config.yaml" for folder in (out, *out.parents) if (folder / "state.json").is_file()][:1]
    whole = yaml.safe_load(files[0].read_text()) if files and files[0].is_file() else {"trainer": asdict(config)}
    path = out / "wandb.json"
    known = json.loads(path.read_text())["id"] if goes_on and path.is_file() else None
    run = wandb.init(
        id=known,
        resume="allow",
        project=os.environ.get("WANDB_PROJECT", "persona"),
        name=out.name,
        dir=os.environ.get("WANDB_DIR", str(out)),
        mode=os.environ.get("WANDB_MODE", config.wandb),
        config=whole,
    )
    if run.id != known:
        write_json(path, {"id": run.id})
    run.define_metric("*", step_metric="step")
    return run
