"""`plan=true`: what a training run would need, from configs alone. No weight is loaded.

The model is built on torch's meta device. Parameters are counted on it, and activations too: one forward of a batch's
shapes, adding up every tensor that autograd keeps for the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import nn

from persona.config.schemas import TrainConfig
from persona.errors import UserError
from persona.methods.finetune import FinetuneConfig, UserAdapters, linear_shapes
from persona.methods.persona_plug import PersonaPlugConfig, UserEmbedder
from persona.plan.models import META, MetaEncoder, checkpointed, count_kept, lm_activations, meta_lm
from persona.plan.sizes import DataSize, data_size
from persona.plan.stages import Work, has_plan, work
from persona.training.lora import LoraSettings

__all__ = ["Memory", "Part", "Plan", "memory", "plan"]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TILE = (4096, 32768)  # tokens, words of the vocabulary: what TRL's fused head projects at a time
ACCOUNTING = (
    "one GPU, DDP: weights as loaded (+ bf16 copies of fp32 ones under autocast), AdamW 2 states, DDP buckets",
    "ZeRO: weights and gradients in the training precision, AdamW 12 bytes per trained parameter / GPUs; "
    "stage 2 divides gradients, stage 3 weights",
    "not counted: CUDA context, communication buffers, fragmentation (leave 10 to 20 %)",
)

# ---- memory per GPU ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A group of parameters. `bytes_each` while training without DeepSpeed; `sharded`: ZeRO manages it."""

    name: str
    parameters: int
    trainable: bool
    bytes_each: int
    sharded: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on each of `gpus` GPUs. `layout`: "one GPU", "DDP", "ZeRO-1", "ZeRO-2" or "ZeRO-3"."""

    layout: str
    gpus: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def memory(layout: str, gpus: int, parts: list[Part], bf16: bool, activations: int, logits: int) -> Memory:
    """Weights, gradients and AdamW's states of `parts` under a layout, as the notes of the plan state them.

    Without DeepSpeed every part keeps its own type and autocast adds bf16 copies of fp32 weights; AdamW has two states
    of the weight's type; DDP adds a bucket for every gradient. DeepSpeed keeps weights and gradients in the training
    precision and 12 bytes per trained parameter for AdamW (fp32 weight, two states), split over GPUs from stage 1 on;
    gradients are split from stage 2 on, weights at stage 3.
    """
    trained = [part for part in parts if part.trainable]
    if layout in ("one GPU", "DDP"):
        gradients = sum(part.parameters * part.bytes_each for part in trained)
        copies = sum(2 * part.parameters for part in parts if part.bytes_each == 4 and part.sharded) if bf16 else 0
        return Memory(
            layout,
            gpus,
            sum(part.parameters * part.bytes_each for part in parts) + copies,
            gradients * (2 if gpus > 1 else 1),
            2 * gradients,
            activations,
            logits,
        )
    stage, each = int(layout[-1]), 2 if bf16 else 4
    own = sum(part.parameters * part.bytes_each for part in parts if not part.sharded)
    managed = sum(part.parameters for part in parts if part.sharded) * each
    count = sum(part.parameters for part in trained)
    return Memory(
        layout,
        gpus,
        own + (managed // gpus if stage == 3 else managed),
        count * each // (gpus if stage >= 2 else 1),
        12 * count // gpus,
        activations,
        logits,
    )


# ---- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run would need. Bytes, tokens and counts as integers; `print` shows them."""

    title: str
    parts: list[Part]
    memory: list[Memory]
    data: DataSize
    global_batch: int
    steps_per_epoch: int
    steps: int
    tokens_per_step: int
    tokens_per_epoch: int
    notes: list[str]
    stages: Work | None = None

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def trainable(self) -> int:
        return sum(part.parameters for part in self.parts if part.trainable)

    def print(self, console: Console | None = None) -> None:
        """The tables, to the terminal."""
        (console or Console()).print(self.tables())

    def tables(self) -> Group:
        """Three tables (parameters, memory per GPU, tokens and steps) and the notes, as a rich renderable."""
        sizes = Table("part", "parameters", "trained", title=self.title, title_justify="left")
        for part in self.parts:
            sizes.add_row(part.name, f"{part.parameters:,}", "yes" if part.trainable else "frozen")
        sizes.add_section()
        share = 100 * self.trainable / self.parameters
        sizes.add_row("total", f"{self.parameters:,}", f"{self.trainable:,} ({share:.2f} %)")
        needs = Table("GiB per GPU", title="memory", title_justify="left")
        for column in self.memory:
            needs.add_column(column.layout + (f" × {column.gpus}" if column.gpus > 1 else ""), justify="right")
        for row in ("weights", "gradients", "optimizer", "activations", "logits"):
            needs.add_row(row, *(_gib(getattr(column, row)) for column in self.memory))
        needs.add_section()
        needs.add_row("sum", *(_gib(column.total) for column in self.memory))
        work = Table("work", "", title="tokens and steps", title_justify="left", show_header=False)
        size = self.data
        for name, value in (
            ("samples per epoch", f"{size.samples:,}"),
            ("global batch", f"{self.global_batch:,} samples"),
            ("steps", f"{self.steps:,} ({self.steps_per_epoch:,} per epoch)"),
            ("tokens per step", f"{self.tokens_per_step:,}"),
            ("tokens per epoch", f"{self.tokens_per_epoch:,}"),
            *(() if self.stages else _lengths(size)),
        ):
            work.add_row(name, value)
        if size.history_longest:
            work.add_row("items in a history", f"{size.history_mean:.0f} on average, {size.history_longest} at most")
        tables = [sizes, needs, work] if self.steps else [sizes, needs]
        if self.stages:
            todo = Table("stage", "what", "by", title="stages, at most", title_justify="left")
            for name in ("count", "tokens each", "tokens"):
                todo.add_column(name, justify="right")
            for text in self.stages.texts:
                todo.add_row(text.stage, text.what, text.by, *_product(text.count, text.tokens))
            for training in self.stages.trainings:
                each = training.rows * training.length
                todo.add_row(training.stage, training.what, "trained on", *_product(training.count, each))
            tables.append(todo)
        return Group(*tables, Text("\n".join(f"- {note}" for note in self.notes), style="dim"))


