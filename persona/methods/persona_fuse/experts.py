"""The experts: one LoRA for each pole of the Big Five, side by side in stacked tensors, applied as one product.

    h = W x + scaling · sum_i g_i B_i A_i x            (reference/persona_fuse.md 3.2)

On disk each expert is an ordinary adapter in PEFT's format, in a folder named after its pole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from persona.data.situations import POLES
from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.lm import BaseLM, adapters
from persona.lm.adapters import Adapter
from persona.methods.finetune import linear_shapes
from persona.training.lora import LoraSettings

NULL = "null"
FOLDERS = tuple(f"{pole[0]}_{'high' if pole[1] == '+' else 'low'}" for pole in POLES)


class Experts(nn.Module):
    """Per adapted module A [E, r, in] and B [E, out, r], in the order of POLES (or as many as there are)."""

    def __init__(self, names: Sequence[str], down: Sequence[Tensor], up: Sequence[Tensor], scaling: float):
        super().__init__()
        self.names, self.scaling = tuple(names), scaling
        self.down, self.up = nn.ParameterList(down), nn.ParameterList(up)
        self.count, self.rank = self.down[0].shape[:2]

    @classmethod
    def new(cls, base: BaseLM, settings: LoraSettings, seed: int, count: int = len(POLES)) -> Experts:
        """Experts that change nothing yet: A as PEFT draws it, B zero. An expert's draw depends on the seed, its
        number and the module's name only. Raises UserError when `target_modules` fits no module."""
        shapes = linear_shapes(base.model)
        if settings.target_modules != "all-linear":
            shapes = {name: shape for name, shape in shapes.items() if re.fullmatch(settings.target_modules, name)}
        if not shapes:
            raise UserError(
                f"target_modules={settings.target_modules!r} does not fit this base LM: it should be all-linear, or a "
                "regular expression that matches whole module names"
            )
        down, up = [], []
        for name, (wide, narrow) in sorted(shapes.items()):
            drawn = []
            for number in range(count):
                generator = torch.Generator().manual_seed(seed_of(seed, "expert", number, name))
                drawn.append((torch.rand(settings.r, narrow, generator=generator) * 2 - 1) / math.sqrt(narrow))
            down.append(torch.stack(drawn).to(base.device))
            up.append(torch.zeros(count, wide, settings.r, device=base.device))
        return cls(sorted(shapes), down, up, settings.lora_alpha / settings.r)

    @property
    def stacked(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (self.down[i], self.up[i]) for i, name in enumerate(self.names)}

    @contextmanager
    def applied(
        self, model: nn.Module, gates: Tensor | Mapping[str, Tensor], top_k: int | None = None, dropout: float = 0.0
    ) -> Iterator[None]:
        """Within the context row b of `model` has the experts weighted by its gates, [B, E or E + 1] for all modules
        or for each by its name; a column behind the experts' is the null expert's and changes nothing.

        With `top_k` only so many gates of a row may differ from zero, and only those experts are computed.
        """
        if top_k is None:
            weights, which = self._of(gates, self._all), None
        else:
            weights = self._of(gates, lambda g: self._best(g, top_k)[0])
            which = self._of(gates, lambda g: self._best(g, top_k)[1])
        with adapters.apply_stacked(model, self.stacked, weights, which, dropout):
            yield

    @contextmanager
    def folded(self, model: nn.Module, gates: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
        """As `applied` for one gate [E or E + 1], in the weights themselves for the length of the context."""
        with adapters.folded(model, self.stacked, self._of(gates, self._all)):
            yield

    def _all(self, gates: Tensor) -> Tensor:
        return gates[..., : self.count] * self.scaling

    def _best(self, gates: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """[B, k] each: weights and numbers of the experts; where the null expert is among them, weight 0 of some."""
        values, which = gates.topk(top_k, dim=-1)
        real = which < self.count
        return values * real * self.scaling, which * real

    @staticmethod
    def _of(gates, read) -> adapters.Weights:
        return read(gates) if isinstance(gates, Tensor) else lambda name: read(gates[name])

    def expert(self, number: int) -> Adapter:
        """One of them, as it loads alone."""
        modules = {name: (a[number].detach().cpu(), b[number].detach().cpu()) for name, (a, b) in self.stacked.items()}
        return Adapter(modules, dict.fromkeys(modules, self.scaling))

    def similarity(self) -> Tensor:
        """[E, E]: the cosine between the changes of weights B A that the experts make, over all modules; 0 with one
        that changes nothing."""
        inner = torch.zeros(self.count, self.count, dtype=torch.float64)
        for down, up in self.stacked.values():
            # <B_i A_i, B_j A_j> = sum over ranks of (B_i' B_j) · (A_i A_j'), without a matrix of W's size
            left = torch.einsum("ior,jos->ijrs", up.detach().double(), up.detach().double())
            right = torch.einsum("irn,jsn->ijrs", down.detach().double(), down.detach().double())
            inner += (left * right).sum((-1, -2)).cpu()
        size = inner.diagonal().clamp(min=0).sqrt()
        return (inner / (size[:, None] * size).clamp(min=torch.finfo(torch.float64).tiny)).float()


def write_experts(experts: Experts, folder: Path, base: BaseLM) -> None:
    """One folder in PEFT's format for each expert."""
    for number, name in enumerate(FOLDERS[: experts.count]):
        adapters.save(experts.expert(number), folder / name, base.name)


def read_experts(folder: Path, base: BaseLM) -> Experts:
    """Ten folders in PEFT's format, whoever wrote them. Raises UserError for one that is missing or damaged, and for
    one with another rank, scaling or other modules than the first: stacked they are of one shape."""
    found = [adapters.load_adapter(folder / name) for name in FOLDERS]
    shapes = [{name: (a.shape, b.shape, one.scaling[name]) for name, (a, b) in one.modules.items()} for one in found]
    for name, shape in zip(FOLDERS, shapes, strict=True):
        if shape != shapes[0] or len(set(found[0].scaling.values())) > 1:
            raise UserError(
                f"expert {folder / name} differs from {FOLDERS[0]} in its modules, rank or scaling: all experts "
                "should have the same"
            )
    names = sorted(found[0].modules)
    down = [torch.stack([one.modules[name][0] for one in found]).to(base.device) for name in names]
    up = [torch.stack([one.modules[name][1] for one in found]).to(base.device) for name in names]
    return Experts(names, down, up, found[0].scaling[names[0]]).requires_grad_(False)
