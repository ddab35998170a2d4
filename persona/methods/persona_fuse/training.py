"""The three stages: warm-up of the experts, the router, both together (notes 3.2)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from persona.errors import UserError
from persona.lm import Row as LmRow
from persona.lm import adapters, assemble
from persona.lm.batch import forward_logits
from persona.methods.persona_fuse import losses
from persona.methods.persona_fuse.config import JointConfig, PersonaFuseConfig, RouterStageConfig
from persona.methods.persona_fuse.data import Rounds, Row, Twos, targets_of
from persona.methods.persona_fuse.experts import Experts
from persona.methods.persona_fuse.mixture import Mixture
from persona.methods.persona_fuse.router import Routing
from persona.personalizer import LanguageModel
from persona.training.lora import as_it_was
from persona.training.losses import dpo_loss
from persona.training.trainer import TrainerConfig, fit
from persona.types import Request

# ---- losses over rows and over processes ---------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Rows of all processes, in the order of their ranks; gradients of all of them come back to each row's own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad.split(ctx.counts)[torch.distributed.get_rank()], None


def gathered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each [B, …] of this process → [rows of all processes, …], with gradients. B, the same of all that are given, may
    differ from process to process, and be 0."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensors
    own = torch.tensor([len(tensors[0])], device=tensors[0].device)
    each = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(each, own)
    counts = [int(count) for count in each]
    return tuple(_Gather.apply(tensor, counts) for tensor in tensors)


def reply_nll(under: LanguageModel, requests: Sequence[Request], prompts: Any, replies: Any) -> tuple[Tensor, Tensor]:
    """[B] each: the negative log-likelihood of each reply, summed over its tokens, and their number."""
    with torch.no_grad():
        prefixes = under.prefixes(requests)
    rows = [LmRow(*row) for row in zip(prompts, prefixes, requests, strict=True)]
    logits, targets = forward_logits(under.base, assemble(under.base, rows, replies))
    each = cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return each.sum(-1), (targets != -100).sum(-1)


class FuseTraining(nn.Module):
    """What the three stages share: the base LM stays in eval mode, and what was measured is logged beside the loss."""

    def __init__(self, under: LanguageModel) -> None:
        super().__init__()
        self.under = under
        self._noted: dict[str, list[Tensor]] = defaultdict(list)
        self._recomputes, self._entered = False, ExitStack()

    def train(self, mode: bool = True) -> FuseTraining:
        super().train(mode)
        # transformers recomputes activations in blocks that are in train mode; what is in them stays in eval mode.
        for block in self.under.base.model.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.training = mode
        return self

    def note(self, **values: Tensor) -> None:
        if self.training:
            for name, value in values.items():
                self._noted[name].append(value.detach().float())

    def notes(self) -> dict[str, float]:
        """Means since the last call, for metrics.jsonl (persona/training/trainer.py)."""
        found = {name: torch.stack(values).mean(0).cpu() for name, values in self._noted.items()}
        self._noted.clear()
        return {name: round(float(value), 6) for name, value in found.items()}

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self._recomputes = True
        self.under.base.model.gradient_checkpointing_enable(**kwargs)

    @contextmanager
    def edited(self, *contexts: AbstractContextManager[None]) -> Iterator[None]:
        """The contexts around a forward. Where activations are recomputed, the backward pass runs the blocks once
        more, and needs them too: they are then left at the next forward, or by `leave`."""
        self.leave()
        for context in contexts:
            self._entered.enter_context(context)
        try:
            yield
        finally:
            if not (self._recomputes and self.training):
                self.leave()

    def leave(self) -> None:
        self._entered.close()


# ---- first stage: experts, each on the rows of its own pole ---------------------------------------------------------


class WarmupTraining(FuseTraining):
    """Rows with one-hot gates. The loss is the sum over experts of each one's mean over its own rows, which is what
    each would have alone."""

    def __init__(self, under: LanguageModel, experts: Experts, together: int, dropout: float):
        super().__init__(under)
        self.experts, self.together, self.dropout = experts, together, dropout

    def forward(self, requests, prompts, replies, owners, labels, num_items_in_batch=None):
        which = owners[:, None]
        weights = torch.full_like(which, self.experts.scaling, dtype=torch.float32)
        dropout = self.dropout if self.training else 0.0
        experts = adapters.apply_stacked(self.under.base.model, self.experts.stacked, weights, which, dropout)
        with self.edited(self.under.edit(requests), experts):
            total, tokens = reply_nll(self.under, requests, prompts, replies)
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return {"loss": (total / tokens).sum() * self.together / count}


class ClipEach(TrainerCallback):
    """Each expert's gradient is cut to a norm of its own, as it would be alone."""

    def __init__(self, experts: Experts, norm: float):
        self.experts, self.norm = experts, norm

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # Asked for now: FSDP2 puts other parameters in the place of those that there were before the training.
        grads = [parameter.grad for parameter in self.experts.parameters() if parameter.grad is not None]
        if self.norm > 0 and grads:
            size = torch.stack([grad.flatten(1).norm(dim=-1) for grad in grads]).norm(dim=0)  # [E]
            for grad in grads:  # as torch.nn.utils.clip_grad_norm_ does
                grad *= (self.norm / (size + 1e-6)).clamp(max=1)[:, None, None]