def _product(count: int, each: int) -> tuple[str, str, str]:
    return f"{count:,}", f"{each:,}", f"{count * each:,}"


def _lengths(size: DataSize) -> tuple[tuple[str, str], ...]:
    prompt, reply = (size.prompt_mean, size.prompt_longest), (size.reply_mean, size.reply_longest)
    told = [f"{mean:.0f} on average, {longest} in the memory estimate" for mean, longest in (prompt, reply)]
    return ("prompt tokens", told[0]), ("reply tokens", told[1])


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def plan(cfg: TrainConfig) -> Plan:
    """Sizes, memory and work of the run that `cfg` describes, for `cfg.plan_gpus` GPUs.

    Loads no weight, and downloads nothing when `model.architecture` is given (or the model is a directory). Raises
    UserError when neither a config of the model nor a size of the data is to be had.
    """
    if has_plan(cfg):
        return _staged(cfg, work(cfg))
    if not isinstance(cfg.method, PersonaPlugConfig | FinetuneConfig):
        raise UserError(f"plan=true knows methods that train a model; method={cfg.method.name} has no plan")
    size = data_size(cfg)
    compute = _compute(cfg)
    lm = meta_lm(cfg.model.path, cfg.model.revision, cfg.model.architecture, compute)
    build = _plug if isinstance(cfg.method, PersonaPlugConfig) else _finetune
    parts, activations = build(cfg, lm, size, compute)
    batch = cfg.trainer.batch_size
    positions = size.reply_longest + (0 if lm.config.is_encoder_decoder else size.prompt_longest + _front(cfg))
    # The logits, their float32 copy, its log-softmax, and the gradient of the copy.
    logits = batch * positions * lm.get_output_embeddings().weight.shape[0] * (compute.itemsize + 12)
    per_epoch, steps, global_batch = _steps(cfg, size.samples)
    per_sample = size.prompt_mean + size.reply_mean + _front(cfg)
    return Plan(
        title=f"{cfg.method.name} on {cfg.model.path}",
        parts=parts,
        memory=_layouts(cfg, parts, activations, logits),
        data=size,
        global_batch=global_batch,
        steps_per_epoch=per_epoch,
        steps=steps,
        tokens_per_step=round(global_batch * per_sample),
        tokens_per_epoch=round(size.samples * per_sample),
        notes=[
            f"data: {size.source}",
            f"activations: what autograd keeps of one forward of {batch} × the longest samples, counted on the meta "
            "device with attention matrices written out (a fused kernel keeps less)",
            "logits: batch × positions × vocabulary × (logits + float32 copy, log-softmax and gradient)",
            *ACCOUNTING,
        ],
    )


