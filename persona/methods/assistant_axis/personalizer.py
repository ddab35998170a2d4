"""What the method leaves behind: the axis of every layer, and a cap or a push along it, as a personalizer that stacks.

    personalizers=[outputs/town_axis/personalizer]                                              the calibrated cap
    'personalizers=[{assistant_axis: {axis: outputs/town_axis/personalizer, mode: steer, strength: -0.4}}]'

axis.safetensors: axis, default and pc1 [layers, hidden], norms [layers] (mean length of the residual stream),
percentiles [101, layers] of rollouts' projections onto the axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona.errors import UserError
from persona.lm import BaseLM
from persona.lm.edits import POSITIONS, Counts, Edit, edited, unit
from persona.lm.residual import Site, blocks
from persona.methods.assistant_axis.calibration import QuantileDirection
from persona.personalizer import Personalizer, read_manifest
from persona.types import Request

FILE = "axis.safetensors"
BEST = (46 / 64, 54 / 64)  # the band that was best in Qwen3-32B, as shares of its depth (reference 3.6)
MODES, DIRECTIONS = ("cap", "steer"), ("axis", "pc1", "random", "orthogonal")


@dataclass(frozen=True)
class EditSettings:
    """`mode` cap: states are kept at or above a floor on the axis; steer: `strength` times the layer's mean norm is
    added along it, below zero away from the assistant.

    layers: "46:54", the end excluded, counted from 0; null: the published share of the depth for a cap, the middle
        layer for steering.
    quantile, quantile_direction: the floor, of the rollouts' projections, in whole hundredths (config.py).
    raised: how far above that the floor lies, in lengths of the layer's axis; an axis is as long as the way from the
        mean of the roles to the assistant. 0 as published.
    direction: of steering: the axis, the first principal component of the roles' vectors (pc1), or, as controls, a
        random one, or one that is orthogonal to the axis, drawn by `seed`.
    positions: all, prompt, response or last (persona/lm/edits.py); all as published.
    """

    mode: str = "cap"
    layers: str | None = None
    quantile: float = 0.25
    quantile_direction: str = "negated"
    raised: float = 0.0
    strength: float = 0.0
    direction: str = "axis"
    positions: str = "all"
    seed: int = 0


def band_of(layers: str | None, depth: int, mode: str = "cap") -> range:
    """The layers of a band "46:54". Raises UserError for another form, and layers that the LM does not have."""
    if layers is None:
        first = min(round(BEST[0] * depth), depth - 1) if mode == "cap" else depth // 2
        return range(first, max(round(BEST[1] * depth), first + 1) if mode == "cap" else first + 1)
    start, _, stop = layers.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(f'layers={layers} is no band: it should read "46:54", the end excluded')
    if int(stop) > depth:
        raise UserError(f"layers={layers} goes beyond the base LM, which has layers 0 to {depth - 1}")
    return range(int(start), int(stop))


def settings_of(config: dict[str, Any]) -> EditSettings:
    """Raises UserError for an unknown key, mode, direction or quantile."""
    known = [entry.name for entry in fields(EditSettings)]
    for key in config:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(
                f"personalizer assistant_axis has no setting {key}; did you mean {near}? ({', '.join(known)})"
            )
    found = EditSettings(**config)
    for key, choices in (("mode", MODES), ("direction", DIRECTIONS), ("positions", POSITIONS),
                         ("quantile_direction", get_args(QuantileDirection))):  # fmt: skip
        if getattr(found, key) not in choices:
            raise UserError(f"{key} {getattr(found, key)!r} of assistant_axis should be one of {', '.join(choices)}")
    if found.mode == "cap" and found.direction != "axis":
        raise UserError(
            f"a cap of assistant_axis lies on the axis, where its floors are from, not on {found.direction}"
        )
    percent = found.quantile * 100
    if not 0 <= percent <= 100 or abs(percent - round(percent)) > 1e-9:
        raise UserError(f"quantile {found.quantile:g} of assistant_axis should be a whole hundredth from 0 to 1")
    return found


def floor_of(tensors: Mapping[str, Tensor], settings: EditSettings, layer: int) -> float:
    """A cap's floor on the axis of a layer, in units of the residual stream."""
    percent = round(settings.quantile * 100)
    row = percent if settings.quantile_direction == "axis" else 100 - percent
    return float(tensors["percentiles"][row, layer]) + settings.raised * float(tensors["axis"][layer].norm())


