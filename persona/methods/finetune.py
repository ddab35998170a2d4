"""The baselines that change weights: supervised fine-tuning (full, LoRA) and one LoRA per user.

    python train.py method=finetune_lora data=lamp data.path=LaMP_time_3 personalizers='[{retrieval: {ranker: bm25}}]'

Fine-tuning with the profile in the prompt is fine-tuning on top of a retrieval personalizer. Per-user LoRA follows
LaMP's PEFT baseline: training pairs come from the user's own profile (lamp note 3.3), all users in one run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from persona import lm
from persona.data.base import People
from persona.data.base import task as task_rules
from persona.errors import UserError
from persona.lm import BaseLM, Row, adapters, assemble
from persona.lm.batch import forward_logits, nll_sum
from persona.personalizer import LanguageModel, Personalizer, save
from persona.training.lora import LoRA, LoraSettings, adapted, as_it_was, save_adapter
from persona.training.trainer import TrainerConfig, fit
from persona.types import HistoryItem, Message, Request, Sample, Sampling

# ---- config --------------------------------------------------------------------------------------------------------


@dataclass
class FinetuneConfig:
    """`mode`: "full" changes all weights, "lora" one adapter, "user_lora" one adapter per user of the data."""

    name: str = "finetune"
    mode: str = "lora"
    r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    target_modules: str = "all-linear"  # or a regular expression over module names
    max_input_length: int = 256
    split: str = "dev"  # user_lora: whose profiles


# ---- data ----------------------------------------------------------------------------------------------------------


class Pairs(Dataset):
    """(request, reply, owner) triples; `owner` is the user's number for per-user adapters, else -1."""

    def __init__(self, triples: list[tuple[Request, str, int]]):
        self.triples = triples

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, index: int) -> tuple[Request, str, int]:
        return self.triples[index]


def pairs_of(samples: Sequence[Sample]) -> list[tuple[Request, str, int]]:
    return [
        (Request(s.messages, s.persona, Sampling(max_new_tokens=0), s.options, s.task), s.target, -1) for s in samples
    ]


