"""What a training costs under each back end: seconds, samples, GPU-hours, checkpoints, by the rates that are given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from persona.config.rates import CARDS, PlanRates
from persona.errors import UserError
from persona.gpus import peak
from persona.plan.backends import BACKENDS, SINGLE, Backend, Memory, Part, Traffic, memory, traffic

FITS = 0.95  # of a card's memory: the rest is the CUDA context and what fragments
# Random states of one process: torch's 5,056 bytes, numpy's 624 words and Python's 625 of 8 bytes, headers, JSON.
RNG = 15_600


@dataclass(frozen=True)
class Load:
    """One training, as the plan sees it. Of a forward of `batch` samples per GPU: bytes of `activations` and `logits`.
    Of one sample: `flops`, forward and backward and what is recomputed, and `tokens`. `samples` are those of an
    epoch; `steps` overrides epochs where it is above 0."""

    title: str
    parts: list[Part]
    activations: int
    logits: int
    flops: float
    tokens: float
    samples: int
    epochs: float
    batch: int
    accumulation: int
    bf16: bool
    steps: int = 0

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def trainable(self) -> int:
        return sum(part.parameters for part in self.parts if part.trainable)

    @property
    def checkpoint(self) -> int:
        """Bytes of the trained weights and AdamW's two states of them, in float32; `RNG` comes on top per process."""
        return 12 * self.trainable


@dataclass(frozen=True)
class Cost:
    """One training under one back end on `gpus` GPUs (`card` at `utilisation`) of `nodes` nodes. Seconds are those
    of an optimizer step: it takes between `fastest` (communication hides behind computing) and `slowest` (it never
    does)."""

    backend: Backend
    card: str
    utilisation: float
    nodes: int
    gpus: int
    accumulation: int
    memory: Memory
    traffic: Traffic
    global_batch: int
    steps_per_epoch: int
    steps: int
    tokens_per_step: int
    compute: float
    communication: float
    fits: bool

    @property
    def in_node(self) -> int:
        """Bytes that a GPU sends to others of its node in a step."""
        return self.traffic.sent(self.gpus // self.nodes)

    @property
    def between(self) -> int:
        """Bytes that a node sends to others in a step."""
        return self.traffic.sent(self.nodes)

    @property
    def fastest(self) -> float:
        return max(self.compute, self.communication)

    @property
    def slowest(self) -> float:
        return self.compute + self.communication

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.steps * self.slowest / 3600


def operations(rates: PlanRates, bf16: bool) -> float:
    """Operations a second that one GPU is taken to reach. Raises UserError for a utilisation that cannot be."""
    if not 0 < rates.utilisation <= 1:
        raise UserError(f"plan_rates.utilisation={rates.utilisation} should be above 0 and at most 1")
    rate = peak(rates.gpu, "bf16" if bf16 else "fp32")
    assert rate is not None, rates.gpu  # every card of CARDS has one (tests/test_plan_costs.py)
    return rate * rates.utilisation


def cost(load: Load, backend: Backend, nodes: int, gpus: int, accumulation: int, rates: PlanRates) -> Cost:
    """`load` on `gpus` GPUs in all. A collective over several nodes goes inside them first, then between them."""
    card = CARDS[rates.gpu]
    held = memory(backend, gpus, load.parts, load.bf16, accumulation, load.activations, load.logits)
    moved = traffic(backend, gpus, load.parts, load.bf16, accumulation)
    each = load.batch * gpus
    per_epoch = math.ceil(math.ceil(load.samples / each) / accumulation)
    products = load.flops * load.batch / operations(rates, load.bf16)
    # However few the tokens are, all weights come from memory for the forward and once more for the backward pass.
    narrow = 2 if load.bf16 else 4
    reading = (
        2 * sum(part.parameters * min(narrow, part.bytes_each) for part in load.parts if part.used) / (card.read * 1e9)
    )
    seconds = moved.sent(gpus // nodes) / ((rates.intra or card.link) * 1e9) + moved.sent(nodes) / (rates.inter * 1e9)
    return Cost(
        backend=backend,
        card=rates.gpu,
        utilisation=rates.utilisation,
        nodes=nodes,
        gpus=gpus,
        accumulation=accumulation,
        memory=held,
        traffic=moved,
        global_batch=each * accumulation,
        steps_per_epoch=per_epoch,
        steps=load.steps or math.ceil(load.epochs * per_epoch),
        tokens_per_step=round(each * accumulation * load.tokens),
        compute=max(products, reading) * accumulation,
        communication=seconds,
        fits=held.total <= FITS * card.memory * 1e9,
    )


def costs(load: Load, nodes: int, gpus: int, rates: PlanRates) -> list[Cost]:
    """On one GPU (accumulating until the global batch is the same), and on all of them under every back end.

    Raises UserError where the GPUs cannot be spread evenly over the nodes.
    """
    if gpus % nodes:
        raise UserError(
            f"launch.num_processes={gpus} has to be a multiple of launch.num_machines={nodes}, so "
            "that every machine has as many"
        )
    alone = cost(load, SINGLE, 1, 1, load.accumulation * gpus, rates)
    if gpus == 1:
        return [alone]
    return [alone, *(cost(load, backend, nodes, gpus, load.accumulation, rates) for backend in BACKENDS)]


def cheapest(found: list[Cost]) -> Cost | None:
    """Of those that fit the one with the fewest GPU-hours, the first in the list of equal ones."""
    return min((one for one in found if one.fits), key=lambda one: one.gpu_hours, default=None)


def quickest(found: list[Cost]) -> Cost | None:
    """Of those that fit the one that is done first."""
    return min((one for one in found if one.fits), key=lambda one: one.steps * one.slowest, default=None)


def enough(load: Load, nodes: int, gpus: int, rates: PlanRates, most: int = 256) -> Cost | None:
    """Where nothing fits: what does on the smallest number of GPUs, doubled at a time up to `most`; a node grows to 8
    GPUs, then there are more nodes."""
    size = gpus // nodes
    while 2 * nodes * size <= most:
        size, nodes = (2 * size, nodes) if 2 * size <= 8 else (size, 2 * nodes)
        if found := cheapest(costs(load, nodes, nodes * size, rates)):
            return found
    return None


def generation_hours(
    count: int, tokens: int, read: bool, parameters: int, weights: int, batch: int, bf16: bool, rates: PlanRates
) -> float:
    """GPU-hours of `count` texts of `tokens` tokens by an LM of `parameters` in `weights` bytes, `batch` at a time.

    What is read costs 2 operations per parameter and token; what is written also has the weights read from memory
    once for every token of a batch, at the card's rate, whichever is longer. Caches are not counted: at least so much.
    """
    each = 2 * parameters / operations(rates, bf16)
    if read:
        return count * tokens * each / 3600
    step = max(batch * each, weights / (CARDS[rates.gpu].read * 1e9))
    return math.ceil(count / batch) * tokens * step / 3600
