"""Persona-Plug: all of a user's past items become one vector in front of a frozen LM (arXiv 2409.11901).

    python train.py method=persona_plug data=lamp data.path=LaMP_time_3

Faithful to the paper and its repository where they agree: frozen history encoder, trained query encoder, projection
before averaging, softmax over dot products, a learned instruction vector, order [I; P_u; x], token cross entropy on
the reply. What differs by default, and why, is in docs/errata.md; `compat: reference` brings back the published
prefix scale (539.97), texts of items and queries, and the LM's dropout during training.

Read on: config, data, model, loss, training, and the personalizer that is left behind.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.modeling_layers import GradientCheckpointingLayer

from persona.data.base import People, Task
from persona.data.base import task as task_rules
from persona.encoders import Encoder, EncoderConfig
from persona.errors import UserError
from persona.lm import BaseLM, Row, assemble
from persona.lm.batch import forward_logits, nll_sum
from persona.personalizer import LanguageModel, Personalizer, save
from persona.store import HistoryStore, StoreBusy, history_key
from persona.training.lora import as_it_was
from persona.training.trainer import TrainerConfig, fit
from persona.types import Conversation, Persona, Request, Sample, Sampling

# ---- config --------------------------------------------------------------------------------------------------------


@dataclass
class PersonaPlugConfig:
    """`input_aware` False is the paper's "w/o IA", `instruction` False its "w/o IE", `top_k` its Top-K selection."""

    name: str = "persona_plug"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    store: str = "cache/histories"  # vectors of all items, shared by all runs with the same encoder
    history_limit: int = 512  # the most recent items
    include_label: bool = False  # encode what the user made of the item as well (score, tag, headline)
    input_aware: bool = True
    instruction: bool = True
    top_k: int | None = None
    renormalize: bool = True  # after top_k
    temperature: float = 1.0  # of the softmax over dot products
    learn_temperature: bool = False
    user_tokens: int = 1  # vectors per user; 0 leaves the instruction alone: the baseline that knows no user
    prefix_scale: str = "measured"  # measured (mean norm of the LM's input embeddings) | none
    max_input_length: int = 256  # tokens of the prompt
    augment_copies: int = 10  # extra copies of each training sample with items dropped
    augment_drop: float = 0.5  # each copy drops int(n * U(0, this)) + 1 items
    encoder_learning_rate: float | None = None  # of the query encoder; None: as everything else
    train_query_encoder: bool = True
    lm_dropout: bool = False
    compat: str | None = None  # "reference": published constants; see docs/errata.md


REFERENCE_PREFIX_SCALE = 539.9738  # the repository's constant for FLAN-T5-XXL
INSTRUCTION_DIVISOR = 7.0

# ---- data ----------------------------------------------------------------------------------------------------------


