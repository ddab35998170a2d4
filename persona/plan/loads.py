"""From a config to `Load`s: the parts of each training, counted on the meta device, and what a forward of it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from persona.config.schemas import TrainConfig
from persona.data.situations import POLES
from persona.lm import adapters
from persona.methods.finetune import UserAdapters, linear_shapes
from persona.methods.persona_fuse.config import PersonaFuseConfig
from persona.methods.persona_plug import PersonaPlugConfig, UserEmbedder
from persona.plan.backends import Part
from persona.plan.costs import Load
from persona.plan.models import (
    META,
    READERS,
    MetaEncoder,
    checkpointed,
    count_flops,
    count_kept,
    lm_activations,
    lm_forward,
    meta_lm,
)
from persona.plan.sizes import DataSize
from persona.plan.stages import Training
from persona.training.lora import LoraSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TILE = (4096, 32768)  # tokens, words of the vocabulary: what TRL's fused head projects at a time


# Bytes of float32 for each logit of a reply at once: its copy and the log-softmax, later the latter and its gradient.
CROSS_ENTROPY = 8


@dataclass(frozen=True)
class Rows:
    """What a forward sees: `count` rows of at most `prompt` and `reply` tokens, `mean` (prompt, reply) on average;
    `front` vectors with gradients in front of each (None: none). Of a decoder's rows replies alone meet the output
    head."""

    count: int
    prompt: int
    reply: int
    mean: tuple[int, int]
    front: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.mean) + (self.front or 0)


@dataclass(frozen=True)
class Pass:
    """`parts` that a forward needs, the bytes that autograd keeps of it, and operations of a row."""

    parts: list[Part]
    kept: int
    flops: int


def compute_type(cfg: TrainConfig) -> torch.dtype:
    """The type of activations: what autocast computes in; on the meta device there is no autocast."""
    return torch.bfloat16 if cfg.trainer.precision == "bf16" else getattr(torch, cfg.model.dtype)


def base_lm(cfg: TrainConfig) -> nn.Module:
    return meta_lm(cfg.model.path, cfg.model.revision, cfg.model.architecture, compute_type(cfg))


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def base_part(cfg: TrainConfig, lm: nn.Module, sharded: bool = True, used: bool = True) -> Part:
    return Part("base LM", numel(lm), False, BYTES[cfg.model.dtype], sharded, _largest(lm), used)


def _largest(lm: nn.Module) -> int:
    """Parameters of the largest block, or of the embeddings where those are more."""
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    blocks = [numel(block) for blocks in lists for block in blocks]
    return max([*blocks, lm.get_input_embeddings().weight.numel()])  # type: ignore[operator]


# ---- methods that train in one go ----------------------------------------------------------------------------------


def single_load(cfg: TrainConfig, size: DataSize) -> Load:
    """Of Persona-Plug and of fine-tuning on `size` samples."""
    method, trainer = cfg.method, cfg.trainer
    plugs = isinstance(method, PersonaPlugConfig)
    front = method.user_tokens + int(method.instruction) if plugs else None
    mean = (max(1, round(size.prompt_mean)), max(1, round(size.reply_mean)))
    rows = Rows(trainer.batch_size, size.prompt_longest, size.reply_longest, mean, front)
    lm = base_lm(cfg)
    vocabulary = lm.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    made = _plug(cfg, lm, size, rows) if plugs else _finetune(cfg, lm, size, rows)
    logits = rows.count * rows.reply * vocabulary * (compute_type(cfg).itemsize + CROSS_ENTROPY)
    return Load(
        title=f"{method.name} on {cfg.model.path}",
        parts=made.parts,
        activations=made.kept,
        logits=logits,
        flops=made.flops,
        tokens=size.prompt_mean + size.reply_mean + (front or 0),
        samples=size.samples,
        epochs=trainer.epochs,
        batch=trainer.batch_size,
        accumulation=trainer.gradient_accumulation,
        bf16=trainer.precision == "bf16",
        steps=max(0, trainer.max_steps),
    )


def _pass(
    cfg: TrainConfig,
    lm: nn.Module,
    parts: list[Part],
    rows: Rows,
    within: Callable[[int], AbstractContextManager[Any]] = lambda rows: nullcontext(),
) -> Pass:
    """Measures forwards of `lm`, each `within` what changes it for so many rows."""

    def kept() -> int:
        return lm_activations(lm, rows.count, rows.prompt, rows.reply, rows.front)

    recomputes = cfg.trainer.gradient_checkpointing
    with within(rows.count):
        activations = checkpointed(lm, kept) if recomputes else kept()
    forward = lm_forward(lm, 1, *rows.mean, rows.front, None if lm.config.is_encoder_decoder else rows.mean[1])
    with within(1):
        return Pass(parts, activations, count_flops(lambda: forward().logits, recomputes))


def _plug(cfg: TrainConfig, lm: nn.Module, size: DataSize, rows: Rows) -> Pass:
    method, compute = cfg.method, compute_type(cfg)
    encoder = MetaEncoder(method.encoder, compute)
    width = lm.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    with META:
        embedder = UserEmbedder(method, encoder, width, 1.0).to(compute)  # type: ignore[arg-type]
    parts = [base_part(cfg, lm)]
    names = {
        "query_encoder": f"query encoder ({method.encoder.name})",
        "project": "projector",
        "instruction": "instruction vector",
        "project_instruction": "instruction projector",
        "no_history": "vector for no history",
        "log_temperature": "temperature",
    }
    counts: dict[tuple[str, bool], int] = {}
    for name, parameter in embedder.named_parameters():
        key = (name.partition(".")[0], parameter.requires_grad)
        counts[key] = counts.get(key, 0) + parameter.numel()
    largest = {} if embedder.query_encoder is None else {"query_encoder": _largest(encoder.model)}
    parts += [
        Part(names.get(name, name), count, trained, 4, largest=largest.get(name, 0))
        for (name, trained), count in counts.items()
    ]
    # What encodes histories stays loaded beside the copy that is trained.
    parts.append(
        Part(f"history encoder ({method.encoder.name})", numel(encoder.model), False, 4, sharded=False, used=False)
    )
    lm.train(method.lm_dropout or method.compat == "reference")
    made = _pass(cfg, lm, parts, rows)
    kept, flops = made.kept, made.flops
    if method.user_tokens:

        def items(count: int) -> Tensor:
            return torch.empty(max(1, count), encoder.dim, device=META, dtype=compute)

        kept += count_kept(
            embedder.project, lambda: embedder.project(items(rows.count * max(1, size.history_longest)))
        )
        flops += count_flops(lambda: embedder.project(items(round(size.history_mean))))
    if embedder.query_encoder is not None and any(p.requires_grad for p in embedder.query_encoder.parameters()):
        bert = embedder.query_encoder.model.train()

        def read(count: int, length: int) -> Tensor:
            ids = torch.zeros(count, min(encoder.max_length, length), dtype=torch.long, device=META)
            return bert(input_ids=ids).last_hidden_state

        kept += count_kept(bert, lambda: read(rows.count, rows.prompt))
        flops += count_flops(lambda: read(1, rows.mean[0]))
    return Pass(parts, kept, flops)


def _finetune(cfg: TrainConfig, lm: nn.Module, size: DataSize, rows: Rows) -> Pass:
    method, each = cfg.method, BYTES[cfg.model.dtype]
    if method.mode == "full":
        lm.requires_grad_(True).train()
        # The base LM stays loaded beside the copy that is trained, outside of what a back end divides.
        parts = [
            Part("base LM, trained copy", numel(lm), True, each, largest=_largest(lm)),
            Part("base LM, as it was", numel(lm), False, each, sharded=False, used=False),
        ]
        return _pass(cfg, lm, parts, rows)
    if method.mode == "lora":
        return _lora(
            cfg, lm, LoraSettings(method.r, method.lora_alpha, method.lora_dropout, method.target_modules), rows
        )
    shapes = linear_shapes(lm)
    with META:
        users = numel(UserAdapters(shapes, size.users, method.r, method.lora_alpha))
    # Each row has the adapter of one user, so that how many there are changes no activation.
    one = stacked_on_meta(shapes, 1, method.r)

    def within(batch: int) -> AbstractContextManager[None]:
        which = torch.zeros(batch, 1, dtype=torch.long, device=META)
        return adapters.apply_stacked(lm, one, torch.empty(batch, 1, device=META), which)

    parts = [base_part(cfg, lm), Part(f"LoRA adapters of {size.users:,} users", users, True, 4, used=False)]
    lm.requires_grad_(False)
    return _pass(cfg, lm, parts, rows, within)


def stacked_on_meta(shapes: dict[str, tuple[int, int]], count: int, r: int) -> adapters.Stacked:
    """`count` adapters of rank r over modules of these shapes [out, in], as `adapters.apply_stacked` takes them."""
    with META:
        return {
            name: (torch.empty(count, r, narrow).requires_grad_(), torch.empty(count, wide, r).requires_grad_())
            for name, (wide, narrow) in shapes.items()
        }


def _lora(cfg: TrainConfig, lm: nn.Module, lora: LoraSettings, rows: Rows) -> Pass:
    """A frozen LM under one adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    base, settings = base_part(cfg, lm), asdict(lora)
    if settings["target_modules"] == "all-linear":
        settings["target_modules"] = sorted(linear_shapes(lm))
    lm.requires_grad_(False).train()
    adapted = inject_adapter_in_model(LoraConfig(**settings), lm, low_cpu_mem_usage=True)
    one = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return _pass(cfg, adapted, [base, Part("LoRA adapter", one, True, 4)], rows)


