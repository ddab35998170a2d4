"""Metrics as pure functions of predictions and truth."""

from persona.metrics.classification import accuracy, label_indices, macro_f1
from persona.metrics.elo import bradley_terry, elo_ratings, spearman
from persona.metrics.rating import mae, rmse
from persona.metrics.rouge import bootstrap_median, rouge

__all__ = [
    "accuracy",
    "bootstrap_median",
    "bradley_terry",
    "elo_ratings",
    "label_indices",
    "macro_f1",
    "mae",
    "rmse",
    "rouge",
    "spearman",
]