class Histories:
    """A user's items as rows of the store, under one key per (person, encoded texts)."""

    def __init__(self, config: PersonaPlugConfig, encoder: Encoder):
        self.config = config
        name = hashlib.sha256(json.dumps(encoder.fingerprint, sort_keys=True).encode()).hexdigest()[:12]
        self.store = HistoryStore(Path(config.store) / name, encoder=encoder)
        self._known: dict[tuple[int, str], tuple[Any, str]] = {}

    def texts(self, persona: Persona | None, task: str) -> list[str]:
        """What of each item is encoded (task's rules; PPlug note 3.2), the last `history_limit` of them."""
        items = list(persona.history)[-self.config.history_limit :] if persona is not None else []
        if not task:
            return [item.text for item in items]
        rules = rules_of(task, self.config.compat)
        read = rules.item_text_with_label if self.config.include_label else rules.item_text
        return [read(item) for item in items]

    def keys(self, pairs: Sequence[tuple[Persona | None, str]], progress: bool = False) -> list[str]:
        """One store key per (persona, task); histories the store has not seen are encoded and added first.

        Raises StoreBusy when something has to be added while another process is writing.
        """
        keys: list[str] = []
        missing: dict[str, list[str]] = {}
        new: dict[tuple[int, str], tuple[Any, str]] = {}
        for persona, task in pairs:
            history = persona.history if persona is not None else ()
            # Histories do not change, so an object's key is remembered; keeping the object keeps its id taken.
            known = self._known.get((id(history), task))
            if known is not None:
                keys.append(known[1])
                continue
            texts = self.texts(persona, task)
            key = history_key(persona.id if persona is not None else "", texts)
            new[id(history), task] = (history, key)
            keys.append(key)
            if key not in self.store:
                missing[key] = texts
        if missing:
            self.store.add(list(missing.items()), progress=progress)
        self._known.update(new)
        return keys

    def gather(self, pairs: Sequence[tuple[Persona | None, str]]) -> tuple[Tensor, Tensor]:
        """Vectors [B, N, d] and mask [B, N] of whole histories; what the store lacks is added to it, or encoded for
        this once while another process is writing (evaluation on several processes)."""
        try:
            return self.store.gather_rows(self.store.rows_of(self.keys(pairs)))
        except StoreBusy:
            texts = [self.texts(persona, task) for persona, task in pairs]
            mask = torch.arange(max(1, *map(len, texts))) < torch.tensor([len(row) for row in texts])[:, None]
            found = torch.from_numpy(self.store.embed([text for row in texts for text in row]))
            vectors = torch.zeros(*mask.shape, found.shape[1])
            vectors[mask] = found
            return vectors, mask


def augmented(n: int, copy: int, seed: int, sample: int, drop: float) -> np.ndarray | None:
    """Which of n items an augmented copy keeps: it drops int(n·U(0, drop)) + 1 of them (PPlug note 3.4.3).

    Copy 0 is the original; samples of at most 2 items have no other copies (None). The draw depends on
    (seed, sample, copy) only, so it is the same in every process and after every resume.
    """
    if copy == 0:
        return np.arange(n)
    if n <= 2:
        return None
    rng = np.random.default_rng((seed, sample, copy))
    dropped = int(n * rng.uniform(0, drop)) + 1
    return np.sort(rng.permutation(n)[dropped:])


@dataclass(frozen=True)
class Example:
    sample: Sample
    key: str
    keep: np.ndarray | None  # positions among the store's rows of `key`; None keeps all


class PlugData(Dataset):
    """Samples with the rows of their histories; `copies` augmented copies follow each sample's original."""

    def __init__(self, samples: Sequence[Sample], histories: Histories, copies: int, drop: float, seed: int):
        self.samples, self.drop, self.seed = samples, drop, seed
        # One process encodes; the others then find everything in the store.
        with PartialState().main_process_first():
            histories.store.refresh()
            self.keys = histories.keys([(sample.persona, sample.task) for sample in samples], progress=True)
        lengths = np.array([len(rows) for rows in histories.store.rows_of(self.keys)], dtype=np.int64)
        self.lengths = lengths
        per_sample = np.where(lengths > 2, copies + 1, 1)
        self.owner = np.repeat(np.arange(len(samples)), per_sample)
        starts = np.cumsum(per_sample) - per_sample
        self.copy = np.arange(len(self.owner)) - starts[self.owner]

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: int) -> Example:
        i, copy = int(self.owner[index]), int(self.copy[index])
        keep = augmented(int(self.lengths[i]), copy, self.seed, i, self.drop) if copy else None
        return Example(self.samples[i], self.keys[i], keep)


def request_of(sample: Sample) -> Request:
    # max_new_tokens 0: the prompt's room is bounded by max_input_length, not by a reply still to be generated.
    return Request(sample.messages, sample.persona, Sampling(max_new_tokens=0), sample.options, sample.task)


