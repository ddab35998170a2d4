"""What `plan=true` says beside what two processes really hold, send, compute and write, on the CPU.

    python benchmarks/plan_check.py                       # every run of RUNS under every back end, about 15 minutes
    python benchmarks/plan_check.py --only LoRA --launches single zero2

Each run is a short training of its own in processes of its own. Held: bytes of live tensors, found through Python's
garbage collector; DDP's buckets from its own log. Sent: arguments of torch.distributed's collectives, and DDP's
buckets through a communication hook. Computed: PyTorch's FlopCounterMode around a training step of one process.
Seconds: a step beside those operations at the rate of a matrix product of 1024³, measured in the same process.
Written: files of a checkpoint. Printed is predicted / measured: for bytes one figure (they do not vary), else mean and
95 % interval.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train.py

from persona.config import load_config
from persona.config.launch import start, started, take_back_end
from persona.plan import plan
from persona.plan.backends import BUCKET

SMALL = ["data.train=8", "data.dev=2", "data.test=1", "trainer.wandb=disabled", "trainer.workers=0"]
SHORT = ["trainer.eval_every=1000"]
LORA = ["method=finetune_lora", *SMALL, *SHORT, "trainer.batch_size=1"]
FUSE = ["experiment=town_persona_fuse", "trainer.wandb=disabled", "trainer.max_grad_norm=0", *SHORT]
ALL = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
RUNS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "LoRA": (ALL, LORA),
    "LoRA, batches of 32": (("single",), [*LORA[:-1], "trainer.batch_size=32"]),
    "LoRA, 3 accumulated": (ALL[1:], [*LORA, "trainer.gradient_accumulation=3"]),
    "LoRA, recomputed": (("single", "zero3", "fsdp2"), [*LORA, "trainer.gradient_checkpointing=true"]),
    "LoRA, bf16": (("zero1", "zero2", "zero3", "fsdp2"), [*LORA, "trainer.precision=bf16"]),
    "fully": (
        ("single", "ddp", "zero2", "zero3", "fsdp2"),
        ["method=finetune_full", *SMALL, *SHORT, "trainer.batch_size=1"],
    ),
    "Persona-Plug": (
        ("single", "ddp", "zero3", "fsdp2"),
        ["method=persona_plug", *SMALL, *SHORT, "trainer.batch_size=1"],
    ),
    "PersonaFuse, warm-up": (("single", "zero3"), [*FUSE, "method.skip=[router,joint]", "method.warmup.batch_size=1"]),
    "PersonaFuse, joint": (("single", "zero3"), [*FUSE, "method.skip=[warmup,router]", "method.joint.batch_size=2"]),
}
STEADY = 4  # the first steps, in which states are made, are left out
LOOK = 8  # the step after which it is looked what is held

# ---- in each process -----------------------------------------------------------------------------------------------

sent: Counter[str] = Counter()
peeks: list[Any] = []  # called at every collective, while there are any


def count_collectives() -> None:
    """Wraps torch.distributed's collectives before anybody has taken hold of them."""
    sizes = {
        "all_reduce": ("reduced", lambda tensor, *_: nbytes(tensor)),
        "all_gather": ("gathered", lambda outputs, *_: sum(map(nbytes, outputs))),
        "all_gather_into_tensor": ("gathered", lambda output, *_: nbytes(output)),
        "all_gather_single": ("gathered", lambda output, *_: nbytes(output)),
        "reduce_scatter_single": ("scattered", lambda output, given, *_: nbytes(given)),
        "reduce_scatter_tensor": ("scattered", lambda output, given, *_: nbytes(given)),
        "reduce_scatter": ("scattered", lambda output, given, *_: sum(map(nbytes, given))),
        "reduce": ("scattered", lambda tensor, *_: nbytes(tensor)),
        "broadcast": ("broadcast", lambda tensor, *_: nbytes(tensor)),
    }
    for name, (kind, size) in sizes.items():
        plain = getattr(torch.distributed, name)

        def counted(*args: Any, _plain=plain, _kind=kind, _size=size, **kwargs: Any) -> Any:
            first = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor | list)]
            sent[_kind] += _size(*first)
            for peek in peeks:
                peek(_kind)
            return _plain(*args, **kwargs)

        setattr(torch.distributed, name, counted)


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def storages(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    """Bytes by storage; of what FSDP2 divides, this process's part."""
    found = {}
    for tensor in tensors:
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and not tensor.is_meta
            and tensor.layout == torch.strided
        ):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def alive() -> dict[int, int]:
    gc.collect()
    return storages(x for x in gc.get_objects() if isinstance(x, torch.Tensor))


