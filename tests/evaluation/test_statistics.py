import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from persona.errors import UserError
from persona.evaluation.statistics import Metric, difference, estimate, holm, interval


def rows(name, values):
    return [{name: float(value)} for value in values]


def test_mean_and_counts_by_hand():
    found = estimate(rows("x", [1, 0, 1, 1]), ["a", "a", "b", "c"], "x", Metric())
    assert (found.value, found.n, found.n_clusters) == (0.75, 4, 3)
    assert found.low < 0.75 < found.high


def test_rows_without_the_column_are_left_out():
    values = [{"x": 1.0}, {"y": 5.0}, {"x": 0.0}]
    assert estimate(values, ["a", "b", "c"], "x", Metric()).n == 2
    assert estimate(values, ["a", "b", "c"], "z", Metric()) is None


def test_corpus_metrics_by_hand_and_against_scikit_learn():
    pairs = [{"t": float(t), "p": float(p)} for t, p in [(1, 1), (2, 4), (5, 4), (3, 3)]]
    names = [str(i) for i in range(4)]
    assert estimate(pairs, names, "rmse", Metric(False, "rmse", ("t", "p"))).value == pytest.approx(math.sqrt(5 / 4))
    assert estimate(pairs, names, "r", Metric(True, "ratio", ("t", "p"))).value == pytest.approx(11 / 12)
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(0, 4, 200), rng.integers(-1, 4, 200)
    pairs = [{"t": float(t), "p": float(p)} for t, p in zip(gold, predicted, strict=True)]
    found = estimate(pairs, [str(i) for i in range(200)], "f1", Metric(True, "macro_f1", ("t", "p"), classes=6))
    # Labels 4 and 5 occur nowhere: they count as zero, as LaMP's scorer counts them.
    expected = f1_score(gold, predicted, labels=list(range(6)), average="macro", zero_division=0)
    assert found.value == pytest.approx(expected)


def test_interval_of_many_independent_rows_agrees_with_the_normal_formula():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    found = estimate(rows("x", values), [str(i) for i in range(2000)], "x", Metric())
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_interval_widens_the_percentiles_as_hesterberg_says():
    draws = np.linspace(0.0, 1.0, 100_001)
    tail = stats.norm.cdf(math.sqrt(5 / 4) * stats.t.ppf(0.025, 4))
    low, high = interval(draws, 5)
    assert (low, high) == pytest.approx((tail, 1 - tail), abs=1e-4)
    assert low < 0.002
    assert interval(draws, 1) == (None, None)


def test_a_few_undefined_draws_are_left_out():
    draws = np.linspace(0.0, 1.0, 1000)
    assert interval(np.append(draws, [np.nan] * 9), 5) == interval(draws, 5)
    assert interval(np.append(draws, [np.nan] * 11), 5) == (None, None)