def query_text(request: Request, compat: str | None = None) -> str:
    """What the query encoder reads: the task's part of the last user message (all of it without a task)."""
    last = next((m.content for m in reversed(request.messages) if m.role == "user"), "")
    return rules_of(request.task, compat).query_text(last) if request.task else last


def rules_of(task: str, compat: str | None) -> Task:
    """A task's rules; `compat` "reference" takes Persona-Plug's published item and query texts."""
    return task_rules(task, "pplug_reference" if compat == "reference" else None)


# ---- model ---------------------------------------------------------------------------------------------------------


def attention_weights(
    history: Tensor,
    mask: Tensor,
    query: Tensor,
    *,
    top_k: int | None = None,
    renormalize: bool = True,
    temperature: float | Tensor = 1.0,
    input_aware: bool = True,
) -> Tensor:
    """Weights [B, N] of a user's items: softmax over real items of (query · item) / temperature (paper eq. 3-4).

    `history` [B, N, d], `mask` [B, N] (True = real), `query` [B, d]. Not input-aware: equal weights. With `top_k` only
    the k largest stay, summing to 1 again if `renormalize`. A row without items is all zeros. Raises UserError for
    top_k < 1 or a temperature that is not positive.
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} keeps no item: use 1 or more, or null for all")
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise UserError(f"temperature={temperature} has to be positive")
    mask = mask.bool()
    if input_aware:
        scores = torch.einsum("bnd,bd->bn", history, query.to(history)).float() / temperature
    else:
        scores = torch.zeros(mask.shape, device=history.device)
    scores = scores.masked_fill(~mask, -math.inf)
    # A row of -inf has no softmax; it gets zeros there, and its weights are masked to zero below.
    scores = torch.where(mask.any(-1, keepdim=True), scores, torch.zeros_like(scores))
    weights = scores.softmax(-1) * mask
    if top_k is not None and top_k < weights.shape[1]:
        kept = torch.zeros_like(mask).scatter(1, weights.topk(top_k, dim=1).indices, True)
        weights = weights * kept
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights


def aggregate(
    history: Tensor,
    mask: Tensor,
    query: Tensor,
    projector: nn.Module,
    *,
    top_k: int | None = None,
    renormalize: bool = True,
    temperature: float | Tensor = 1.0,
    input_aware: bool = True,
) -> Tensor:
    """P_u = sum_i w_i Proj(h_i) (paper eq. 5): items are projected first and averaged after.

    [B, N, d], [B, N], [B, d] → [B, d_llm] (whatever `projector` maps d to). A row without items gives zeros. Padding
    and items of weight zero are never projected. Raises UserError as `attention_weights`.
    """
    weights = attention_weights(
        history,
        mask,
        query,
        top_k=top_k,
        renormalize=renormalize,
        temperature=temperature,
        input_aware=input_aware,
    )
    real = mask.bool() if top_k is None else weights > 0
    row, column = real.nonzero(as_tuple=True)
    projected = projector(history[row, column])
    summed = projected.new_zeros((len(history), projected.shape[-1]))
    return summed.index_add(0, row, projected * weights[row, column].to(projected)[:, None])


def projector(d_in: int, d_out: int) -> nn.Sequential:
    """Linear, exact GELU, Linear (PPlug note 3.1)."""
    return nn.Sequential(nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out))


class UserEmbedder(nn.Module):
    """Everything Persona-Plug trains: query encoder, projector, instruction vector with its own projector."""

    def __init__(self, config: PersonaPlugConfig, encoder: Encoder, hidden: int, scale: float):
        super().__init__()
        if config.user_tokens < 0 or not (config.user_tokens or config.instruction):
            raise UserError("with method.user_tokens=0 and method.instruction=false nothing stands in front of the LM")
        if config.learn_temperature and not (config.input_aware and config.user_tokens):
            raise UserError("method.learn_temperature=true has nothing to learn: no weight depends on the query")
        self.config, self.hidden, self.scale = config, hidden, scale
        # Equal weights need no query, so there is no query encoder then.
        self.query_encoder = encoder.module() if config.input_aware and config.user_tokens else None
        if self.query_encoder is not None:
            self.query_encoder.requires_grad_(config.train_query_encoder)
        if config.user_tokens:
            self.project = projector(encoder.dim, hidden * config.user_tokens)
            # The published code divides 0 by 0 for a user without items; here such a user has a learned vector.
            self.no_history = nn.Parameter(torch.zeros(config.user_tokens, hidden))
        if config.instruction:
            self.instruction = nn.Parameter(torch.rand(encoder.dim))
            self.project_instruction = projector(encoder.dim, hidden)
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))

    def train(self, mode: bool = True) -> UserEmbedder:
        super().train(mode)
        if self.query_encoder is not None and not self.config.train_query_encoder:
            self.query_encoder.eval()
        return self

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `aggregate` and `attention_weights`."""
        c = self.config
        temperature = self.log_temperature.exp() if c.learn_temperature else c.temperature
        return {
            "top_k": c.top_k,
            "renormalize": c.renormalize,
            "temperature": temperature,
            "input_aware": c.input_aware,
        }

    def encode_query(self, query: dict[str, Tensor] | None, history: Tensor) -> Tensor:
        """[B, d]; zeros where aggregation does not look at the query."""
        if self.query_encoder is None or query is None:
            return history.new_zeros((history.shape[0], history.shape[2]))
        return self.query_encoder(**query)

    def forward(self, history: Tensor, mask: Tensor, query: dict[str, Tensor] | None) -> Tensor:
        """[B, N, d], [B, N], tokenised queries → the vectors in front [B, tokens, d_llm], in the order [I; P_u]."""
        parts = []
        if self.config.instruction:
            instruction = self.project_instruction(self.instruction) * (self.scale / INSTRUCTION_DIVISOR)
            parts.append(instruction.expand(len(history), 1, -1))
        if self.config.user_tokens:
            vectors = aggregate(history, mask, self.encode_query(query, history), self.project, **self.options())
            user = vectors.view(len(history), self.config.user_tokens, self.hidden)
            known = mask.bool().any(-1)[:, None, None]
            parts.append(torch.where(known, user, self.no_history) * self.scale)
        return torch.cat(parts, dim=1)


