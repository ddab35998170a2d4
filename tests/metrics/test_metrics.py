"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from persona.metrics import accuracy, bootstrap_median, label_indices, macro_f1, mae, rmse, rouge


def test_labels_match_exactly():
    assert list(label_indices(["b", "a", "B", " b", ""], ["a", "b"])) == [1, 0, -1, -1, -1]


def test_accuracy():
    assert accuracy(np.array([0, 1, -1, 1]), np.array([0, 1, 1, 0])) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        accuracy(np.array([]), np.array([]))


def test_macro_f1_is_over_the_full_label_list():
    # Label 0: precision 1/2, recall 1 -> 2/3; label 1: precision 1, recall 1/2 -> 2/3; label 2: never seen -> 0.
    guesses, truths = np.array([0, 0, 1, -1]), np.array([0, 1, 1, 0])
    # The unknown answer costs label 0 recall: precision 1/2, recall 1/2 -> 1/2.
    assert macro_f1(guesses, truths, 2) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert macro_f1(guesses, truths, 3) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def test_rating_errors():
    guesses, truths = np.array([1.0, 5.0, 3.5]), np.array([1.0, 2.0, 3.0])
    assert mae(guesses, truths) == pytest.approx((0 + 3 + 0.5) / 3)
    assert rmse(guesses, truths) == pytest.approx(math.sqrt((0 + 9 + 0.25) / 3))


def test_rouge_by_hand():
    # Tokens: the cat sat down / sat the cat like sat. Shared words: the, cat, sat; they stand in the same order.
    assert rouge("the cat sat down", "sat The cat-like sat") == pytest.approx({"rouge1": 6 / 9, "rougeL": 6 / 9})
    # Shared: a, b; longest common subsequence: one of them.
    reordered = rouge("b a", "a b")
    assert reordered == {"rouge1": 1.0, "rougeL": 0.5}


def test_rouge_does_not_stem_and_takes_empty_texts():
    assert rouge("cats running", "cat run")["rouge1"] == 0.0
    assert rouge("", "a") == rouge("!!", "a") == {"rouge1": 0.0, "rougeL": 0.0}


def test_bootstrap_median_is_seeded_and_near_the_mean():
    values = np.random.default_rng(1).random(400)
    assert bootstrap_median(values, seed=3) == bootstrap_median(values, seed=3)
    assert bootstrap_median(values, seed=3) != bootstrap_median(values, seed=4)
    assert bootstrap_median(values) == pytest.approx(values.mean(), abs=0.003)
    assert bootstrap_median([0.25] * 5) == 0.25