def warm_up(
    under: LanguageModel, rows: Sequence[Row], config: PersonaFuseConfig, trainer: TrainerConfig, out: Path
) -> Experts:
    """Train every expert on the rows of its pole; the base LM stays frozen.

    All in one pass over mixed batches, or one after the other, with equal numbers (but for dropout, whose draws
    differ): an expert starts from a draw of its own, sees its own rows in an order of its own (`Rounds`) in as many
    steps, has a mean and a clipping of its own, and AdamW moves each number by itself. For every expert has rows in
    every batch, no step of AdamW moves one without.
    """
    c = config.warmup
    if c.together and trainer.max_grad_norm > 0 and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "DeepSpeed divides the gradients, of which each expert's is clipped by itself: choose "
            "method.warmup.together=false or trainer.max_grad_norm=0"
        )
    experts = Experts.new(under.base, config.lora, trainer.seed)
    numbers = list(range(experts.count))
    options = replace(trainer, learning_rate=c.learning_rate, epochs=c.epochs, batch_size=c.batch_size)
    for group in [numbers] if c.together else [[number] for number in numbers]:
        module = WarmupTraining(under, experts, len(group), config.lora.lora_dropout)
        data = Rounds(rows, group, trainer.seed)
        folder = out if c.together else out / str(group[0])
        groups = [{"params": list(experts.parameters())}]
        # The only expert with a gradient is clipped by the trainer.
        own = replace(options, max_grad_norm=0) if c.together else options
        clip = [ClipEach(experts, trainer.max_grad_norm)] if c.together else []
        _fit(module, under, data, None, _warmup_batch, own, folder, groups, clip)
    return experts


def _warmup_batch(items: list[list[tuple[Row, int]]]) -> dict[str, Any]:
    pairs = [pair for item in items for pair in item]
    return {**_batch([row for row, _ in pairs]), "owners": torch.tensor([owner for _, owner in pairs])}


def _batch(rows: Sequence[Row]) -> dict[str, Any]:
    # One label a row: the Trainer counts them over processes and accumulated batches, and the loss is a mean over
    # rows.
    return {
        "requests": [row.request for row in rows],
        "prompts": [row.prompt for row in rows],
        "replies": [row.reply for row in rows],
        "labels": torch.zeros(len(rows), dtype=torch.long),
    }


# ---- second and third stage: the router, then all together ----------------------------------------------------------


