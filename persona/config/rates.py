"""The rates by which `plan=true` turns bytes and operations into seconds: inputs, none of them measured here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Card(NamedTuple):
    """GB (10^9 bytes) of memory, GB/s at which it is read, and GB/s to another GPU of the node, in one direction."""

    memory: float
    read: float
    link: float


# From the makers' data sheets. Links: NVLink where the card has it, else PCI express 4 with 16 lanes (5: H100 PCIe).
CARDS: dict[str, Card] = {
    "B200": Card(180, 7700, 900),
    "H200": Card(141, 4800, 450),
    "H100": Card(80, 3350, 450),
    "H100 PCIe": Card(80, 2000, 64),
    "A100": Card(80, 2039, 300),
    "A100 40GB": Card(40, 1555, 300),
    "L40S": Card(48, 864, 32),
    "RTX 4090": Card(24, 1008, 32),
    "A10": Card(24, 600, 32),
    "L4": Card(24, 300, 32),
}


@dataclass
class PlanRates:
    """`gpu`: one of CARDS; its operations a second are in persona/gpus.py. `utilisation`: the share of them that is
    reached. `intra`: GB/s from a GPU to the others of its node (null: the card's); `inter`: GB/s from a node to the
    others, all its adapters together; `disk`: GB/s at which checkpoints are written. The defaults of utilisation,
    inter and disk are assumptions: large dense trainings report 0.3 to 0.5, small batches stay below."""

    gpu: str = "H100"
    utilisation: float = 0.4
    intra: float | None = None
    inter: float = 50.0  # one adapter of 400 Gbit/s
    disk: float = 1.0
