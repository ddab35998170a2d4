"""The back ends of configs/launch: what each GPU holds, and what travels between GPUs in one optimizer step.

Pure arithmetic. Sizes are bytes; a collective over n GPUs is counted as ring algorithms do it: of a tensor of B bytes
an all-gather or a reduce-scatter sends (n - 1) / n · B from every GPU, an all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# DeepSpeed's own defaults: reduce_bucket_size (elements that are reduced at a time; the buffer is there in full
# whatever the model's size), stage3_max_live_parameters (weights that stay gathered), and below which size
# (stage3_param_persistence_threshold) a tensor is not divided.
BUCKET = 500_000_000
LIVE = 1_000_000_000


@dataclass(frozen=True)
class Part:
    """A group of parameters. `bytes_each` as loaded; `sharded`: the back end sees it (a model beside the one that is
    trained it does not); `largest`: parameters of its largest block, which are gathered at a time; `used`: a forward
    reads it all."""

    name: str
    parameters: int
    trainable: bool
    bytes_each: int
    sharded: bool = True
    largest: int = 0
    used: bool = True


@dataclass(frozen=True)
class Backend:
    """`launch`: its name in configs/launch. What it divides over the GPUs, and whether DeepSpeed does it."""

    launch: str
    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
    deepspeed: bool = False


SINGLE = Backend("single")
BACKENDS = (
    Backend("ddp"),
    Backend("zero1", optimizer=True, deepspeed=True),
    Backend("zero2", optimizer=True, gradients=True, deepspeed=True),
    Backend("zero3", optimizer=True, gradients=True, weights=True, deepspeed=True),
    Backend("fsdp2", optimizer=True, gradients=True, weights=True),
)

# ---- memory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU. `buffers`: what the back end needs to communicate."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.logits


def memory(
    backend: Backend, gpus: int, parts: list[Part], bf16: bool, accumulation: int, activations: int, logits: int
) -> Memory:
    """Weights, gradients and AdamW's states of `parts`, and buffers.

    Every part keeps its own type (bf16 is autocast), and so do its gradients; without DeepSpeed autocast adds bf16
    copies of fp32 weights, and AdamW has two states of the weight's type. DDP has a bucket for every gradient; FSDP2
    trains float32 weights and holds two gathered blocks at a time. DeepSpeed holds 12 bytes per trained parameter for
    AdamW (fp32 weight, two states); its buffer takes BUCKET elements of the gradients' type, in bf16 at stage 3, which
    keeps up to LIVE weights gathered. ZeRO-1 and FSDP2 divide gradients once a step: accumulated ones are whole until
    then.
    """
    seen = [part for part in parts if part.sharded]
    own = sum(part.parameters * part.bytes_each for part in parts if not part.sharded)
    trained = sum(part.parameters for part in parts if part.trainable)
    if backend.deepspeed:
        managed = sum(part.parameters * part.bytes_each for part in seen)
        kept = min(managed, LIVE * managed // sum(part.parameters for part in seen)) if backend.weights else 0
        whole = sum(part.parameters * part.bytes_each for part in parts if part.trainable)
        widest = max((part.bytes_each for part in parts if part.trainable), default=4)
        return Memory(
            own + managed // (gpus if backend.weights else 1),
            whole // (gpus if backend.gradients or accumulation == 1 else 1),
            12 * trained // gpus,
            BUCKET * (2 if bf16 and backend.weights else widest) + kept,
            activations,
            logits,
        )
    if backend.weights and bf16:  # accelerate makes what is trained float32 before FSDP2 divides it
        parts = [replace(part, bytes_each=4) if part.trainable else part for part in parts]
        seen = [part for part in parts if part.sharded]
    weights = sum(part.parameters * part.bytes_each for part in seen)
    gradients = sum(part.parameters * part.bytes_each for part in parts if part.trainable)
    copies = sum(2 * part.parameters for part in seen if part.bytes_each == 4) if bf16 else 0
    if backend.weights:
        blocks = 2 * max((part.largest * (2 if bf16 else part.bytes_each) for part in seen), default=0)
        return Memory(
            own + weights // gpus,
            gradients // (gpus if accumulation == 1 else 1),
            2 * gradients // gpus,
            blocks,
            activations,
            logits,
        )
    return Memory(own + weights + copies, gradients, 2 * gradients, gradients if gpus > 1 else 0, activations, logits)


# ---- traffic -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that are all-reduced, all-gathered and reduce-scattered in one optimizer step."""

    reduced: int = 0
    gathered: int = 0
    scattered: int = 0

    def sent(self, ranks: int) -> int:
        """Bytes that one of `ranks` sends when all are alike: a GPU among those of a node, a node among nodes."""
        return (2 * self.reduced + self.gathered + self.scattered) * (ranks - 1) // ranks


def traffic(backend: Backend, gpus: int, parts: list[Part], bf16: bool, accumulation: int) -> Traffic:
    """What one optimizer step of `accumulation` forwards moves between `gpus` GPUs.

    DDP: one all-reduce of the trained parameters' gradients. ZeRO-1 and 2: an all-reduce of them (DeepSpeed's default,
    use_multi_rank_bucket_allreduce; at stage 2 after every forward) and an all-gather of the trained weights. ZeRO-3
    and FSDP2: an all-gather of all weights, the frozen base's included, for every forward and every backward pass, and
    a reduce-scatter of gradients (FSDP2: once a step). ZeRO-3 does not gather the LIVE weights again that it keeps at
    the end of a forward, or of a backward pass within the step.
    """
    if gpus == 1:
        return Traffic()
    each = 2 if bf16 else 4
    trained = sum(part.parameters for part in parts if part.trainable)
    if not backend.optimizer:
        return Traffic(reduced=sum(part.parameters * part.bytes_each for part in parts if part.trainable))
    loaded = sum(part.parameters * part.bytes_each for part in parts if part.trainable)
    if not backend.weights:
        return Traffic(reduced=trained * each * (accumulation if backend.gradients else 1), gathered=loaded)
    seen = [part for part in parts if part.sharded]
    if not backend.deepspeed:
        weights = sum(part.parameters * (each if bf16 else part.bytes_each) for part in seen)
        return Traffic(gathered=2 * weights * accumulation, scattered=trained * each)
    weights = sum(part.parameters * part.bytes_each for part in seen)
    kept = min(weights, LIVE * weights // sum(part.parameters for part in seen))
    gathered = 2 * weights * accumulation - kept * (2 * accumulation - 1)
    return Traffic(gathered=gathered, scattered=trained * each * accumulation)