# ---- methods made of stages ----------------------------------------------------------------------------------------


def stage_load(cfg: TrainConfig, training: Training) -> Load:
    """Of one training of a method made of stages; all of its rows as long as they may be."""
    trainer = cfg.trainer
    batch = training.batch or trainer.batch_size
    prompt = training.length - training.reply
    rows = Rows(batch * training.rows, prompt, training.reply, (prompt, training.reply))
    lm = base_lm(cfg)
    vocabulary = lm.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    logits = 0
    if not isinstance(cfg.method, PersonaFuseConfig):
        made = _lora(cfg, lm, cfg.method.lora, rows)
        # TRL's fused head holds one tile of logits in float32 at a time, and its gradient.
        logits = min(rows.count * rows.reply, TILE[0]) * min(vocabulary, TILE[1]) * 8
    elif training.stage == "router":
        made = _router(cfg, lm, rows)
    else:
        made = _experts(cfg, lm, rows, training)
        logits = rows.count * rows.reply * vocabulary * (compute_type(cfg).itemsize + CROSS_ENTROPY)
    return Load(
        title=f"{cfg.method.name} on {cfg.model.path}, stage {training.stage}",
        parts=made.parts,
        activations=made.kept,
        logits=logits,
        flops=made.flops * training.rows,
        tokens=training.rows * training.length,
        samples=training.count,
        epochs=trainer.epochs if training.epochs is None else training.epochs,
        batch=batch,
        accumulation=trainer.gradient_accumulation,
        bf16=trainer.precision == "bf16",
        steps=max(0, trainer.max_steps),
    )