def prefix_scale(config: PersonaPlugConfig, base: BaseLM) -> float:
    """What the vectors in front are multiplied by, so that they have the size of the LM's own input embeddings."""
    if config.compat == "reference":
        return REFERENCE_PREFIX_SCALE
    if config.prefix_scale == "none":
        return 1.0
    if config.prefix_scale != "measured":
        raise UserError(f"method.prefix_scale={config.prefix_scale!r} is unknown: use measured or none")
    with torch.no_grad():  # through the module, since some LMs scale inside it
        ids = torch.arange(base.embed.weight.shape[0], device=base.device).split(4096)
        return float(torch.cat([base.embed(part).float().norm(dim=-1) for part in ids]).mean())


# ---- loss ----------------------------------------------------------------------------------------------------------


class PlugTraining(nn.Module):
    """The forward of one training batch: vectors in front of a frozen LM, cross entropy on the reply's tokens."""

    def __init__(self, under: LanguageModel, embedder: UserEmbedder, lm_dropout: bool):
        super().__init__()
        self.under, self.embedder, self.lm_dropout = under, embedder, lm_dropout
        self.lm = under.base.model

    def train(self, mode: bool = True) -> PlugTraining:
        super().train(mode)
        if not self.lm_dropout:
            self.lm.eval()
            # transformers recomputes activations in blocks that are in train mode; what is in the blocks stays in
            # eval mode, so nothing is dropped.
            for block in self.lm.modules():
                if isinstance(block, GradientCheckpointingLayer):
                    block.training = mode
        return self

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.lm.gradient_checkpointing_enable(**kwargs)

    def forward(self, requests, prompts, replies, history, mask, query, labels, num_items_in_batch=None):
        base = self.under.base
        front = self.embedder(history, mask, query)
        with torch.no_grad():
            below = self.under.prefixes(requests)
        prefixes = [own if other is None else torch.cat([other, own]) for own, other in zip(front, below, strict=True)]
        with self.under.edit(requests):
            inputs = assemble(base, [Row(*row) for row in zip(prompts, prefixes, requests, strict=True)], replies)
            logits, targets = forward_logits(base, inputs, self.lm)
        count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": nll_sum(logits, targets) / count}