def _staged(cfg: TrainConfig, stages: Work) -> Plan:
    """Memory of the heaviest training; its samples and tokens, all at most."""
    heavy, compute = stages.heaviest, _compute(cfg)
    lm = meta_lm(cfg.model.path, cfg.model.revision, cfg.model.architecture, compute)
    if heavy is None:
        return _untrained(cfg, stages, lm)
    size = DataSize(
        heavy.count,
        *(heavy.length - heavy.reply, heavy.length - heavy.reply, heavy.reply, heavy.reply),
        *(0.0, 0, 0, stages.source),
    )
    rows = cfg.trainer.batch_size * heavy.rows
    parts, activations = _lora(cfg, lm, cfg.method.lora, size, rows)
    vocabulary = lm.get_output_embeddings().weight.shape[0]
    # TRL's fused head holds one tile of logits in float32 at a time, and its gradient.
    logits = min(rows * heavy.reply, TILE[0]) * min(vocabulary, TILE[1]) * 8
    per_epoch, steps, global_batch = _steps(cfg, heavy.count)
    return Plan(
        title=f"{cfg.method.name} on {cfg.model.path}, stage {heavy.stage}",
        parts=parts,
        memory=_layouts(cfg, parts, activations, logits),
        data=size,
        global_batch=global_batch,
        steps_per_epoch=per_epoch,
        steps=steps,
        tokens_per_step=global_batch * heavy.rows * heavy.length,
        tokens_per_epoch=heavy.count * heavy.rows * heavy.length,
        notes=[
            f"data: {stages.source}; counts and lengths are the most there can be: filters and short texts take off",
            f"activations: what autograd keeps of one forward of {rows} rows of {heavy.length} tokens, counted on the "
            "meta device with attention matrices written out (a fused kernel keeps less)",
            "logits: a tile of TRL's fused head, whatever the batch",
            *ACCOUNTING,
        ],
        stages=stages,
    )


def _untrained(cfg: TrainConfig, stages: Work, lm: nn.Module) -> Plan:
    """A method that only asks and reads: the LM, and the keys and values of a batch."""
    each, longest, batch = BYTES[cfg.model.dtype], max(text.tokens for text in stages.texts), cfg.model.batch_size
    config = lm.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    parts = [Part("base LM", _numel(lm), False, each)]
    cache = batch * longest * config.num_hidden_layers * width * 2 * each
    total = sum(text.count * text.tokens for text in stages.texts)
    return Plan(
        title=f"{cfg.method.name} on {cfg.model.path}, which trains nothing",
        parts=parts,
        memory=[Memory("one copy", 1, parts[0].parameters * each, 0, 0, cache, 0)],
        data=DataSize(0, 0.0, 0, 0.0, 0, 0.0, 0, 0, stages.source),
        global_batch=batch,
        steps_per_epoch=0,
        steps=0,
        tokens_per_step=0,
        tokens_per_epoch=total,
        notes=[
            f"data: {stages.source}; lengths are the most there can be",
            f"activations: keys and values of {batch} rows of {longest} tokens (model.batch_size); each process holds "
            "the LM whole (model.device_map=auto spreads one over the GPUs of a process)",
        ],
        stages=stages,
    )


def _compute(cfg: TrainConfig) -> torch.dtype:
    """The type of activations: what autocast computes in; on the meta device there is no autocast."""
    return torch.bfloat16 if cfg.trainer.precision == "bf16" else getattr(torch, cfg.model.dtype)


def _layouts(cfg: TrainConfig, parts: list[Part], activations: int, logits: int) -> list[Memory]:
    gpus = cfg.plan_gpus
    names = ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"] if gpus > 1 else []
    bf16 = cfg.trainer.precision == "bf16"
    return [
        memory(name, count, parts, bf16, activations, logits)
        for name, count in [("one GPU", 1), *((name, gpus) for name in names)]
    ]


