"""Projection onto an axis: how far a hidden state lies along a direction."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)


def project(hidden: Array, axis: np.ndarray | Tensor) -> Array:
    """<h, axis / |axis|> in float32, in units of the residual stream (reference/assistant_axis 3.4).

    hidden [..., H] with axis [H] gives [...]; hidden [..., L, H] with axis [L, H] (one direction for each layer) gives
    [..., L]. numpy in, numpy out; a tensor stays on its device. Raises ValueError for shapes that do not fit and for
    an axis without a direction (of length zero, or not finite).
    """
    states = torch.as_tensor(hidden)
    direction = torch.as_tensor(axis, device=states.device).float()
    if direction.ndim not in (1, 2) or states.shape[states.ndim - direction.ndim :] != direction.shape:
        raise ValueError(
            f"hidden states of shape {list(states.shape)} have no projection onto an axis of shape "
            f"{list(direction.shape)}: it has to be [H] or [L, H] and equal their last dimensions"
        )
    length = direction.norm(dim=-1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise ValueError("an axis of length zero, or with values that are not finite, has no direction")
    along = (states.float() * (direction / length)).sum(dim=-1)
    return along if isinstance(hidden, Tensor) else along.numpy()