def profile_pair(sample: Sample, item: HistoryItem) -> tuple[str, str] | None:
    """A past item as (prompt, reply): the task's own rule; else the sample's prompt about this item, with its label.

    An item without a label teaches its own continuation: the first quarter of its words, then the rest.
    """
    rules = task_rules(sample.task)
    if rules.example is not None:
        return rules.example(item)
    if item.label is not None:
        prompt = sample.messages[-1].content
        # The last place where the query stands: the instruction in front may hold the same words.
        before, found, after = prompt.rpartition(rules.query_text(prompt) or prompt)
        return (f"{before}{item.text}{after}" if found else item.text), item.label
    words = item.text.split()
    if len(words) < 2:
        return None
    cut = max(1, len(words) // 4)
    return " ".join(words[:cut]), " ".join(words[cut:])


def profile_pairs(samples: Sequence[Sample]) -> tuple[list[tuple[Request, str, int]], list[str]]:
    """Training pairs of every user's profile, and the users in the order of their numbers. An item counts once."""
    users: dict[str, int] = {}
    seen: set[tuple[str, str, str]] = set()
    triples = []
    for sample in samples:
        persona = sample.persona
        if persona is None:
            continue
        owner = users.setdefault(persona.id, len(users))
        for item in persona.history:
            if (persona.id, sample.task, item.id) in seen:
                continue
            seen.add((persona.id, sample.task, item.id))
            pair = profile_pair(sample, item)
            if pair is not None:
                request = Request((Message("user", pair[0]),), persona, Sampling(max_new_tokens=0), None, sample.task)
                triples.append((request, pair[1], owner))
    return triples, list(users)


# ---- model and loss ------------------------------------------------------------------------------------------------


class FinetuneTraining(nn.Module):
    """Token cross entropy on the reply. `lm` holds the trainable weights; `own` the per-user ones, if any."""

    def __init__(self, under: LanguageModel, model: nn.Module, own: UserAdapters | None = None):
        super().__init__()
        self.under, self.lm, self.own = under, model, own

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.lm.gradient_checkpointing_enable(**kwargs)

    def forward(self, requests, prompts, replies, owners, labels, num_items_in_batch=None):
        with torch.no_grad():
            prefixes = self.under.prefixes(requests)
        with self.under.edit(requests):
            rows = [Row(*row) for row in zip(prompts, prefixes, requests, strict=True)]
            inputs = assemble(self.under.base, rows, replies)
            if self.own is None:
                logits, targets = forward_logits(self.under.base, inputs, self.lm)
            else:
                with self.own.applied(self.lm, owners):
                    logits, targets = forward_logits(self.under.base, inputs, self.lm)
        count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": nll_sum(logits, targets) / count}


class UserAdapters(nn.Module):
    """One LoRA per user over the attention and MLP projections: A [U, r, in], B [U, out, r] per module."""

    def __init__(self, shapes: dict[str, tuple[int, int]], users: int, r: int, alpha: int):
        super().__init__()
        self.scaling = alpha / r
        self.names = sorted(shapes)
        self.down = nn.ParameterList(
            [nn.Parameter(torch.randn(users, r, shapes[name][1]) / shapes[name][1] ** 0.5) for name in self.names]
        )
        self.up = nn.ParameterList([nn.Parameter(torch.zeros(users, shapes[name][0], r)) for name in self.names])

    def applied(self, model: nn.Module, owners: Sequence[int]) -> AbstractContextManager[None]:
        modules = {name: (self.down[i], self.up[i]) for i, name in enumerate(self.names)}
        return apply_own(model, modules, owners, self.scaling)


def apply_own(
    model: nn.Module, modules: adapters.Stacked, owners: Sequence[int], scaling: float
) -> AbstractContextManager[None]:
    """Row b has the adapter of user owners[b]; a row whose owner is below 0 is the base."""
    if max(owners, default=-1) < 0:
        return nullcontext()
    which = torch.tensor([[max(owner, 0)] for owner in owners])
    weights = torch.tensor([[scaling * (owner >= 0)] for owner in owners])
    return adapters.apply_stacked(model, modules, weights, which)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of every Linear but the output head."""
    head = model.get_output_embeddings()
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


# ---- training ------------------------------------------------------------------------------------------------------


def train(config: FinetuneConfig, under: LanguageModel, people: People, trainer: TrainerConfig, out: Path) -> Path:
    """Fine-tune on top of `under` and write the personalizer to `out/personalizer`; the base LM is left as it was.

    Raises UserError for an unknown mode, a sample without target, or users without any usable past item.
    """
    if config.mode not in TRAINERS:
        raise UserError(f"method.mode={config.mode!r} is unknown: use one of {', '.join(TRAINERS)}")
    torch.manual_seed(trainer.seed)
    base = under.base
    prompter = LanguageModel(base, under.personalizers, under.batch_size, config.max_input_length)

    def collate(triples: list[tuple[Request, str, int]]) -> dict[str, Any]:
        requests = [request for request, _, _ in triples]
        replies = [base.render_reply(request.messages, reply) for request, reply, _ in triples]
        return {
            "requests": requests,
            "prompts": prompter.prompts(requests),
            "replies": replies,
            "owners": [owner for _, _, owner in triples],
            "labels": torch.tensor([token for reply in replies for token in reply]),
        }

    # Remembered from here on: an adapter that training puts into the base's modules is not a part of the base.
    _ = base.identity

    def run(module: FinetuneTraining, train: Pairs, dev: Pairs | None, groups: list[dict] | None = None) -> None:
        fit(module, train, dev, collate, trainer, out, groups)

    with as_it_was(base.model), TRAINERS[config.mode](config, under, people, run, out) as personalizer:
        return save(personalizer, base, out / "personalizer", under.personalizers)


@contextmanager
def _full(config: FinetuneConfig, under: LanguageModel, people: People, run: Run, out: Path) -> Iterator[Weights]:
    # A copy is trained, and takes the base's place for the length of training.
    base, original = under.base, under.base.model
    tuned = copy.deepcopy(original).requires_grad_(True)
    base.model, base.embed = tuned, tuned.get_input_embeddings()
    try:
        run(FinetuneTraining(under, tuned), *_splits(people))
    finally:
        base.model, base.embed = original, original.get_input_embeddings()
    yield Weights(base, tuned.eval())


@contextmanager
def _lora(config: FinetuneConfig, under: LanguageModel, people: People, run: Run, out: Path) -> Iterator[LoRA]:
    settings = LoraSettings(config.r, config.lora_alpha, config.lora_dropout, config.target_modules)
    data, dev = _splits(people)
    with adapted(under.base, settings) as peft_model:
        run(FinetuneTraining(under, under.base.model), data, dev)
        folder = save_adapter(peft_model, out / "adapter")
    yield LoRA(under.base, folder)


@contextmanager
def _user_lora(
    config: FinetuneConfig, under: LanguageModel, people: People, run: Run, out: Path
) -> Iterator[UserLoRA]:
    base = under.base
    triples, users = profile_pairs(people.split(config.split))
    if not triples:
        raise UserError(f"no user of the {config.split} split has a past item to learn from")
    own = UserAdapters(linear_shapes(base.model), len(users), config.r, config.lora_alpha).to(base.device)
    # No decay: it would also move the adapters of users who are not in the batch.
    groups = [{"params": list(own.parameters()), "weight_decay": 0.0}]
    run(FinetuneTraining(under, base.model, own), Pairs(triples), None, groups)
    modules = {n: (own.down[i].detach(), own.up[i].detach()) for i, n in enumerate(own.names)}
    yield UserLoRA(base, users, modules, own.scaling)


def _splits(people: People) -> tuple[Pairs, Pairs]:
    bare = [sample.id for sample in (*people.train, *people.dev) if not sample.target]
    if bare:
        raise UserError(f"{len(bare)} samples have no target to learn from, the first is {bare[0]}")
    return Pairs(pairs_of(people.train)), Pairs(pairs_of(people.dev))


Run = Callable[..., None]
TRAINERS: dict[str, Callable[..., AbstractContextManager[Personalizer]]] = {
    "full": _full,
    "lora": _lora,
    "user_lora": _user_lora,
}


# ---- what is left behind -------------------------------------------------------------------------------------------


class Weights(Personalizer):
    """All weights, swapped in per forward; in `model/` as an ordinary model directory, also usable as `model.path`."""

    method = "weights"

    def __init__(self, base: BaseLM, tuned: Any):
        self.base, self.tuned = base, tuned

    @contextmanager
    def modules(self, requests: Sequence[Request]) -> Iterator[None]:
        own = dict(self.base.model.named_parameters())
        theirs = dict(self.tuned.named_parameters())
        try:
            for name, parameter in own.items():
                parameter.data, theirs[name].data = theirs[name].data, parameter.data
            yield
        finally:
            for name, parameter in own.items():
                parameter.data, theirs[name].data = theirs[name].data, parameter.data

    def config(self) -> dict[str, Any]:
        return {}

    def write(self, folder: Path) -> None:
        self.tuned.save_pretrained(folder / "model")
        self.base.tokenizer.save_pretrained(folder / "model")

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Weights:
        dtype = str(base.dtype).removeprefix("torch.")
        tuned = lm.load(lm.ModelConfig(path=str((folder / "model").resolve()), dtype=dtype, device=str(base.device)))
        return cls(base, tuned.model)


class UserLoRA(Personalizer):
    """One adapter per user, looked up by the persona's id; a user without one gets the base LM."""

    method = "user_lora"

    def __init__(self, base: BaseLM, users: Sequence[str], modules: dict[str, tuple[Tensor, Tensor]], scaling: float):
        self.base, self.users, self.adapters, self.scaling = base, list(users), modules, scaling
        self.number = {user: i for i, user in enumerate(self.users)}

    @contextmanager
    def modules(self, requests: Sequence[Request]) -> Iterator[None]:
        owners = [self.number.get(r.persona.id, -1) if r.persona is not None else -1 for r in requests]
        with apply_own(self.base.model, self.adapters, owners, self.scaling):
            yield

    def config(self) -> dict[str, Any]:
        return {"scaling": self.scaling}

    def write(self, folder: Path) -> None:
        tensors = {}
        for name, (down, up) in self.adapters.items():
            tensors[f"{name}.A"], tensors[f"{name}.B"] = down.cpu().contiguous(), up.cpu().contiguous()
        save_file(tensors, folder / "adapters.safetensors")
        (folder / "users.json").write_text(json.dumps(self.users))

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> UserLoRA:
        tensors = load_file(folder / "adapters.safetensors", device=str(base.device))
        names = sorted({name.rpartition(".")[0] for name in tensors})
        modules = {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
        return cls(base, json.loads((folder / "users.json").read_text()), modules, config["scaling"])