def test_correlation_against_numpy_and_without_variance():
    rng = np.random.default_rng(5)
    x, clusters = 1000 + rng.normal(size=60), [str(i // 3) for i in range(60)]
    y = 0.5 * x + rng.normal(size=60)
    pairs = [{"x": float(a), "y": float(b)} for a, b in zip(x, y, strict=True)]
    metric = Metric(True, "correlation", ("x", "y"))
    found = estimate(pairs, clusters, "r", metric)
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-8)
    assert found.low < found.value < found.high and found.n_clusters == 20
    flat = [{"x": float(a), "y": 0.1} for a in x]
    nothing = estimate(flat, clusters, "r", metric)
    assert math.isnan(nothing.value) and nothing.low is None


def test_same_seed_same_interval_other_seed_other_interval():
    values, names = rows("x", np.random.default_rng(2).normal(size=40)), [str(i % 9) for i in range(40)]
    first, again = (estimate(values, names, "x", Metric(), seed=3) for _ in range(2))
    assert first == again
    assert first.low != estimate(values, names, "x", Metric(), seed=4).low


def _covered(rng, clustered: bool) -> bool:
    per = rng.integers(2, 12, 20)
    names = np.repeat(np.arange(20), per)
    values = rng.normal(0, 1, 20)[names] + rng.normal(0, 1, len(names))
    labels = [str(n) for n in names] if clustered else [str(i) for i in range(len(names))]
    found = estimate(rows("x", values), labels, "x", Metric(), resamples=400, seed=int(rng.integers(1 << 30)))
    return found.low <= 0.0 <= found.high


def test_clustered_interval_covers_the_truth_95_times_in_100_and_the_naive_one_does_not():
    rng = np.random.default_rng(5)
    clustered = np.mean([_covered(rng, True) for _ in range(500)])
    naive = np.mean([_covered(rng, False) for _ in range(200)])
    assert 0.92 <= clustered <= 0.98
    assert naive < 0.80


def test_paired_difference_by_hand_exact_permutation():
    # Cluster sums of the difference: a: +3, b: +1, c: +2. |sum| >= 6 for all-plus and all-minus only: 2 of 8.
    first, second = [2, 2, 1, 3], [1, 0, 0, 1]
    found = difference(rows("x", first), rows("x", second), ["a", "a", "b", "c"], "x", Metric())
    assert found.value == pytest.approx(6 / 4)
    assert found.p == pytest.approx(2 / 8)
    assert (found.n, found.n_clusters) == (4, 3)


def test_paired_difference_sees_what_independent_intervals_do_not():
    rng = np.random.default_rng(6)
    names = [str(i % 30) for i in range(300)]
    ease = rng.normal(0, 3, 300)
    a, b = rows("x", ease + 0.3 + rng.normal(0, 0.5, 300)), rows("x", ease + rng.normal(0, 0.5, 300))
    alone = estimate(a, names, "x", Metric())
    found = difference(a, b, names, "x", Metric())
    assert alone.low < estimate(b, names, "x", Metric()).value < alone.high
    assert found.low > 0 and found.p < 0.001


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(7)
    names, p_values = np.repeat(np.arange(15), 4).astype(str), []
    for _ in range(200):
        shared = np.repeat(rng.normal(size=15), 4)
        a, b = shared + rng.normal(size=60), shared + rng.normal(size=60)
        p_values.append(difference(rows("x", a), rows("x", b), list(names), "x", Metric(), resamples=300).p)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_corpus_metrics_are_compared_by_swapping_rows_not_by_differences_of_rows():
    truth = [1, 2, 3, 4, 5, 3]
    good = [{"t": float(t), "p": float(t)} for t in truth]
    bad = [{"t": float(t), "p": t + 2.0} for t in truth]
    found = difference(good, bad, list("abcdef"), "rmse", Metric(False, "rmse", ("t", "p")))
    assert found.value == pytest.approx(-2.0)
    assert found.p == pytest.approx(2 / 64)


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1 is 0.03, 0.06, 0.04; the last may not fall below the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_badly_declared_metrics_are_refused():
    with pytest.raises(UserError, match='"median", which is none of correlation, ece, group_mean, macro_f1, mean'):
        estimate(rows("x", [1]), ["a"], "x", Metric(aggregate="median"))
    with pytest.raises(UserError, match="names 1 columns; .* takes 2"):
        estimate(rows("x", [1]), ["a"], "x", Metric(aggregate="rmse"))
    with pytest.raises(UserError, match="needs `classes`"):
        estimate([{"t": 1.0, "p": 1.0}], ["a"], "f1", Metric(True, "macro_f1", ("t", "p")))


def test_groups_weigh_alike_whatever_their_number_of_rows():
    """By hand: means 2 and 5 of groups of three rows and one; the plain mean would be 2.75."""
    values = [{"x": x, "g": g} for x, g in ((1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (5.0, 2.0))]
    metric = Metric(aggregate="group_mean", columns=("x", "g"), classes=3)
    assert estimate(values, list("abcd"), "x", metric).value == pytest.approx(3.5)
    with pytest.raises(UserError, match="needs `classes`"):
        estimate(values, list("abcd"), "x", Metric(aggregate="group_mean", columns=("x", "g")))
