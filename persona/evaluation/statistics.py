"""Intervals, paired tests and their correction, all clustered: samples that share a user are not independent.

Every metric here is a function of sums over rows (a mean, a root of a mean, F1 from counts), so a data set is reduced
once to one vector of sums per cluster, and thousands of resamples become one matrix product. Only numpy is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, stdtrit

from persona.errors import UserError

RESAMPLES = 5000
PERMUTATIONS = 10_000
_BLOCK = 2_000_000  # entries of one block of the resampling matrix: bounds memory, not results
_ECE_BINS = 20
_EXACT_CLUSTERS = 12  # up to here all 2^clusters swaps are enumerated instead of drawn


@dataclass(frozen=True, slots=True)
class Metric:
    """How the values of many rows become one number.

    `aggregate` is a key of `AGGREGATES`. `columns` names the entries of `Score.values` it reads; empty means the one
    entry named like the metric. `classes` is the number of labels for "macro_f1" (a label that occurs nowhere still
    counts as F1 = 0, as in LaMP's scorer) or of groups for "group_mean".
    """

    higher_is_better: bool = True
    aggregate: str = "mean"
    columns: tuple[str, ...] = ()
    classes: int | None = None
    description: str = ""

    def reads(self, name: str) -> tuple[str, ...]:
        """The columns this metric, called `name`, takes from a row."""
        return self.columns or (name,)


@dataclass(frozen=True, slots=True)
class Aggregate:
    """`rows`: columns, each [n], to the statistics [n, s] that are summed; `finish`: sums [..., s] to values [...]."""

    columns: int
    rows: Callable[[Sequence[np.ndarray], Metric], np.ndarray]
    finish: Callable[[np.ndarray], np.ndarray]


def _mean_rows(columns: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    return np.stack([columns[0], np.ones_like(columns[0])], axis=-1)


def _squared_error_rows(columns: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    return np.stack([(columns[0] - columns[1]) ** 2, np.ones_like(columns[0])], axis=-1)


def _ratio_rows(columns: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    return np.stack(list(columns), axis=-1)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _root_ratio(sums: np.ndarray) -> np.ndarray:
    return np.sqrt(_ratio(sums))


def _f1_rows(columns: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    if metric.classes is None:
        raise UserError('A metric with aggregate "macro_f1" needs `classes`, the number of labels; it is missing.')
    labels = np.arange(metric.classes)
    gold, predicted = columns[0][:, None] == labels, columns[1][:, None] == labels
    return np.concatenate([gold & predicted, gold, predicted], axis=-1).astype(np.float64)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    hits, gold, predicted = np.split(sums, 3, axis=-1)
    total = gold + predicted
    return np.where(total > 0, 2 * hits / np.where(total > 0, total, 1), 0.0).mean(axis=-1)


def _ece_rows(columns: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    """Expected calibration error: 20 bins (low, high] of the confidence; 0 lies in none."""
    confidence, correct = columns
    within = np.searchsorted(np.linspace(0, 1, _ECE_BINS + 1), confidence, side="left")[:, None] - 1
    excess = np.where(within == np.arange(_ECE_BINS), (confidence - correct)[:, None], 0.0)
    return np.concatenate([excess, np.ones((len(confidence), 1))], axis=-1)


def _ece(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]


def _group_mean_rows(columns: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    if metric.classes is None:
        raise UserError('A metric with aggregate "group_mean" needs `classes`, the number of groups; it is missing.')
    member = columns[1][:, None] == np.arange(metric.classes)
    return np.concatenate([member * columns[0][:, None], member], axis=-1).astype(np.float64)


def _group_mean(sums: np.ndarray) -> np.ndarray:
    totals, counts = np.split(sums, 2, axis=-1)
    there = counts > 0
    means = np.where(there, totals / np.where(there, counts, 1), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return means.sum(axis=-1) / there.sum(axis=-1)


def _correlation_rows(columns: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    x, y = columns
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)


def _correlation(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = (sums[..., i] for i in range(6))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_x, spread_y = xx - x * x / n, yy - y * y / n
        varies = (spread_x > 1e-12 * xx) & (spread_y > 1e-12 * yy)
        return np.where(varies, (xy - x * y / n) / np.sqrt(np.abs(spread_x * spread_y)), np.nan)


AGGREGATES: dict[str, Aggregate] = {
    "mean": Aggregate(1, _mean_rows, _ratio),
    "rmse": Aggregate(2, _squared_error_rows, _root_ratio),  # columns: truth, prediction
    "group_mean": Aggregate(2, _group_mean_rows, _group_mean),  # columns: value, group index; groups weigh alike
    "ratio": Aggregate(2, _ratio_rows, _ratio),  # columns: numerator, denominator (log p, tokens)
    "macro_f1": Aggregate(2, _f1_rows, _macro_f1),  # columns: true class index, predicted class index (-1: none)
    "correlation": Aggregate(2, _correlation_rows, _correlation),  # Pearson's, of two columns; none without variance
    "ece": Aggregate(2, _ece_rows, _ece),  # columns: confidence in the answer given, correct (0 to 1)
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; `low` and `high` are None where fewer than two clusters leave it undefined."""

    value: float
    low: float | None
    high: float | None
    n: int
    n_clusters: int


@dataclass(frozen=True, slots=True)
class Difference:
    """First run minus second on the `n` samples both scored, with interval and two-sided p-value."""

    value: float
    low: float | None
    high: float | None
    p: float
    n: int
    n_clusters: int


def check_metric(name: str, metric: Metric) -> None:
    """Raise UserError when the metric names an unknown aggregate or the wrong number of columns."""
    if metric.aggregate not in AGGREGATES:
        known = ", ".join(sorted(AGGREGATES))
        raise UserError(f'Metric "{name}" has the aggregate "{metric.aggregate}", which is none of {known}.')
    wanted, given = AGGREGATES[metric.aggregate].columns, len(metric.reads(name))
    if wanted != given:
        raise UserError(f'Metric "{name}" names {given} columns; the aggregate "{metric.aggregate}" takes {wanted}.')


def _cluster_sums(
    values: Sequence[Mapping[str, float]], clusters: np.ndarray, n_clusters: int, name: str, metric: Metric
) -> np.ndarray:
    columns = [np.array([row[column] for row in values], dtype=np.float64) for column in metric.reads(name)]
    statistics = AGGREGATES[metric.aggregate].rows(columns, metric)
    sums = np.zeros((n_clusters, statistics.shape[1]))
    np.add.at(sums, clusters, statistics)
    return sums


def _number(clusters: Sequence[str]) -> tuple[np.ndarray, int]:
    names, index = np.unique(np.array(clusters, dtype=object).astype(str), return_inverse=True)
    return index, len(names)


@lru_cache(maxsize=16)
def _draws(n_clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is in each resample, [resamples, clusters]; every metric of a report shares them."""
    rng = np.random.default_rng(seed)
    shares = np.full(n_clusters, 1.0 / n_clusters)
    # One cluster is drawn about once, so a byte holds the count (n_clusters itself bounds it when there are few).
    return rng.multinomial(n_clusters, shares, size=resamples).astype(np.uint8)


@lru_cache(maxsize=16)
def _swaps(n_clusters: int, permutations: int, seed: int) -> np.ndarray:
    """Random bits, one per permutation and cluster, packed eight to a byte."""
    return np.random.default_rng([seed, 1]).integers(0, 256, (permutations, -(-n_clusters // 8)), dtype=np.uint8)


def _resample(n_clusters: int, resamples: int, seed: int, apply: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`apply` to matrices [r, clusters] of how often each cluster was drawn; results joined to [resamples]."""
    block = max(1, _BLOCK // n_clusters)
    draws = _draws(n_clusters, resamples, seed)
    return np.concatenate(
        [apply(draws[start : start + block].astype(np.float64)) for start in range(0, resamples, block)]
    )


def interval(draws: np.ndarray, n_clusters: int, level: float = 0.95) -> tuple[float | None, float | None]:
    """Expanded percentile interval of bootstrap draws [r] (Hesterberg 2015, The American Statistician 69:4).

    The plain percentile interval is too narrow for few clusters; its tail shares are widened by t quantiles and by
    sqrt(c / (c - 1)). Draws that are undefined (a correlation without variance) are left out where they are less than
    one in a hundred. Returns (None, None) where they are more, and with fewer than two clusters.
    """
    defined = draws[np.isfinite(draws)]
    if n_clusters < 2 or len(defined) < 0.99 * len(draws):
        return None, None
    tail = ndtr(np.sqrt(n_clusters / (n_clusters - 1)) * stdtrit(n_clusters - 1, (1 - level) / 2))
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def estimate(
    values: Sequence[Mapping[str, float]],
    clusters: Sequence[str],
    name: str,
    metric: Metric,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate | None:
    """`metric` over scored rows, with a bootstrap interval that resamples whole clusters (users).

    `values`: one mapping per row; `clusters`: the row's cluster. Rows without the metric's columns are left out, and
    None is returned where none has them. Raises UserError for a badly declared metric.
    """
    check_metric(name, metric)
    keep = [i for i, row in enumerate(values) if all(column in row for column in metric.reads(name))]
    if not keep:
        return None
    index, n_clusters = _number([clusters[i] for i in keep])
    sums = _cluster_sums([values[i] for i in keep], index, n_clusters, name, metric)
    finish = AGGREGATES[metric.aggregate].finish
    value = float(finish(sums.sum(axis=0)))
    draws = _resample(n_clusters, resamples, seed, lambda counts: finish(counts @ sums))
    low, high = interval(draws, n_clusters)
    return Estimate(value, low, high, len(keep), n_clusters)


def difference(
    first: Sequence[Mapping[str, float]],
    second: Sequence[Mapping[str, float]],
    clusters: Sequence[str],
    name: str,
    metric: Metric,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference | None:
    """First minus second over paired rows: bootstrap interval by cluster, and a permutation test by cluster.

    `first[i]` and `second[i]` are two runs' values of the same sample. Under the null the two runs may be swapped
    within a cluster (for a mean: the sign of a cluster's summed difference may flip). With up to 12 clusters all
    swaps are enumerated, else PERMUTATIONS are drawn and p = (1 + hits) / (1 + draws). None where no pair has the
    metric's columns.
    """
    check_metric(name, metric)
    needed = metric.reads(name)
    keep = [i for i in range(len(first)) if all(column in first[i] and column in second[i] for column in needed)]
    if not keep:
        return None
    index, n_clusters = _number([clusters[i] for i in keep])
    a = _cluster_sums([first[i] for i in keep], index, n_clusters, name, metric)
    b = _cluster_sums([second[i] for i in keep], index, n_clusters, name, metric)
    finish = AGGREGATES[metric.aggregate].finish
    value = float(finish(a.sum(axis=0)) - finish(b.sum(axis=0)))
    draws = _resample(n_clusters, resamples, seed, lambda counts: finish(counts @ a) - finish(counts @ b))
    low, high = interval(draws, n_clusters)
    return Difference(value, low, high, _swap_test(a, b, finish, value, seed), len(keep), n_clusters)


def _swap_test(
    a: np.ndarray, b: np.ndarray, finish: Callable[[np.ndarray], np.ndarray], observed: float, seed: int
) -> float:
    n_clusters = len(a)
    total_a, total_b = a.sum(axis=0), b.sum(axis=0)

    def hits(keep: np.ndarray) -> int:
        kept = keep.astype(np.float64) @ (a - b)
        found = np.abs(finish(total_b + kept) - finish(total_a - kept))
        return int(np.sum(~(found < threshold)))  # an undefined one speaks for no difference

    # Ties with the observed value must count although sums were taken in another order.
    threshold = abs(observed) - 1e-9 * max(1.0, abs(observed))
    if n_clusters <= _EXACT_CLUSTERS:
        return hits((np.arange(2**n_clusters)[:, None] >> np.arange(n_clusters)) & 1) / 2**n_clusters
    packed, block = _swaps(n_clusters, PERMUTATIONS, seed), max(1, _BLOCK // n_clusters)
    blocks = (packed[start : start + block] for start in range(0, PERMUTATIONS, block))
    found = sum(hits(np.unpackbits(part, axis=1, count=n_clusters)) for part in blocks)
    return (1 + found) / (1 + PERMUTATIONS)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = np.argsort(np.asarray(p_values, dtype=np.float64), kind="stable")
    adjusted, running = np.empty(len(p_values)), 0.0
    for rank, position in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * float(p_values[position])))
        adjusted[position] = running
    return adjusted.tolist()
