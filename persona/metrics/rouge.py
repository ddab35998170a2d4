"""ROUGE-1 and ROUGE-L F-measure as LaMP uses them: lower-cased [a-z0-9] tokens, no stemmer (reference/lamp.md §5)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

NAMES = ("rouge1", "rougeL")
RESAMPLES = 1000  # of rouge_score's BootstrapAggregator


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, as every command would wait for NLTK

    return RougeScorer(list(NAMES), use_stemmer=False)


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """{"rouge1", "rougeL"}: F-measures in 0 .. 1 of one pair; 0 when either text has no [a-z0-9] token."""
    return {name: float(score.fmeasure) for name, score in _scorer().score(reference, prediction).items()}


def bootstrap_median(values: Sequence[float], seed: int = 0) -> float:
    """Median of the means of 1,000 resamples of `values`: what LaMP's published scorer reports instead of the mean.

    Resamples are drawn with `seed` (published: unseeded, so its figures differ from run to run in the 4th decimal).
    """
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [rng.choice(array, size=len(array)).mean() for _ in range(RESAMPLES)]
    return float(np.median(means))
