"""Sixth stage: one adapter out of two (notes 3.7).

The change of the weights that is meant is the weighted sum of both changes, sum_i w_i s_i B_i A_i. `cat` is that
exactly, at the sum of the ranks; `svd` is the nearest to it of the largest single rank. `linear`, as published (PEFT's
`add_weighted_adapter`), sums A and B apart from each other, which adds cross terms as large as the parts:

    sum_i w_i s_i B_i A_i  +  sum_{i != j} sqrt(w_i s_i w_j s_j) B_i A_j
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from persona.errors import UserError
from persona.lm.adapters import Adapter, load_adapter

MODES = ("linear", "cat", "svd")


def merge(adapters: Sequence[Adapter | Path | str], weights: Sequence[float], mode: str = "linear") -> Adapter:
    """The adapters (or their folders in PEFT's format) with these weights as one adapter, whose scaling is 1.

    For each module A is [r, in] and B [out, r]; a module that only some of them change keeps their part of the sum.
    `linear` as PEFT does it: a negative weight's sign goes to A. Raises UserError for an unknown mode, as many weights
    as there are adapters not being given, and in `linear` for ranks that differ.
    """
    if mode not in MODES:
        raise UserError(f"merge mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if len(adapters) != len(weights) or not adapters:
        raise UserError(f"{len(adapters)} adapters and {len(weights)} weights: each adapter has one weight")
    loaded = [adapter if isinstance(adapter, Adapter) else load_adapter(adapter) for adapter in adapters]
    names = sorted({name for adapter in loaded for name in adapter.modules})
    merged = {}
    for name in names:
        parts = [
            (*adapter.modules[name], weight * adapter.scaling[name])
            for adapter, weight in zip(loaded, weights, strict=True)
            if name in adapter.modules
        ]
        merged[name] = _MERGED[mode](name, parts)
    return Adapter(merged, dict.fromkeys(names, 1.0))


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The change of every weight that is meant, [out, in] in float32 by module: sum_i w_i s_i B_i A_i."""
    changes: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, (down, up) in adapter.modules.items():
            change = weight * adapter.scaling[name] * (up.float() @ down.float())
            changes[name] = changes[name] + change if name in changes else change
    return changes


def difference(merged: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """How far a merged adapter is from the exact sum: the norm (over all modules) of what differs, over that of the
    sum. 0 is exact; 1 is an error as large as the change itself."""
    wanted, made = weighted_sum(adapters, weights), weighted_sum([merged], [1.0])
    off = sum(float((made[name] - change).square().sum()) for name, change in wanted.items())
    size = sum(float(change.square().sum()) for change in wanted.values())
    return (off / size) ** 0.5 if size else 0.0


Part = tuple[Tensor, Tensor, float]  # A, B, and the weight with the adapter's own scaling


def _linear(name: str, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    if len(ranks := {down.shape[0] for down, _, _ in parts}) > 1:
        raise UserError(f"linear merging needs equal ranks, module {name} has {sorted(ranks)}: use cat or svd")
    root = [abs(weight) ** 0.5 for _, _, weight in parts]
    sign = [1.0 if weight >= 0 else -1.0 for _, _, weight in parts]
    down = torch.stack([r * s * a for (a, _, _), r, s in zip(parts, root, sign, strict=True)]).sum(0)
    return down, torch.stack([r * b for (_, b, _), r in zip(parts, root, strict=True)]).sum(0)


def _cat(name: str, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    return torch.cat([weight * down for down, _, weight in parts]), torch.cat([up for _, up, _ in parts], dim=1)


def _svd(name: str, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    change = torch.stack([weight * (up.float() @ down.float()) for down, up, weight in parts]).sum(0)
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    rank = max(down.shape[0] for down, _, _ in parts)
    dtype = parts[0][0].dtype
    return right[:rank].to(dtype), (left[:, :rank] * values[:rank]).to(dtype)


_MERGED = {"linear": _linear, "cat": _cat, "svd": _svd}