def _experts(cfg: TrainConfig, lm: nn.Module, rows: Rows, training: Training) -> Pass:
    """PersonaFuse's experts, one for each row (warm-up) or all in the router's mixture (joint)."""
    method: PersonaFuseConfig = cfg.method
    shapes = linear_shapes(lm)
    if method.lora.target_modules != "all-linear":
        shapes = {name: shape for name, shape in shapes.items() if re.fullmatch(method.lora.target_modules, name)}
    count = len(POLES)
    stacked = stacked_on_meta(shapes, count, method.lora.r)

    @contextmanager
    def within(batch: int) -> Iterator[None]:
        alone = training.stage == "warmup"
        weights = torch.empty(batch, 1 if alone else count, device=META, requires_grad=not alone)
        which = torch.zeros(batch, 1, dtype=torch.long, device=META) if alone else None
        with adapters.apply_stacked(lm, stacked, weights, which, method.lora.lora_dropout):
            yield

    experts = sum(down.numel() + up.numel() for down, up in stacked.values())
    parts = [base_part(cfg, lm, sharded=False), Part(f"{count} experts", experts, True, 4)]
    lm.requires_grad_(False)
    made = _pass(cfg, lm, parts, rows, within)
    if training.stage == "warmup":
        return made
    reads = _router(cfg, lm, Rows(rows.count, 0, method.router.max_length, (0, method.router.max_length)))
    return Pass([*parts, *reads.parts[1:]], made.kept + reads.kept, made.flops + reads.flops)


def _router(cfg: TrainConfig, lm: nn.Module, rows: Rows) -> Pass:
    """PersonaFuse's router over a causal LM's or a sentence encoder's states; the base LM is only held."""
    router, compute, length = cfg.method.router, compute_type(cfg), rows.reply
    if router.encoder == "sentence":
        encoder = MetaEncoder(router.sentence, compute)
        model, width, length = encoder.model, encoder.dim, min(length, encoder.max_length)

        def forward(count: int) -> Tensor:
            return model(input_ids=torch.zeros(count, length, dtype=torch.long, device=META)).last_hidden_state
    else:
        path = router.path
        own = base_lm(cfg) if path is None else meta_lm(path, None, READERS.get(path, {}), compute)
        model, width = own.get_decoder(), own.config.hidden_size  # type: ignore[operator]

        def forward(count: int) -> Tensor:
            embeds = torch.empty(count, length, width, device=META, dtype=compute)
            mask = torch.zeros(count, 1, length, length, device=META, dtype=compute)
            return model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state

    model.requires_grad_(router.train_encoder).train()
    layers = lm.config.num_hidden_layers
    heads, vectors = layers if router.granularity == "layer" else 1, len(POLES) + router.null_expert
    hidden = (width + 1) * router.hidden + (router.hidden + 1) * heads * router.dim + vectors * router.dim
    if router.granularity == "token":
        hidden += layers * vectors * lm.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    parts = [
        base_part(cfg, lm, sharded=False, used=False),
        Part(f"router's encoder ({router.path or cfg.model.path})", numel(model), router.train_encoder, 4),
        Part("router's head and experts' vectors", hidden, True, 4),
    ]
    return Pass(parts, count_kept(model, lambda: forward(rows.count)), count_flops(lambda: forward(1)))