class AssistantAxis(Personalizer):
    """The same edit for every request. `counts` has, per layer of a cap and over all forwards so far, how many states
    it was asked about and how many it moved."""

    method = "assistant_axis"

    def __init__(self, base: BaseLM, tensors: Mapping[str, Tensor], settings: EditSettings) -> None:
        self.base, self.tensors, self.settings, self.counts = base, dict(tensors), settings, Counts()
        axis, depth = tensors["axis"], len(blocks(base.model))
        if tuple(axis.shape) != (depth, base.hidden_size):
            raise UserError(
                f"the axis has {axis.shape[0]} layers of {axis.shape[1]} numbers, but {base.name} has {depth} of "
                f"{base.hidden_size}: it belongs to another LM"
            )
        self.layers = band_of(settings.layers, depth, settings.mode)
        self.edits = [self._edit(layer, along) for layer, along in zip(self.layers, self._directions(), strict=True)]

    def _edit(self, layer: int, along: Tensor) -> Edit:
        site, s = Site(layer), self.settings
        if s.mode == "cap":
            return Edit(site, "cap", along, floor=self.floor(layer), positions=s.positions)
        return Edit(site, "add", along, s.strength, float(self.tensors["norms"][layer]), positions=s.positions)

    def _directions(self) -> Tensor:
        """[layers of the edit, hidden]."""
        axis, kind = self.tensors["axis"].float(), self.settings.direction
        if kind in ("axis", "pc1"):
            return self.tensors[kind].float()[list(self.layers)]
        drawn = torch.randn(axis.shape, generator=torch.Generator().manual_seed(self.settings.seed))
        if kind == "orthogonal":
            drawn = drawn - (drawn * unit(axis)).sum(dim=-1, keepdim=True) * unit(axis)
        return drawn[list(self.layers)]

    def floor(self, layer: int) -> float:
        """Where the cap lies on the axis of a layer, in units of the residual stream."""
        return floor_of(self.tensors, self.settings, layer)

    @property
    def engaged(self) -> dict[int, float | None]:
        """Per layer of a cap the share of states that it moved so far; None where it has seen none."""
        return dict(zip(self.layers, self.counts.engaged() or [None] * len(self.layers), strict=True))

    def did(self) -> str:
        """The share of states that each layer's cap moved."""
        shares = [f"{share:.1%} in layer {layer}" for layer, share in self.engaged.items() if share is not None]
        return f"moved of the states {', '.join(shares)}" if self.settings.mode == "cap" and shares else ""

    def modules(self, requests: Sequence[Request]) -> AbstractContextManager[Any]:
        return edited(self.base.model, self.edits, counts=self.counts)

    def config(self) -> dict[str, Any]:
        return asdict(self.settings)

    def write(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> AssistantAxis:
        """From its own folder, or, by name, with the setting `axis`: another one's folder, of which the other settings
        given take the place."""
        config = dict(config)
        if "axis" in config and folder != Path():
            raise UserError(f"{folder}/personalizer.json names another folder as its axis: it should hold its own")
        if "axis" in config:
            folder = Path(config.pop("axis"))
            config = {**read_manifest(folder, base)["config"], **config}
        elif not (folder / FILE).is_file():
            raise UserError("personalizer assistant_axis needs the setting axis: the folder of one that was trained")
        return cls(base, load_file(folder / FILE), settings_of(config))
