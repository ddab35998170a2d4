"""What can be set of the method. Nothing here is known from the paper but the ten poles, the three stages, the two
contrastive losses and (from a survey) the router's encoder; every other value is a default of ours."""

from __future__ import annotations

from dataclasses import dataclass, field

from persona.encoders import EncoderConfig
from persona.methods.persona_fuse.synthesis import SynthesisConfig
from persona.training.lora import LoraSettings

GRANULARITIES = ("sequence", "layer", "token")
OBJECTIVES = ("sft", "dpo")


@dataclass
class RouterConfig:
    """encoder: "causal" (a causal LM's own hidden states) or "sentence" (an encoder of persona/encoders.py).
    path: the causal LM, "town", a directory or a hub id; null is the base LM's own path.
    pooling: of a causal LM, "last" (non-pad token) or "mean" over all tokens.
    train_encoder: its weights too, with a learning rate of their own; else it is frozen, and not saved.
    temperature: of the gate; that of the contrastive loss is `PersonaFuseConfig.tau`.
    top_k: experts that stay on, their gates summing to 1 again; null keeps all.
    pole_guard: of the two poles of a trait the weaker one is taken away from both.
    null_expert: one more place for the gate to go, which changes nothing in the base LM.
    granularity: one gate per "sequence", one per "layer", or one per "token" and layer."""

    encoder: str = "causal"
    path: str | None = "Qwen/Qwen2.5-0.5B"
    sentence: EncoderConfig = field(default_factory=EncoderConfig)
    pooling: str = "last"
    train_encoder: bool = True
    max_length: int = 512  # tokens of the user's turns; the earliest turns go first
    hidden: int = 512
    dim: int = 256
    temperature: float = 0.5
    top_k: int | None = None
    pole_guard: bool = False
    null_expert: bool = True
    granularity: str = "sequence"


@dataclass
class WarmupConfig:
    """`together`: all experts in one pass over mixed batches, with the numbers of training each alone. `batch_size`
    counts rows of each expert."""

    learning_rate: float = 2e-4
    epochs: float = 3.0
    batch_size: int = 4
    together: bool = True


@dataclass
class RouterStageConfig:
    """`learning_rate` of head and expert vectors. The weights of the losses: contrastive, trait consistency, gate KL,
    load balance."""

    learning_rate: float = 1e-3
    encoder_learning_rate: float = 2e-5
    epochs: float = 3.0
    batch_size: int = 256
    contrastive: float = 1.0
    consistency: float = 0.5
    kl: float = 0.5
    balance: float = 0.01


@dataclass
class JointConfig:
    """`objective`: "sft", or "dpo" with what the LM itself says without experts as rejected reply (of at most
    `max_new_tokens`, sampled at `temperature`). The weights are of the router's losses. Of these only the gate KL says
    that neutral queries are the null expert's: without it their gates drift to the poles (docs/persona_fuse.md)."""

    learning_rate: float = 5e-5
    epochs: float = 1.0
    batch_size: int = 16
    objective: str = "sft"
    beta: float = 0.1  # of dpo
    max_new_tokens: int = 256
    temperature: float = 1.0
    contrastive: float = 0.1
    consistency: float = 0.1
    kl: float = 0.5
    balance: float = 0.01


def _lora() -> LoraSettings:
    return LoraSettings(r=16, lora_alpha=32, lora_dropout=0.05)


@dataclass
class PersonaFuseConfig:
    """`tau`: temperature of the contrastive loss. `similarity`: which queries need the same traits, those with "equal"
    targets, or in the measure of their "cosine". `skip`: stages left out, for ablations (experts or router are then as
    they were made). `fold`: where all rows of a batch have one gate (a batch of one), it goes into the weights for the
    length of the call, at the price of a copy of the adapted weights."""

    name: str = "persona_fuse"
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    lora: LoraSettings = field(default_factory=_lora)
    router: RouterConfig = field(default_factory=RouterConfig)
    tau: float = 0.07
    similarity: str = "equal"
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    routing: RouterStageConfig = field(default_factory=RouterStageConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    skip: list[str] = field(default_factory=list)
    max_length: int = 2048  # tokens of a prompt and its reply
    fold: bool = False
