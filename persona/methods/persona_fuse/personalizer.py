"""What the method leaves behind: ten adapters that PEFT reads, a router, and how they are put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona.encoders import EncoderConfig
from persona.errors import UserError
from persona.lm import BaseLM
from persona.lm.residual import blocks
from persona.methods.persona_fuse.config import RouterConfig
from persona.methods.persona_fuse.experts import Experts, read_experts, write_experts
from persona.methods.persona_fuse.mixture import Mixture
from persona.methods.persona_fuse.router import Router, Routing
from persona.personalizer import Mixed, Personalizer
from persona.types import Request

EXPERTS, ROUTER = "experts", "router.safetensors"


def mixture(config: RouterConfig, base: BaseLM, experts: Experts, seed: int = 0) -> Mixture:
    """Experts under a new router."""
    return Mixture(base, experts, Router(config, base, len(blocks(base.model)), seed, experts.count))


class Alone(Personalizer):
    """One expert for whatever is asked, in the weights."""

    method = "persona_fuse_expert"

    def __init__(self, base: BaseLM, mixture: Mixture, number: int):
        self.base, self.mixture, self.number = base, mixture, number

    def modules(self, requests: Sequence[Request]) -> AbstractContextManager[None]:
        gate = torch.eye(len(self.mixture.names), device=self.base.device)[self.number]
        return self.mixture.experts.folded(self.base.model, gate)

    def config(self) -> dict[str, Any]:
        return {"expert": self.mixture.names[self.number]}


class PersonaFuse(Personalizer):
    """Third door only: each row of a batch is answered by the mixture that its own query calls for."""

    method = "persona_fuse"

    def __init__(self, base: BaseLM, mixture: Mixture, fold: bool = False):
        self.base, self.fold = base, fold
        self.mixture = mixture.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """What the columns of `gate` stand for: the ten poles, and "null" where there is a null expert."""
        return self.mixture.names

    @torch.no_grad()
    def route(self, asked: Sequence[Request | str]) -> Routing:
        """The routing of each request (or bare text of a user)."""
        return self.mixture.eval().route(self.mixture.tokenize(asked))

    def gate(self, asked: Sequence[Request | str], batch_size: int = 64) -> Tensor:
        """[B, experts], float32 on the CPU: the gate of each request (or bare text), its columns as in `names`, each
        row summing to 1. With a gate per layer the mean over layers; with one per token what the query alone gives."""
        parts = [self.route(asked[i : i + batch_size]).gates.mean(1).cpu() for i in range(0, len(asked), batch_size)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.names))

    @contextmanager
    def modules(self, requests: Sequence[Request]) -> Iterator[None]:
        with self.mixture.applied(self.base.model, self.route(requests), fold=self.fold):
            yield

    def mixes(self, requests: Sequence[Request]) -> Mixed:
        similarity = torch.eye(len(self.names))  # the null expert changes nothing, and is like none
        count = self.mixture.experts.count
        similarity[:count, :count] = self.mixture.experts.similarity()
        return Mixed(self.names, self.gate(requests).numpy(), similarity.numpy())

    def alone(self, name: str) -> Personalizer:
        return Alone(self.base, self.mixture, self.names.index(name))

    def config(self) -> dict[str, Any]:
        router = self.mixture.router
        return {"router": asdict(router.config), "encoder_weights": router.fingerprint, "fold": self.fold}

    def write(self, folder: Path) -> None:
        write_experts(self.mixture.experts, folder / EXPERTS, self.base)
        save_file(self.mixture.router.state(), folder / ROUTER)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> PersonaFuse:
        """Raises UserError where experts or router do not fit each other or their config, or where a frozen encoder is
        not the one it was trained with."""
        settings = RouterConfig(**{**config["router"], "sentence": EncoderConfig(**config["router"]["sentence"])})
        made = mixture(settings, base, read_experts(folder / EXPERTS, base))
        if not settings.train_encoder and made.router.fingerprint != config["encoder_weights"]:
            raise UserError(f"{folder} was trained with another encoder than the one that {settings.path} is today")
        made.router.restore(load_file(folder / ROUTER), folder / ROUTER)
        return cls(base, made.requires_grad_(False), config["fold"])
