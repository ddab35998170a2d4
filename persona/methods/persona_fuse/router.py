"""The router: a persona encoder reads the user's turns, and a gate over the experts follows (notes 3.2).

    z   = pool(Enc(query))               p   = normalize(MLP(z)),  Linear-GELU-Linear
    e_i = normalize(expert vector i)     g   = softmax(p·e / temperature), pole guard, top-k

It never sees a reply: nothing but the messages of role "user" is read, so that a whole answer has one persona.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from persona import lm
from persona.data.situations import POLES
from persona.encoders import Encoder
from persona.errors import UserError
from persona.lm import BaseLM
from persona.methods.persona_fuse.config import RouterConfig
from persona.types import Message, Request

Tokens = dict[str, Tensor]


class Routing(NamedTuple):
    """p [B, H, d] of length 1 and its `norm` [B, H] before; scores p·e and gates [B, H, N]. H is 1, or the layers of
    the base LM where each has a gate of its own; N the experts, the null expert last."""

    p: Tensor
    norm: Tensor
    scores: Tensor
    gates: Tensor


class CausalEncoder(nn.Module):
    """A causal LM's hidden states after its last block, pooled: of the "last" non-pad token, or their "mean"."""

    def __init__(self, base: BaseLM, pooling: str, max_length: int):
        super().__init__()
        if base.is_encoder_decoder:
            raise UserError(f"{base.name} is no causal LM: choose method.router.encoder=sentence or another path")
        self.base, self.pooling = base, pooling
        self.model = base.model.get_decoder()
        self.max_length = min(max_length, base.max_positions or max_length)
        self.dim = base.hidden_size

    def tokenize(self, turns: Sequence[Sequence[str]]) -> Tokens:
        """User turns of each row → input_ids and attention_mask [B, T], padded on the right, on the CPU."""

        def prompt(text: str) -> list[Message]:
            return [Message("user", text)]  # one turn: templates refuse two of one role

        texts = [fitting(row, lambda text: len(self.base.render(prompt(text))), self.max_length) for row in turns]
        ids = [torch.tensor(self.base.fit(prompt(text), self.max_length)[0]) for text in texts]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.base.tokenizer.pad_token_id or 0),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        }

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T], [B, T] → [B, hidden] in float32."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if self.pooling == "last":
            last = attention_mask.sum(-1) - 1
            return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        mask = attention_mask[..., None].float()
        return (hidden.float() * mask).sum(1) / mask.sum(1)