# ---- training ------------------------------------------------------------------------------------------------------


class PersonaPlug(Personalizer):
    """The personalizer: a user embedder over a store of encoded histories. Second door only."""

    method = "persona_plug"

    def __init__(self, config: PersonaPlugConfig, base: BaseLM, scale: float | None = None):
        self.settings = config
        self.encoder = Encoder(config.encoder, device=base.device)
        self.histories = Histories(config, self.encoder)
        scale = prefix_scale(config, base) if scale is None else scale
        self.embedder = UserEmbedder(config, self.encoder, base.hidden_size, scale).to(base.device)

    def batch(
        self, keys: Sequence[str], keeps: Sequence[np.ndarray | None], requests: Sequence[Request]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """Histories [B, N, d] (float32, ragged ones padded), mask [B, N], tokenised queries; on the CPU."""
        rows = self.histories.store.rows_of(keys)
        kept = [row if keep is None else row[keep] for row, keep in zip(rows, keeps, strict=True)]
        history, mask = self.histories.store.gather_rows(kept)
        return history, mask, self.queries(requests)

    def queries(self, requests: Sequence[Request]) -> dict[str, Tensor] | None:
        """Tokenised queries, on the CPU; None where there is no query encoder."""
        encoder = self.embedder.query_encoder
        if encoder is None:
            return None
        return encoder.tokenize([query_text(request, self.settings.compat) for request in requests])

    def _inputs(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        history, mask = self.histories.gather([(request.persona, request.task) for request in requests])
        device = next(self.embedder.parameters()).device
        query = self.queries(requests)
        query = None if query is None else {name: tensor.to(device) for name, tensor in query.items()}
        return history.to(device), mask.to(device), query

    @torch.no_grad()
    def embeddings(self, requests: Sequence[Request]) -> list[Tensor | None]:
        self.embedder.eval()
        vectors: list[Tensor | None] = []
        for start in range(0, len(requests), 256):
            vectors.extend(self.embedder(*self._inputs(requests[start : start + 256])))
        return vectors

    @torch.no_grad()
    def attention(self, requests: Sequence[Request]) -> list[np.ndarray] | None:
        """Per request the weights of its persona's encoded items (the last `history_limit`), in their order; None
        where no vector of the user is used."""
        if not self.settings.user_tokens:
            return None
        self.embedder.eval()
        history, mask, query = self._inputs(requests)
        weights = attention_weights(
            history, mask, self.embedder.encode_query(query, history), **self.embedder.options()
        )
        return [row[real].cpu().numpy() for row, real in zip(weights, mask, strict=True)]

    def config(self) -> dict[str, Any]:
        # The vectors in the store belong to the encoder's weights, and a folder of that name may hold others one day.
        return {**asdict(self.settings), "scale": self.embedder.scale, "encoder_weights": self._encoder_weights}

    @property
    def _encoder_weights(self) -> str:
        return str(self.encoder.fingerprint["weights"])

    def write(self, folder: Path) -> None:
        # A query encoder that was not trained is the published one, and is loaded from there again.
        state = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.embedder.state_dict().items()
            if self.settings.train_query_encoder or not name.startswith("query_encoder.")
        }
        save_file(state, folder / "embedder.safetensors")

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> PersonaPlug:
        config = dict(config)
        scale, weights = config.pop("scale"), config.pop("encoder_weights")
        config["encoder"] = EncoderConfig(**config["encoder"])
        plug = cls(PersonaPlugConfig(**config), base, scale)
        if plug._encoder_weights != weights:
            raise UserError(
                f"{folder} was trained with another encoder than the one that {plug.settings.encoder.name} is today"
            )
        state = load_file(folder / "embedder.safetensors")
        own = plug.embedder.state_dict()
        wrong = sorted(name for name in state if name not in own or own[name].shape != state[name].shape)
        trained = plug.settings.train_query_encoder
        absent = sorted(n for n in own if n not in state and (trained or not n.startswith("query_encoder.")))
        if wrong or absent:
            raise UserError(
                f"{folder}/embedder.safetensors does not fit its own config: {', '.join((wrong + absent)[:3])}"
            )
        plug.embedder.load_state_dict(state, strict=False)
        plug.embedder.requires_grad_(False).eval()
        return plug


def train(config: PersonaPlugConfig, under: LanguageModel, people: People, trainer: TrainerConfig, out: Path) -> Path:
    """Train a user embedder on top of `under` and write it to `out/personalizer`.

    Raises UserError for an empty training split, samples without a target, or settings that exclude each other.
    """
    if config.compat not in (None, "reference"):
        raise UserError(f"method.compat={config.compat!r} is unknown: use null or reference")
    torch.manual_seed(trainer.seed)
    base = under.base
    if not len(people.train):
        raise UserError("there is nothing to train on: the training split is empty")
    bare = [sample.id for sample in (*people.train, *people.dev) if not sample.target]
    if bare:
        raise UserError(f"{len(bare)} samples have no target to learn from, the first is {bare[0]}")
    with under.edit([]):  # the size of embeddings is that of the LM under the stack
        plug = PersonaPlug(config, base)
    train_data = PlugData(people.train, plug.histories, config.augment_copies, config.augment_drop, trainer.seed)
    dev_data = PlugData(people.dev, plug.histories, 0, 0.0, trainer.seed)
    prompter = LanguageModel(base, under.personalizers, under.batch_size, config.max_input_length)
    rendered: dict[tuple[str, Conversation], tuple[list[int], list[int]]] = {}

    def tokens(sample: Sample) -> tuple[list[int], list[int]]:
        # The same sample comes back in every copy and epoch; its tokens do not change.
        key = (sample.id, sample.messages)  # ids may come again in another split
        if key not in rendered:
            prompt = prompter.prompts([request_of(sample)])[0]
            rendered[key] = (prompt, base.render_reply(sample.messages, sample.target))
        return rendered[key]

    def collate(examples: list[Example]) -> dict[str, Any]:
        requests = [request_of(example.sample) for example in examples]
        history, mask, query = plug.batch([e.key for e in examples], [e.keep for e in examples], requests)
        pairs = [tokens(example.sample) for example in examples]
        return {
            "requests": requests,
            "prompts": [prompt for prompt, _ in pairs],
            "replies": [reply for _, reply in pairs],
            "history": history,
            "mask": mask,
            "query": query,
            "labels": torch.tensor([token for _, reply in pairs for token in reply]),
        }

    module = PlugTraining(under, plug.embedder, config.lm_dropout or config.compat == "reference")
    encoder = [p for n, p in plug.embedder.named_parameters() if n.startswith("query_encoder.") and p.requires_grad]
    rest = [p for n, p in plug.embedder.named_parameters() if not n.startswith("query_encoder.")]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if encoder:
        rate = trainer.learning_rate if config.encoder_learning_rate is None else config.encoder_learning_rate
        groups.append({"params": encoder, "lr": rate})
    with as_it_was(base.model):
        fit(module, train_data, dev_data, collate, trainer, out, groups)
    plug.embedder.eval()
    return save(plug, base, out / "personalizer", under.personalizers)