def _steps(cfg: TrainConfig, samples: int) -> tuple[int, int, int]:
    """Optimizer steps in an epoch and in all, and samples in each."""
    trainer, each = cfg.trainer, cfg.trainer.batch_size * cfg.plan_gpus
    per_epoch = math.ceil(math.ceil(samples / each) / trainer.gradient_accumulation)
    steps = trainer.max_steps if trainer.max_steps > 0 else math.ceil(trainer.epochs * per_epoch)
    return per_epoch, steps, each * trainer.gradient_accumulation


def _front(cfg: TrainConfig) -> int:
    """Vectors that stand in front of the prompt."""
    if not isinstance(cfg.method, PersonaPlugConfig):
        return 0
    return cfg.method.user_tokens + int(cfg.method.instruction)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measure(cfg: TrainConfig, lm: nn.Module, size: DataSize, prefix: int | None, rows: int) -> int:
    def once() -> int:
        return lm_activations(lm, rows, size.prompt_longest, size.reply_longest, prefix)

    return checkpointed(lm, once) if cfg.trainer.gradient_checkpointing else once()


def _plug(cfg: TrainConfig, lm: nn.Module, size: DataSize, compute: torch.dtype) -> tuple[list[Part], int]:
    method, batch = cfg.method, cfg.trainer.batch_size
    encoder = MetaEncoder(method.encoder, compute)
    width = lm.get_input_embeddings().weight.shape[1]
    with META:
        embedder = UserEmbedder(method, encoder, width, 1.0).to(compute)  # type: ignore[arg-type]
    parts = [Part("base LM", _numel(lm), False, BYTES[cfg.model.dtype])]
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
    parts += [Part(names.get(name, name), count, trained, 4) for (name, trained), count in counts.items()]
    lm.train(method.lm_dropout or method.compat == "reference")
    kept = _measure(cfg, lm, size, _front(cfg), batch)
    if method.user_tokens:
        items = torch.empty(batch * max(1, size.history_longest), encoder.dim, device=META, dtype=compute)
        kept += count_kept(embedder.project, lambda: embedder.project(items))
    if embedder.query_encoder is not None and any(p.requires_grad for p in embedder.query_encoder.parameters()):
        tokens = min(encoder.max_length, size.prompt_longest)
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=META)
        bert = embedder.query_encoder.model.train()
        kept += count_kept(bert, lambda: bert(input_ids=ids))
    return parts, kept


def _finetune(cfg: TrainConfig, lm: nn.Module, size: DataSize, compute: torch.dtype) -> tuple[list[Part], int]:
    method, each = cfg.method, BYTES[cfg.model.dtype]
    total = _numel(lm)
    if method.mode == "full":
        lm.requires_grad_(True).train()
        # The base LM stays loaded beside the copy that is trained, outside of what ZeRO divides.
        parts = [
            Part("base LM, trained copy", total, True, each),
            Part("base LM, as it was", total, False, each, False),
        ]
        return parts, _measure(cfg, lm, size, None, cfg.trainer.batch_size)
    users = None
    if method.mode == "user_lora":
        with META:
            users = _numel(UserAdapters(linear_shapes(lm), size.users, method.r, method.lora_alpha))
    targets = method.target_modules if method.mode == "lora" else "all-linear"
    settings = LoraSettings(method.r, method.lora_alpha, method.lora_dropout, targets)
    (frozen, one), kept = _lora(cfg, lm, settings, size, cfg.trainer.batch_size)
    if users is None:
        return [frozen, one], kept
    return [frozen, Part(f"LoRA adapters of {size.users:,} users", users, True, 4)], kept


def _lora(cfg: TrainConfig, lm: nn.Module, lora: LoraSettings, size: DataSize, rows: int) -> tuple[list[Part], int]:
    """A frozen LM under one adapter; activations of a forward of `rows` rows."""
    from peft import LoraConfig, inject_adapter_in_model

    total, settings = _numel(lm), asdict(lora)
    if settings["target_modules"] == "all-linear":
        settings["target_modules"] = sorted(linear_shapes(lm))
    lm.requires_grad_(False).train()
    adapted = inject_adapter_in_model(LoraConfig(**settings), lm, low_cpu_mem_usage=True)
    one = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    parts = [Part("base LM", total, False, BYTES[cfg.model.dtype]), Part("LoRA adapter", one, True, 4)]
    return parts, _measure(cfg, adapted, size, None, rows)
