"""Errors of numeric ratings."""

from __future__ import annotations

import numpy as np


def mae(predictions: np.ndarray, golds: np.ndarray) -> float:
    """Mean absolute error of two [N] arrays, in the units of the rating."""
    return float(np.mean(np.abs(np.asarray(predictions, dtype=np.float64) - golds)))


def rmse(predictions: np.ndarray, golds: np.ndarray) -> float:
    """Root of the mean squared error of two [N] arrays, in the units of the rating."""
    return float(np.sqrt(np.mean((np.asarray(predictions, dtype=np.float64) - golds) ** 2)))
