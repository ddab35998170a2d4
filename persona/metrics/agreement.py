"""Agreement between judges: Krippendorff's alpha over any number of them, Cohen's kappa between two.

Both are 1 for perfect agreement, 0 for as much as chance gives, negative for less. Where no judgement varies, or
nothing was judged twice, agreement beyond chance is not defined: then both are nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import krippendorff
import numpy as np

Level = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(ratings: np.ndarray | Sequence[Sequence[float]], level: Level) -> float:
    """Krippendorff's alpha of ratings [judges, items], nan where a judge gave none.

    `level` says what a difference is: "nominal" any two values differ alike, "ordinal" by the ranks between them,
    "interval" by the square of their distance. Items with fewer than two ratings do not count. nan when none is left
    (one judge, say), or all ratings that count are equal. Raises ValueError for ratings that are not [judges, items].
    """
    values = np.asarray(ratings, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"ratings have to be [judges, items], and have the shape {list(values.shape)}")
    paired = values[:, (~np.isnan(values)).sum(axis=0) >= 2]
    if len(np.unique(paired[~np.isnan(paired)])) < 2:
        return float("nan")
    return float(krippendorff.alpha(reliability_data=paired, level_of_measurement=level))


def cohen_kappa(
    first: Sequence[float | str],
    second: Sequence[float | str],
    *,
    weights: Literal["linear", "quadratic"] | None = None,
    labels: Sequence[float | str] | None = None,
) -> float:
    """Cohen's kappa of two judges' verdicts on the same items.

    With `weights` a disagreement counts by the distance (or its square) between two places in `labels`, which is then
    the whole scale in its order. nan without items, and when both judges give one and the same verdict throughout.
    Raises ValueError for unequal lengths, for a verdict that is not in `labels`, and for `weights` without `labels`.
    """
    if len(first) != len(second):
        raise ValueError(f"kappa compares verdicts on the same items: {len(first)} and {len(second)} were given")
    if weights and labels is None:
        raise ValueError("weighted kappa needs labels: without the whole scale, distances on it are not known")
    scale = sorted({*first, *second}, key=str) if labels is None else list(labels)
    position = {label: index for index, label in enumerate(scale)}
    if outside := {*first, *second} - position.keys():
        raise ValueError(f"verdicts {sorted(outside, key=str)} are not among the labels {scale}")
    if len({*first, *second}) < 2:
        return float("nan")
    one, other = ([position[verdict] for verdict in verdicts] for verdicts in (first, second))
    from sklearn.metrics import cohen_kappa_score  # here, as every command would wait for it

    return float(cohen_kappa_score(one, other, labels=range(len(scale)), weights=weights))
