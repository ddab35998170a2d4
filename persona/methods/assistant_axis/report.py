"""The axis stage's report: how long the axis is in each layer, how sure its direction, what persona space is like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from persona.errors import UserError
from persona.methods.assistant_axis import axis as geometry
from persona.methods.assistant_axis.extraction import HALVES, RoleSums

SCORES = {"fully": geometry.FULLY, "somewhat": geometry.SOMEWHAT}


class Found(NamedTuple):
    """`axis`, `default`, `pc1` [layers, hidden]; `vectors` by "fully/pirate", "somewhat/pirate", "traits/casual";
    `short`: how many rollouts roles (traits) without a vector have; `report`: JSON values."""

    axis: np.ndarray
    default: np.ndarray
    pc1: np.ndarray
    vectors: dict[str, np.ndarray]
    short: dict[str, int]
    report: dict[str, Any]


def make(
    default: RoleSums,
    roles: Mapping[str, RoleSums],
    traits: Mapping[str, RoleSums],
    norms: np.ndarray,
    min_count: int,
    layer: int | None,
    seed: int,
) -> Found:
    """The axis out of sums over rollouts (reference/assistant_axis 3.4). Raises UserError where fewer than two roles
    have `min_count` rollouts wholly in the role, for a `layer` that there is not, and for values that are not finite.
    """
    means = {label: _means(roles, score, min_count) for label, score in SCORES.items()}
    fully, somewhat = means["fully"].vectors, means["somewhat"].vectors
    if len(fully) < 2:
        best = max(roles, key=lambda name: roles[name].count(geometry.FULLY))
        raise UserError(
            f"{len(fully)} of {len(roles)} roles have {min_count} rollouts wholly in the role, too few for an axis: "
            f"{best} has most, {roles[best].count(geometry.FULLY)} (stages/verdicts has all scores)"
        )
    pairs = {name: one.count(1) for name, one in traits.items()}
    high, low = ({name: one.sum(side) for name, one in traits.items() if pairs[name]} for side in (1, 0))
    shown = geometry.trait_vectors(high, low, pairs, min_count)
    plain = default.mean(0)
    axis, stacked = geometry.compute_axis(plain, fully), np.stack(list(fully.values()))
    layer = len(axis) // 2 if layer is None else layer
    if not 0 <= layer < len(axis):
        raise UserError(f"method.layer={layer} is no layer: the base LM has layers 0 to {len(axis) - 1}")
    pc1 = np.stack([geometry.pca(stacked[:, at], axis[at]).components[0] for at in range(len(axis))]).astype(
        np.float32
    )
    persona_space = geometry.pca(np.stack([v[layer] for v in (*fully.values(), *somewhat.values())]), axis[layer])
    columns = {
        "axis_norm": np.linalg.norm(axis, axis=-1),
        "state_norm": norms,
        "pc1_cosine": geometry.cosine(axis, pc1),
        "halves_of_questions_cosine": _halves(default, roles, list(fully)),
    }
    intervals = {
        "resampled_roles": geometry.bootstrap_roles(plain, stacked, seed=seed),
        "split_roles": geometry.split_half(plain, stacked, seed=seed),
    }
    layers: list[dict[str, Any]] = [
        {"layer": at, **{key: _number(column[at]) for key, column in columns.items()},
         **{key: {end: _number(getattr(one, end)[at]) for end in one._fields} for key, one in intervals.items()}}
        for at in range(len(axis))
    ]  # fmt: skip
    named = [f"{label}/{name}" for label, found in means.items() for name in found.vectors]
    report = {
        "layer": layer,
        "min_count": min_count,
        "default": default.count(0),
        "scores": {name: {str(score): one.count(score) for score in range(4)} for name, one in roles.items()},
        "trait_pairs": pairs,
        "short": means["fully"].short,
        "short_traits": shown.short,
        "layers": layers,
        "persona_space": {
            "vectors": named,
            "explained": [_number(share) for share in persona_space.explained],
            "dimensions": {f"{share:g}": persona_space.dimensions(share) for share in geometry.SHARES},
        },
    }
    vectors = {f"{label}/{name}": vector for label, found in means.items() for name, vector in found.vectors.items()}
    vectors |= {f"traits/{name}": vector for name, vector in shown.vectors.items()}
    return Found(axis, plain.astype(np.float32), pc1, vectors, means["fully"].short | shown.short, report)


def _means(roles: Mapping[str, RoleSums], score: int, min_count: int) -> geometry.Means:
    counts = {(name, score): one.count(score) for name, one in roles.items()}
    sums = {(name, score): one.sum(score) for name, one in roles.items() if one.count(score)}
    return geometry.role_vectors(sums, counts, min_count, score)


def _halves(default: RoleSums, roles: Mapping[str, RoleSums], names: list[str]) -> np.ndarray:
    """Cosine [layers] between the axes of two halves of the questions, over roles that have rollouts in both; nan
    where there are none."""
    both = [name for name in names if all(roles[name].count(geometry.FULLY, half) for half in range(HALVES))]
    if not both or not all(default.count(0, half) for half in range(HALVES)):
        return np.full(len(default.mean(0)), np.nan)
    first, second = (
        geometry.compute_axis(default.mean(0, half), {name: roles[name].mean(geometry.FULLY, half) for name in both})
        for half in range(HALVES)
    )
    return geometry.cosine(first, second)


def _number(value: Any) -> float | None:
    """For JSON, which has no nan."""
    return float(value) if np.isfinite(value) else None