class SentenceEncoder(nn.Module):
    """A text encoder of persona/encoders.py."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.model = encoder.module()
        self.dim = encoder.dim

    def tokenize(self, turns: Sequence[Sequence[str]]) -> Tokens:
        """User turns of each row → input_ids and attention_mask [B, T], on the CPU."""
        limit = self.model.max_length - 1  # what is cut has max_length
        return self.model.tokenize([fitting(row, lambda t: len(self.model.token_ids([t])[0]), limit) for row in turns])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask)


def fitting(turns: Sequence[str], length: Callable[[str], int], limit: int) -> str:
    """The turns, a line each, without the earliest ones as far as they do not fit."""
    first = 0
    while first < len(turns) - 1 and length("\n".join(turns[first:])) > limit:
        first += 1
    return "\n".join(turns[first:])


def user_turns(asked: Request | str) -> list[str]:
    """What the router reads of a request (or of a bare text)."""
    if isinstance(asked, str):
        return [asked]
    return [message.content for message in asked.messages if message.role == "user"] or [""]


class Router(nn.Module):
    """Encoder, head and expert vectors. Everything is trained but an encoder that is kept frozen."""

    def __init__(self, config: RouterConfig, base: BaseLM, layers: int, seed: int, count: int = len(POLES)):
        super().__init__()
        _check(config, count + config.null_expert)
        self.config, self.count = config, count + config.null_expert
        self.heads = layers if config.granularity == "layer" else 1
        self.encoder, self.fingerprint = encoder_of(config, base)
        self.encoder.requires_grad_(config.train_encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Linear(self.encoder.dim, config.hidden),
                nn.GELU(),
                nn.Linear(config.hidden, self.heads * config.dim),
            )
            self.vectors = nn.Parameter(torch.randn(self.count, config.dim))
        if config.granularity == "token":
            # A correction to the scores out of each block's own input; zero at first, so that it begins as "sequence".
            self.token = nn.Parameter(torch.zeros(layers, self.count, base.hidden_size))
        self.to(base.device)

    @property
    def experts(self) -> Tensor:
        """[N, d]: the experts' vectors, of length 1."""
        return normalize(self.vectors, dim=-1)

    def train(self, mode: bool = True) -> Router:
        super().train(mode)
        if not self.config.train_encoder:
            self.encoder.eval()
        return self

    def tokenize(self, asked: Sequence[Request | str]) -> Tokens:
        return self.encoder.tokenize([user_turns(one) for one in asked])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Routing:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_encoder):
            z = self.encoder(input_ids, attention_mask)
        raw = self.head(z).float().unflatten(-1, (self.heads, self.config.dim))
        p = normalize(raw, dim=-1)
        scores = p @ self.experts.T
        return Routing(p, raw.norm(dim=-1), scores, self.gates(scores))

    def gates(self, scores: Tensor) -> Tensor:
        """Cosines [..., N] → gates [..., N] that sum to 1."""
        gates = (scores / self.config.temperature).softmax(-1)
        if self.config.pole_guard:
            gates = guarded(gates, self.count - self.config.null_expert)
        return gates if self.config.top_k is None else best(gates, self.config.top_k)

    def corrected(self, scores: Tensor, layer: int, hidden: Tensor) -> Tensor:
        """Gates of every token in one block, [B, T, N], out of the sequence's scores [B, N] and the block's input
        [B, T, hidden], in which only the direction counts."""
        return self.gates(scores[:, None] + normalize(hidden.float(), dim=-1) @ self.token[layer].T)

    def state(self) -> Tokens:
        """What is saved: all but a frozen encoder, which is loaded from where it came from."""
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if self.config.train_encoder or not name.startswith("encoder.")
        }

    def restore(self, state: Tokens, where: Any) -> None:
        """Raises UserError for the state of a router over another number of experts, or of another shape."""
        found = len(state["vectors"]) if "vectors" in state else 0
        if found != self.count:
            raise UserError(
                f"{where} is a router over {found} experts, but there are {self.count} here, null included"
            )
        own = self.state()
        odd = sorted(n for n in {*own, *state} if n not in own or n not in state or own[n].shape != state[n].shape)
        if odd:
            raise UserError(f"{where} does not fit the router of its own config: {', '.join(odd[:3])}")
        self.load_state_dict(state, strict=False)


def guarded(gates: Tensor, poles: int) -> Tensor:
    """The weaker pole of each trait is taken away from both, and what is left sums to 1 again; a gate of which nothing
    would be left stays."""
    pairs = gates[..., :poles].unflatten(-1, (-1, 2))
    pairs = pairs - pairs.amin(-1, keepdim=True)
    left = torch.cat([pairs.flatten(-2), gates[..., poles:]], dim=-1)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 1e-6, left / total.clamp(min=1e-6), gates)


def best(gates: Tensor, k: int) -> Tensor:
    """The k largest gates, summing to 1 again (MixLoRA's rule)."""
    values, which = gates.topk(k, dim=-1)
    return torch.zeros_like(gates).scatter(-1, which, values / values.sum(-1, keepdim=True))


def _check(config: RouterConfig, count: int) -> None:
    if config.top_k is not None and not 1 <= config.top_k <= count:
        raise UserError(f"method.router.top_k={config.top_k} should be 1 to {count}, or null for all experts")
    if config.temperature <= 0:
        raise UserError(f"method.router.temperature={config.temperature} has to be positive")


def encoder_of(config: RouterConfig, base: BaseLM) -> tuple[CausalEncoder | SentenceEncoder, str]:
    """The encoder as it comes, and the fingerprint of its weights."""
    if config.encoder == "sentence":
        encoder = Encoder(config.sentence, device=base.device)
        return SentenceEncoder(encoder), str(encoder.fingerprint["weights"])
    path = base.name if config.path is None else config.path
    own = lm.load(lm.ModelConfig(path=path, device=str(base.device)))
    return CausalEncoder(own, config.pooling, config.max_length), str(own.identity["fingerprint"])
