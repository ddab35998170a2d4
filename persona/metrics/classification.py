"""Accuracy and macro-F1 over a closed list of labels; -1 stands for an answer outside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def label_indices(answers: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Positions of `answers` in `labels`, [N] int64, -1 where an answer is not among them (exact match)."""
    position = {label: index for index, label in enumerate(labels)}
    return np.array([position.get(answer, -1) for answer in answers], dtype=np.int64)


def accuracy(predictions: np.ndarray, golds: np.ndarray) -> float:
    """Share of equal entries of two [N] index arrays. Raises ValueError when they are empty or differ in length."""
    if len(golds) == 0 or len(predictions) != len(golds):
        raise ValueError(
            f"accuracy needs as many predictions as golds, at least one: {len(predictions)}, {len(golds)}"
        )
    return float(np.mean(predictions == golds))


def macro_f1(predictions: np.ndarray, golds: np.ndarray, number_of_labels: int) -> float:
    """Mean over the whole label list of each label's F1, [N] index arrays in.

    A label that occurs in neither array counts as 0, as in LaMP's scorer (reference/lamp.md §5), so the value of a
    small sample is bounded by the share of labels it holds.
    """
    from sklearn.metrics import f1_score  # here, as every command would wait for it

    labels = list(range(number_of_labels))
    return float(f1_score(golds, predictions, labels=labels, average="macro", zero_division=0.0))
