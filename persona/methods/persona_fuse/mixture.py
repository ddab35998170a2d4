"""Experts and router together: a batch of queries in, a base LM that speaks with each row's own mixture out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from persona.data.situations import POLES
from persona.errors import UserError
from persona.lm import BaseLM
from persona.lm.residual import blocks
from persona.methods.persona_fuse.experts import NULL, Experts
from persona.methods.persona_fuse.router import Router, Routing, Tokens
from persona.types import Request


class Mixture(nn.Module):
    """`names`: what each column of a gate stands for. The base LM itself is no part of it."""

    def __init__(self, base: BaseLM, experts: Experts, router: Router):
        super().__init__()
        self.experts, self.router = experts, router
        self.names = (*POLES[: experts.count], *([NULL] if router.config.null_expert else []))
        if len(self.names) != router.count:
            raise UserError(f"the router is over {router.count} experts, null included, and there are {experts.count}")
        self.layer_of = layers_of(base, experts.names) if router.config.granularity != "sequence" else {}

    def tokenize(self, asked: Sequence[Request | str]) -> Tokens:
        tokens = self.router.tokenize(asked)
        return {name: tensor.to(self.router.vectors.device) for name, tensor in tokens.items()}

    def route(self, tokens: Tokens) -> Routing:
        return self.router(**tokens)

    @contextmanager
    def applied(self, model: nn.Module, routing: Routing, dropout: float = 0.0, fold: bool = False) -> Iterator[None]:
        """Within the context row b of `model` has the mixture of row b's routing. With `fold`, and where all rows have
        the same gate, as changed weights (no gradients)."""
        config, gates = self.router.config, routing.gates
        if config.granularity == "token":
            with self._by_token(model, routing.scores[:, 0], dropout):
                yield
            return
        if fold and bool((gates == gates[:1]).all()):
            with self.experts.folded(model, self._by_name(gates[0])):
                yield
            return
        with self.experts.applied(model, self._by_name(gates), config.top_k, dropout):
            yield

    def _by_name(self, gates: Tensor) -> Tensor | dict[str, Tensor]:
        """[…, H, N] → [..., N] for all modules, or for each by its name."""
        if self.router.heads == 1:
            return gates[..., 0, :]
        return {name: gates[..., layer, :] for name, layer in self.layer_of.items()}

    @contextmanager
    def _by_token(self, model: nn.Module, scores: Tensor, dropout: float) -> Iterator[None]:
        now: dict[int, Tensor] = {}

        def look(layer: int):
            def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                rows = scores.repeat_interleave(hidden.shape[0] // len(scores), dim=0)
                now[layer] = self.router.corrected(rows, layer, hidden)[..., : self.experts.count]

            return before

        with ExitStack() as stack:
            for layer, block in enumerate(blocks(model)):
                stack.callback(block.register_forward_pre_hook(look(layer), with_kwargs=True).remove)
            with self.experts.applied(model, _Now(now, self.layer_of), None, dropout):
                yield


class _Now:
    """The gates that a block's input has just decided, by the name of a module in it."""

    def __init__(self, now: dict[int, Tensor], layer_of: dict[str, int]):
        self.now, self.layer_of = now, layer_of

    def __getitem__(self, name: str) -> Tensor:
        return self.now[self.layer_of[name]]


def layers_of(base: BaseLM, names: Sequence[str]) -> dict[str, int]:
    """The decoder block that each module is in. Raises UserError for one that is in none."""
    inside = {id(part): layer for layer, block in enumerate(blocks(base.model)) for part in block.modules()}
    modules = dict(base.model.named_modules())
    if outside := [name for name in names if id(modules[name]) not in inside]:
        raise UserError(
            f"module {outside[0]} is in no decoder block and so has no gate of its own: choose "
            "method.router.granularity=sequence or other method.lora.target_modules"
        )
    return {name: inside[id(modules[name])] for name in names}
