"""The Assistant Axis (Lu et al., arXiv 2601.10387): how much a chat LM is its assistant, and a cap that keeps it so.

axis.py         vectors of roles, the axis of every layer, persona space, and how sure the direction is
calibration.py  where a cap lies: floors from projections of rollouts, bands of layers, the Pareto front
interchange.py  published files and other programs' files, read and written
"""

from __future__ import annotations

from torch import Tensor

from persona.lm.edits import add, cap
from persona.methods.assistant_axis.axis import compute_axis
from persona.metrics.projection import project

__all__ = ["cap", "compute_axis", "project", "steer"]


def steer(hidden: Tensor, axis: Tensor, alpha: float, mean_norm: float) -> Tensor:
    """hidden [..., H] + alpha · mean_norm · axis / |axis| [H]: the paper's steering (reference/assistant_axis 3.5).

    `mean_norm` is the mean norm of the layer's states on ordinary text, so that `alpha` means the same in every model;
    below zero it leads away from the assistant. The state keeps its dtype.
    """
    return add(hidden, axis, alpha, mean_norm)
