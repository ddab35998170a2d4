"""A plan, and how it is printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hydra.core.hydra_config import HydraConfig
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from persona.config.rates import CARDS, PlanRates
from persona.gpus import peak
from persona.plan.backends import BUCKET, LIVE, Memory, Part
from persona.plan.costs import FITS, RNG, Cost, Load, cheapest, enough, quickest
from persona.plan.sizes import DataSize
from persona.plan.stages import Texts, Work

ACCOUNTING = (
    "a GPU fits when its sum is at most 95 % of its memory (CUDA context, fragments)",
    "single, ddp: weights as loaded (+ bf16 copies of fp32 ones under autocast), AdamW 2 states, DDP's buckets; fsdp2 "
    "divides all of them and gathers two blocks at a time",
    "zero1, zero2, zero3: weights and gradients in the training precision, AdamW 12 bytes per trained parameter / "
    "GPUs; zero2 divides gradients, zero3 weights; DeepSpeed's buffer of "
    f"{BUCKET / 1e6:.0f} million elements, at zero3 up to {LIVE / 1e6:,.0f} million gathered weights",
    "sent of B bytes on n GPUs: all-reduce 2 (n-1)/n B, all-gather and reduce-scatter (n-1)/n B; of several nodes "
    "first inside, then between them",
    "ddp all-reduces the trained gradients; zero1 and zero2 too (zero2 after every forward), and all-gather the "
    "trained weights; zero3 and fsdp2 all-gather all weights, frozen ones too, in every forward and backward pass "
    "(zero3 once those that it keeps), and reduce-scatter the trained gradients",
    "computing: operations at the assumed rate, or all weights read from memory twice a forward, whichever is longer",
)


@dataclass(frozen=True)
class Plan:
    """What a run would need: its trainings, each with its costs under every back end (on one GPU first), the stages
    of methods that have them, and for a method that trains nothing what one copy of the LM holds."""

    title: str
    rates: PlanRates
    trainings: list[tuple[Load, list[Cost]]]
    notes: list[str]
    save_every: float = 0.25
    data: DataSize | None = None
    stages: Work | None = None
    held: Memory | None = None
    parts: list[Part] = field(default_factory=list)
    hours: Callable[[Texts], float] | None = None

    @property
    def heaviest(self) -> tuple[Load, list[Cost]]:
        """The training that holds the most on one GPU."""
        return max(self.trainings, key=lambda training: training[1][0].memory.total)

    def print(self, console: Console | None = None) -> None:
        """The tables, to the terminal."""
        (console or Console()).print(self.tables())

    def tables(self) -> Group:
        """For each training parameters, memory per GPU, steps, and what to launch; stages; notes; as a rich thing."""
        shown: list[RenderableType] = []
        for load, costs in self.trainings:
            shown += [_parts(load.title, load.parts), _memory(costs, self.rates), _steps(load, costs)]
            shown += [Text(line) for line in [_work(load, costs[-1]), *self._saving(load, costs[-1]), ""]]
            shown += [*map(Text, self._advice(load, costs)), Text("")]
        if self.held:
            shown += [_parts(self.title, self.parts), Text(self._copy(self.held)), Text("")]
        if self.data:
            shown += [Text(line) for line in _lengths(self.data)]
        if self.stages:
            shown.append(self._stages(self.stages))
        return Group(*shown, Text("\n".join(f"- {note}" for note in self.notes), style="dim"))

    # ---- parts of the page ---------------------------------------------------------------------------------------

    def _saving(self, load: Load, last: Cost) -> list[str]:
        size = load.checkpoint + RNG * last.gpus
        seconds = size / (self.rates.disk * 1e9)
        times = math.ceil(last.steps / self._every(last.steps))
        return [
            f"a checkpoint: {_gb(size)} GB (weights 4, AdamW 8 bytes per trained parameter, random states), "
            f"{seconds:,.1f} s at {self.rates.disk:g} GB/s; {times} in a run"
        ]

    def _every(self, steps: int) -> int:
        return max(1, math.ceil(steps * self.save_every) if self.save_every < 1 else int(self.save_every))

    def _advice(self, load: Load, costs: list[Cost]) -> list[str]:
        best, first = cheapest(costs), quickest(costs)
        card = f"{self.rates.gpu} ({CARDS[self.rates.gpu].memory:g} GB)"
        if best is None or first is None:
            last = costs[-1]
            found = enough(load, last.nodes, last.gpus, self.rates)
            if found is None:
                held = [min(getattr(one.memory, name) for one in costs) for name in ("activations", "logits")]
                return [
                    f"nothing fits {card}, on 256 GPUs neither: activations and logits alone take "
                    f"{_gib(sum(held))} GiB; lower the batch, or trainer.gradient_checkpointing=true"
                ]
            return [f"nothing fits {card}; what would: {_hours(found)}", f"    {command(load, found)}"]
        lines = [f"cheapest that fits {card}: {_hours(best)}", f"    {command(load, best)}"]
        if first is not best:
            lines += [f"soonest done: {_hours(first)}", f"    {command(load, first)}"]
        return lines

    def _copy(self, held: Memory) -> str:
        room = FITS * CARDS[self.rates.gpu].memory * 1e9
        fits = (
            "fits" if held.total <= room else f"needs {math.ceil(held.total / room)} GPUs (model.device_map=auto) of"
        )
        return (
            f"a process: {_gib(held.weights)} GiB of weights and {_gib(held.activations)} GiB of keys and values, "
            f"{fits} {self.rates.gpu}"
        )

    def _stages(self, work: Work) -> Table:
        todo = Table("stage", "what", "by", title="stages, at most", title_justify="left")
        for name in ("count", "tokens each", "tokens", "GPU-hours"):
            todo.add_column(name, justify="right")
        for text in work.texts:
            verb = "read by " if text.read else ""
            hours = f"{self.hours(text):,.1f}" if self.hours and text.own else ""
            todo.add_row(text.stage, text.what, verb + text.by, *_product(text.count, text.tokens), hours)
        known = {load.title.rpartition("stage ")[2]: costs for load, costs in self.trainings}
        for training in work.trainings:
            best = cheapest(known[training.stage])
            hours = f"{best.gpu_hours:,.1f}" if best else ""
            each = training.rows * training.length
            todo.add_row(training.stage, training.what, "trained on", *_product(training.count, each), hours)
        return todo


def _parts(title: str, parts: Sequence[Part]) -> Table:
    sizes = Table("part", "parameters", "trained", title=title, title_justify="left")
    for part in parts:
        sizes.add_row(part.name, f"{part.parameters:,}", "yes" if part.trainable else "frozen")
    sizes.add_section()
    total, trained = sum(part.parameters for part in parts), sum(part.parameters for part in parts if part.trainable)
    sizes.add_row("total", f"{total:,}", f"{trained:,} ({100 * trained / total:.2f} %)")
    return sizes


def _memory(costs: Sequence[Cost], rates: PlanRates) -> Table:
    names = ("weights", "gradients", "optimizer", "buffers", "activations", "logits")
    needs = Table("launch", "GPUs", title="GiB per GPU", title_justify="left")
    for name in (*names, "sum", f"fits {rates.gpu}"):
        needs.add_column(name, justify="right")
    for one in costs:
        values = [_gib(getattr(one.memory, name)) for name in (*names, "total")]
        needs.add_row(one.backend.launch, str(one.gpus), *values, "yes" if one.fits else "NO")
    return needs


def _steps(load: Load, costs: Sequence[Cost]) -> Table:
    rate = (peak(costs[0].card, "bf16" if load.bf16 else "fp32") or 0) / 1e12
    title = f"a step, at {100 * costs[0].utilisation:g} % of {rate:g} TFLOP/s"
    work = Table("launch", "GPUs", title=title, title_justify="left")
    for name in (
        *("GB sent in a node", "between nodes", "s computing", "s communicating", "samples/s", "tokens/s"),
        "GPU-hours",
    ):
        work.add_column(name, justify="right")
    for one in costs:
        spans = [
            _span(one.global_batch / one.slowest, one.global_batch / one.fastest),
            _span(one.tokens_per_step / one.slowest, one.tokens_per_step / one.fastest),
        ]
        sent = [_gb(one.in_node), _gb(one.between) if one.nodes > 1 else ""]
        seconds = [_short(one.compute), _short(one.communication)]
        work.add_row(one.backend.launch, str(one.gpus), *sent, *seconds, *spans, _short(one.gpu_hours))
    return work


def _work(load: Load, last: Cost) -> str:
    return (
        f"{load.samples:,} samples per epoch, {last.global_batch:,} samples and {last.tokens_per_step:,} tokens a "
        f"step, {last.steps:,} steps ({last.steps_per_epoch:,} per epoch)"
    )


def command(load: Load, cost: Cost) -> str:
    """The command that is planned for, with the launch it is to have and the same global batch. Without Hydra (a
    plan from Python) it says the launch alone."""
    asked = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    kept = [f"'{item}'" if set(item) & set(" {}[]*") else item for item in asked if not _planned(item)]
    launch = [f"launch={cost.backend.launch}"]
    if cost.gpus > 1:
        launch.append(f"launch.num_processes={cost.gpus}")
    if cost.nodes > 1:
        launch.append(f"launch.num_machines={cost.nodes}")
    if cost.accumulation != load.accumulation:
        kept = [item for item in kept if not item.startswith("trainer.gradient_accumulation=")]
        launch.append(f"trainer.gradient_accumulation={cost.accumulation}")
    return " ".join(["python train.py", *kept, *launch])


def _planned(override: str) -> bool:
    return override.startswith(("plan", "launch"))


def _hours(cost: Cost) -> str:
    days = cost.steps * cost.slowest / 3600
    return f"{_short(cost.gpu_hours)} GPU-hours in {_short(days)} hours on {cost.gpus} GPU{'s' * (cost.gpus > 1)}"


def _product(count: int, each: int) -> tuple[str, str, str]:
    return f"{count:,}", f"{each:,}", f"{count * each:,}"


def _lengths(size: DataSize) -> list[str]:
    told = [
        f"{name}: {mean:.0f} on average, {longest} in the memory estimate"
        for name, mean, longest in (
            ("prompt tokens", size.prompt_mean, size.prompt_longest),
            ("reply tokens", size.reply_mean, size.reply_longest),
        )
    ]
    if size.history_longest:
        told.append(f"items in a history: {size.history_mean:.0f} on average, {size.history_longest} at most")
    return told


def _span(low: float, high: float) -> str:
    return _short(low) if _short(low) == _short(high) else f"{_short(low)} to {_short(high)}"


def _short(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def _gb(size: int) -> str:
    return _short(size / 1e9)