class Watch:
    """What one process holds and does, step by step."""

    def __init__(self, flops: bool) -> None:
        self.flops = flops
        self.rows: list[dict[str, float]] = []
        self.before: dict[int, int] = {}
        self.held: dict[str, int] = {}
        self.buffers = self.gathered = self.whole = 0

    def step(self, plain, trainer, model, inputs, items=None):
        micro = trainer.accelerator.gradient_state.sync_gradients
        number = trainer.state.global_step
        if number == LOOK and not self.before:
            self.before = alive()
            peeks.append(lambda kind: self.peek(model, kind))
        counting = self.flops and number % 2
        counter = FlopCounterMode(display=False) if counting else nullcontext()
        sent.clear()
        began = time.perf_counter()
        with counter:
            loss = plain(trainer, model, inputs, items)
        seconds = time.perf_counter() - began
        if number == LOOK:
            self.peek(model, "")
        if number >= STEADY:
            if number == LOOK and not trainer.is_deepspeed_enabled and micro:
                self.look(trainer.model, trainer.optimizer)
            what = {"flops": counter.get_total_flops()} if counting else {"seconds": seconds}
            self.rows.append({**what, "step": number, **sent})
        return loss

    def peek(self, model: torch.nn.Module, kind: str) -> None:
        """While weights and gradients are sent, and between forwards: what is as large as DeepSpeed's buffer, blocks
        that FSDP2 has gathered, gradients that are still whole; the most that there is of each."""
        # ZeRO-3 gathers every tensor by itself, which is too often to look at all that is alive.
        large = {key: size for key, size in alive().items() if size >= 2 * BUCKET} if kind != "gathered" else {}
        self.buffers = max(self.buffers, sum(large.values()))
        grads = storages(p.grad for p in model.parameters() if p.grad is not None)
        self.whole = max(self.whole, sum(size for size in grads.values() if size < 2 * BUCKET))
        states = [part._get_fsdp_state() for part in model.modules() if isinstance(part, FSDPModule)]
        divided = [one for state in states for group in state._fsdp_param_groups for one in group.fsdp_params]
        made = storages(tensor for one in divided for tensor in one.all_gather_outputs)
        self.gathered = max(self.gathered, sum(made.values()))

    def look(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Just before an optimizer step: gradients are what is alive and was not before the forward."""
        now = alive()
        parameters = list(model.parameters())
        weights = storages(getattr(p, "ds_tensor", p) for p in parameters)
        gathered = storages(p for p in parameters if hasattr(p, "ds_tensor"))  # nothing where they are let go
        inner = getattr(optimizer, "optimizer", optimizer)
        inner = getattr(inner, "optimizer", inner)
        states = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            states += getattr(optimizer, name, [])
        peeks.clear()
        held = storages(iter(states))
        grads = storages(p.grad for p in parameters if p.grad is not None)
        if hasattr(optimizer, "grad_partitions_flat_buffer"):
            grads.update(storages(iter([optimizer.grad_partitions_flat_buffer])))
        new = {key: size for key, size in now.items() if key not in self.before and key not in {**weights, **held}}
        beside = storages(x for x in gc.get_objects() if isinstance(x, torch.nn.Parameter) and not hasattr(x, "ds_id"))
        weights = {**weights, **{key: size for key, size in beside.items() if key not in {**held, **gathered}}}
        self.held = {
            "weights": sum(weights.values()),
            "optimizer": sum(size for key, size in held.items() if key not in weights),
            "gradients": max(self.whole, sum({**new, **grads}.values())),
            "buffers": self.buffers
            + self.gathered
            + sum(size for key, size in gathered.items() if key not in weights),
        }


def worker(name: str, launch: str, folder: Path) -> None:
    """One process of a run; writes what it saw to `folder`/<rank>.json."""
    count_collectives()
    steps = 40 if launch == "single" else LOOK + 3
    given = [f"trainer.max_steps={steps}", f"trainer.save_every={steps}", "trainer.cpu=true", f"launch={launch}"]
    cfg = load_config("train", [*RUNS[name][1], *given, f"output={folder / 'run'}"])
    if started():
        take_back_end(cfg.launch)
    import train as script
    from persona.training import trainer as training

    watch = Watch(flops=launch == "single")
    plain = training.OwnTrainer.training_step
    training.OwnTrainer.training_step = lambda *args: watch.step(plain, *args)  # type: ignore[method-assign]
    if launch.startswith("zero"):
        from deepspeed.runtime.engine import DeepSpeedEngine

        advance = DeepSpeedEngine.step

        def step(engine, *args, **kwargs):
            if engine.global_steps == LOOK and engine.is_gradient_accumulation_boundary():
                watch.look(engine.module, engine.optimizer)
            return advance(engine, *args, **kwargs)

        DeepSpeedEngine.step = step
    if launch == "ddp":
        from torch.nn.parallel import DistributedDataParallel as DDP

        make = DDP.__init__

        def init(module, *args, **kwargs):
            make(module, *args, **kwargs)

            def reduce(group, bucket):
                return (
                    torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
                    .get_future()
                    .then(lambda future: future.value()[0])
                )

            module.register_comm_hook(None, reduce)
            watch.ddp = module

        DDP.__init__ = init
    script.train(cfg)
    # A method of stages removes its checkpoints when a stage is done.
    saved = sorted((folder / "run").rglob("checkpoint-*"))[-1:]
    files = {str(f.relative_to(last)): f.stat().st_size for last in saved for f in last.rglob("*") if f.is_file()}
    if launch == "ddp":
        watch.held["buffers"] = sum(map(int, watch.ddp._get_ddp_logging_data()["bucket_sizes"].split(",")))
    made = {"rows": watch.rows, "held": watch.held, "files": files, "rate": product_rate()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (folder / f"{rank}.json").write_text(json.dumps(made))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def product_rate(size: int = 1024, times: int = 8) -> float:
    """Operations a second of a product of square matrices in float32, the median of `times`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        a @ b
        found.append(2 * size**3 / (time.perf_counter() - began))
    return float(np.median(found))


# ---- beside the plan -----------------------------------------------------------------------------------------------


def interval(predicted: float, values: list[float]) -> str:
    """predicted / mean of `values`, and where they vary its 95 % interval from that of the mean."""
    mean = float(np.mean(values))
    if not mean:
        return "nothing there"
    if len(values) < 2 or np.ptp(values) < 1e-9 * abs(mean):
        return f"{predicted / mean:.3f}"
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{predicted / mean:.3f} ({predicted / (mean + half):.3f} to {predicted / (mean - half):.3f})"


def compare(name: str, launch: str, seen: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the table: run, launch, quantity, predicted, measured, ratio."""
    cfg = load_config("train", [*RUNS[name][1], f"launch.num_processes={len(seen)}"])
    load, costs = plan(cfg).heaviest
    (cost,) = [one for one in costs if one.backend.launch == launch]
    rows: list[list[str]] = []

    def row(what: str, predicted: float, measured: list[float]) -> None:
        value = float(np.mean(measured))
        if not predicted and not value:
            return
        ratio = interval(predicted, measured)
        rows.append([name, launch, what, f"{predicted:,.4g}", f"{value:,.4g}", ratio])

    for what in ("weights", "gradients", "optimizer", "buffers"):
        row(f"{what}, bytes", getattr(cost.memory, what), [one["held"].get(what, 0) for one in seen])
    for what in ("reduced", "gathered", "scattered"):
        steps = Counter()
        for one in seen[0]["rows"]:
            steps[one["step"]] += one.get(what, 0)
        if steps and len(seen) > 1:
            row(f"{what} a step, bytes", getattr(cost.traffic, what), list(steps.values()))
    if launch == "single":
        flops = [one["flops"] for one in seen[0]["rows"] if "flops" in one]
        row("operations a forward", load.flops * load.batch, flops)
        seconds = [one["seconds"] for one in seen[0]["rows"] if "seconds" in one]
        row("seconds a forward", float(np.mean(flops)) / seen[0]["rate"], seconds)
    files = seen[0]["files"]
    known = sum(
        size for file, size in files.items() if file.endswith((".safetensors", ".json", ".pt", ".bin", ".pth"))
    )
    if files:
        row("checkpoint, bytes", load.checkpoint + 15_600 * len(seen), [known])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--launches", nargs="*", choices=ALL, default=ALL)
    parser.add_argument("--worker", nargs=3)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], args.worker[1], Path(args.worker[2]))
    print("| run | launch | | predicted | measured | predicted / measured |\n|---|---|---|---|---|---|")
    for name in args.only:
        for launch in [one for one in RUNS[name][0] if one in args.launches]:
            folder = Path(tempfile.mkdtemp())
            launched = load_config("train", [f"launch={launch}"]).launch
            launched.num_processes = 1 if launch == "single" else 2
            command = [sys.executable, __file__, "--worker", name, launch, str(folder)]
            status = start(launched, command, cpu=True)
            seen = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]
            if status or not seen:
                print(f"| {name} | {launch} | ended with status {status} | | | |", flush=True)
            else:
                for row in compare(name, launch, seen):
                    print("| " + " | ".join(row) + " |", flush=True)
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
