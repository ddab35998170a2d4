"""The ideal reader's posteriors, against values by hand and against its own claims."""

import random

import numpy as np
import pytest

from persona.town import ideal, reading
from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town.people import people
from persona.types import HistoryItem

INN = rs.Thing("old", "quiet", "inn")


def test_without_items_the_posterior_is_the_prior():
    # Sums of two uniform draws from -2..2, with both ends clipped: 6, 4, 5, 4, 6 of 25.
    assert np.allclose(ideal.rating_posterior([], INN), np.array([6, 4, 5, 4, 6]) / 25)
    # |taste| is 0, 1, 2 with chances .2 .4 .4: the first of the pair is at least as large in .2*.2 + .4*.6 + .4 = .68.
    assert ideal.tag_posterior([], INN) == pytest.approx({"calm": 0.68, "history": 0.32})
    assert ideal.voice_posterior([]) == pytest.approx(dict.fromkeys(lx.VOICES, 1 / 16))


def test_scores_narrow_the_tastes():
    # A rating of 1 leaves 6 of the 25 combinations of its two tastes, a rating of 5 another 6; the rest stay open.
    items = [HistoryItem("1", "the old spicy pie . what a disaster .", "1"),
             HistoryItem("2", "the quiet cheap inn . i loved it .", "5")]  # fmt: skip
    left = ideal.possible_tastes(items)
    old, spicy, quiet, cheap = (left[:, lx.QUALITIES.index(q)] for q in ("old", "spicy", "quiet", "cheap"))
    assert len(left) == 6 * 6 * 5**4 and (old + spicy <= -2).all() and (quiet + cheap >= 2).all()
    tagged = ideal.possible_tastes([HistoryItem("1", "the quiet old inn .", "history")])
    assert (np.abs(tagged[:, lx.QUALITIES.index("old")]) > np.abs(tagged[:, lx.QUALITIES.index("quiet")])).all()


def test_one_opener_by_hand():
    found = ideal.voice_posterior([HistoryItem("1", "ahoy , the garden is big today .")])
    own = (1 - rs.BORROWED) * rs.SHOWN / 3 * (1 - rs.SHOWN)
    quoted = rs.BORROWED / 2 / 15 / 3 * (1 - rs.SHOWN)
    assert found["sailor"] == pytest.approx(own / (own + 15 * quoted)) and found["poet"] == found["monk"] < 0.02


def test_the_posterior_is_calibrated_and_the_whole_history_settles_nearly_everything():
    rng, town = random.Random(0), people(train=0, dev=0)
    claimed, right, settled = [], [], []
    for sample in town.test:
        if sample.task != "town_reply":
            continue
        items = rng.sample(sample.persona.history, 4)
        chances = ideal.voice_posterior(items)
        best = max(chances, key=chances.get)
        claimed.append(chances[best])
        right.append(best == sample.metadata["voice"])
        settled.append(ideal.right_answer(sample, sample.persona.history))
    assert abs(np.mean(claimed) - np.mean(right)) < 0.1 and 0.65 < np.mean(right) < 0.95
    assert np.mean(settled) > 0.98


@pytest.mark.slow
def test_ratings_need_more_than_a_few_items():
    samples = [sample for sample in people(train=0).test if sample.task == "town_rating"]
    rng = random.Random(0)
    few = np.mean([ideal.right_answer(s, rng.sample(s.persona.history, 4)) for s in samples])
    everything = np.mean([ideal.right_answer(s, s.persona.history) for s in samples])
    assert few < 0.5 and everything > 0.93
    for sample in samples:  # the truth is never ruled out
        thing = reading.question(sample.messages[0].content).key
        assert ideal.rating_posterior(sample.persona.history, thing)[int(sample.target) - 1] > 0