class RouterTraining(FuseTraining):
    """The router's losses over the batch of all processes; nothing of the base LM is computed."""

    def __init__(
        self, under: LanguageModel, mixture: Mixture, config: PersonaFuseConfig, terms: RouterStageConfig | JointConfig
    ):
        super().__init__(under)
        # Not `config`: transformers' W&B callback takes a model's for that of a PreTrainedModel.
        self.mixture, self.settings, self.terms = mixture, config, terms

    def losses(self, routing: Routing, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of the router's losses over the rows of all processes, and how many of them are this one's;
        heads of several layers count as one (p is then the layers' embeddings side by side, gates their mean loss).
        Rows whose label is -100 count nothing (persona/training/remainder.py)."""
        c, terms, real = self.settings, self.terms, labels != -100
        p, gates, targets = gathered(routing.p[real], routing.gates[real], targets[real])
        heads = p.shape[1]
        poles = targets.clone()
        poles[:, self.mixture.experts.count :] = 0  # neutral queries skip the contrastive loss
        flat, each = gates.flatten(0, 1), targets.repeat_interleave(heads, dim=0)
        found = {
            "contrastive": losses.contrastive_loss(
                p.flatten(0, 1), self.mixture.router.experts, poles.repeat_interleave(heads, dim=0), c.tau
            ),
            "consistency": losses.trait_consistency(p.flatten(1) / heads**0.5, targets, c.similarity),
            "kl": losses.gate_kl(each, flat),
            "balance": losses.load_balance(flat, c.router.top_k or 1),
        }
        self.note(**{f"router/{name}": value for name, value in found.items()})
        known = targets.sum(-1) > 0
        mean = gates.mean(1)
        right = targets.gather(-1, mean.argmax(-1, keepdim=True))[:, 0] > 0
        self.note(**{"router/accuracy": (right & known).sum() / known.sum().clamp(min=1)})
        self.note(**{"router/entropy": losses.entropy(gates).mean()})
        self.note(**{f"gate/{name}": value for name, value in zip(self.mixture.names, mean.mean(0), strict=True)})
        return torch.stack([getattr(terms, name) * value for name, value in found.items()]).sum(), real.sum()

    def forward(self, query, targets, labels, num_items_in_batch=None):
        # Each process has the loss of all; it counts in the measure of its own rows, so that all together count once.
        loss, own = self.losses(self.mixture.route(query), targets, labels)
        return {"loss": loss if num_items_in_batch is None else loss * own / num_items_in_batch}


class JointTraining(RouterTraining):
    """The replies under the mixture that the router chooses, and the router's losses beside it.

    Of a reply counts its negative log-likelihood per token, so that a long one weighs as much as a short one. With
    rejected replies behind the replies (2B rows), and `reference` [2B] the log-likelihoods of both without experts,
    it is sigmoid DPO.
    """

    def forward(  # type: ignore[override]
        self, requests, prompts, replies, query, targets, labels, rejected=None, reference=None,
        num_items_in_batch=None,
    ):  # fmt: skip
        routing = self.mixture.route(query)
        dropout = self.settings.lora.lora_dropout if self.training else 0.0
        said = routing
        if rejected is not None:
            requests, prompts, replies = [*requests, *requests], [*prompts, *prompts], [*replies, *rejected]
            said = Routing(*(torch.cat([tensor, tensor]) for tensor in routing))
        with self.edited(self.under.edit(requests), self.mixture.applied(self.under.base.model, said, dropout)):
            total, tokens = reply_nll(self.under, requests, prompts, replies)
        if rejected is None:
            each = total / tokens
            self.note(nll=each.mean())
        else:
            better, worse = (-total - reference).chunk(2)
            each = dpo_loss(better - worse, beta=self.settings.joint.beta)
            self.note(dpo=each.mean(), **{"rewards/accuracies": (better > worse).float().mean()})
        loss, own = self.losses(routing, targets, labels)
        if num_items_in_batch is None:
            return {"loss": each.mean() + loss}
        return {"loss": (each.sum() + loss * own) / num_items_in_batch}


def train_router(
    under: LanguageModel,
    mixture: Mixture,
    rows: Sequence[Row],
    dev: Sequence[Row],
    config: PersonaFuseConfig,
    trainer: TrainerConfig,
    out: Path,
) -> None:
    """Train encoder, head and expert vectors of the mixture's router; its experts stay frozen."""
    c = config.routing
    mixture.requires_grad_(False)
    mixture.router.requires_grad_(True).encoder.requires_grad_(config.router.train_encoder)
    if config.router.granularity == "token":
        mixture.router.token.requires_grad_(False)  # no loss of this stage sees it
    encoder = [p for p in mixture.router.encoder.parameters() if p.requires_grad]
    heads = [p for n, p in mixture.router.named_parameters() if not n.startswith("encoder.") and p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": heads}]
    if encoder:
        groups.append({"params": encoder, "lr": c.encoder_learning_rate})

    def collate(items: list[list[Row]]) -> dict[str, Any]:
        rows = [row for item in items for row in item]
        return {**_routed(mixture, rows), "labels": torch.zeros(len(rows), dtype=torch.long)}

    module = RouterTraining(under, mixture, config, c)
    options = _in_twos(trainer, c.learning_rate, c.epochs, c.batch_size)
    _fit(module, under, Twos(rows, trainer.seed), _twos(dev, trainer.seed), collate, options, out, groups)


def train_joint(
    under: LanguageModel,
    mixture: Mixture,
    rows: Sequence[Row],
    dev: Sequence[Row],
    config: PersonaFuseConfig,
    trainer: TrainerConfig,
    out: Path,
    rejected: Mapping[str, str] | None = None,
) -> None:
    """Train experts and router together on the responses, or with a rejected reply for each row's id by preference.

    The reference of DPO is the LM without the experts; its log-likelihoods are computed once, before the first step.
    """
    c = config.joint
    mixture.requires_grad_(True).router.encoder.requires_grad_(config.router.train_encoder)
    worse: dict[str, tuple[list[int], float, float]] = {}
    if rejected is not None:
        rows, dev = [row for row in rows if row.id in rejected], ()
        worse = _references(under, rows, rejected)

    def collate(items: list[list[Row]]) -> dict[str, Any]:
        rows = [row for item in items for row in item]
        batch = {**_batch(rows), **_routed(mixture, rows)}
        if rejected is None:
            return batch
        replies, chosen, other = zip(*(worse[row.id] for row in rows), strict=True)
        return {**batch, "rejected": list(replies), "reference": torch.tensor([*chosen, *other])}

    module = JointTraining(under, mixture, config, c)
    options = _in_twos(trainer, c.learning_rate, c.epochs, c.batch_size)
    groups = [_plain(mixture.experts), {"params": [p for p in mixture.router.parameters() if p.requires_grad]}]
    _fit(module, under, Twos(rows, trainer.seed), _twos(dev, trainer.seed), collate, options, out, groups)


def _references(
    under: LanguageModel, rows: Sequence[Row], rejected: Mapping[str, str]
) -> dict[str, tuple[list[int], float, float]]:
    """By id the rejected reply's tokens, and what `under` gives the reply and it as log-likelihoods."""
    requests, worse = [row.request for row in rows], [rejected[row.id] for row in rows]
    scored = [under.loglikelihood(requests, said) for said in ([row.target for row in rows], worse)]
    return {
        row.id: (under.base.render_reply(row.request.messages, reply), chosen[0], other[0])
        for row, reply, chosen, other in zip(rows, worse, *scored, strict=True)
    }


def _routed(mixture: Mixture, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "query": mixture.router.tokenize([row.request for row in rows]),
        "targets": targets_of([row.vector for row in rows], mixture.router.config.null_expert),
    }


def _plain(experts: Experts) -> dict[str, Any]:
    return {"params": list(experts.parameters()), "weight_decay": 0.0}


def _twos(rows: Sequence[Row], seed: int) -> Twos | None:
    return Twos(rows, seed) if rows else None


def _in_twos(trainer: TrainerConfig, rate: float, epochs: float, rows: int) -> TrainerConfig:
    """Batch sizes count rows; the items of `Twos` are two each."""
    return replace(trainer, learning_rate=rate, epochs=epochs, batch_size=max(1, rows // 2))


def _fit(
    module: FuseTraining,
    under: LanguageModel,
    train: Dataset,
    dev: Dataset | None,
    collate: Callable[[list[Any]], dict[str, Any]],
    trainer: TrainerConfig,
    out: Path,
    groups: list[dict[str, Any]],
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    torch.manual_seed(trainer.seed)
    with as_it_was(under.base.model):
        try:
            fit(module, train, dev, collate, trainer, out, groups, callbacks)
        finally:
            module.leave()
    module.eval()
