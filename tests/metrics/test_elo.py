"""Elo by hand, Bradley–Terry against closed forms and drawn strengths, intervals, paired changes, rank correlation."""

import math
import random

import pytest

from persona.metrics import bradley_terry, elo_ratings, spearman
from persona.metrics.elo import bradley_terry_change


def test_elo_by_hand():
    # a beats b at equal ratings: 32 (1 - 1/2) = 16. Then b, at 984, loses to c, at 1000: it was expected to win
    # 1 / (1 + 10^(16/400)) = .476990 of the time, 32 times which is 15.2637.
    assert elo_ratings([("a", "b", "a")]) == {"a": 1016.0, "b": 984.0}
    ratings = elo_ratings([("a", "b", "a"), ("b", "c", "c")])
    assert ratings == pytest.approx({"a": 1016, "b": 984 - 15.26368, "c": 1015.26368}, abs=1e-4)
    # a, .7363 points ahead, beats c: 32 (1 - .501060) = 15.96609.
    ratings = elo_ratings([("a", "b", "a"), ("b", "c", "c"), ("a", "c", "a")])
    assert ratings == pytest.approx({"a": 1031.96609, "b": 968.73632, "c": 999.29759}, abs=1e-4)
    assert sum(ratings.values()) == pytest.approx(3000)
    assert elo_ratings([("a", "b", "b")], k=10, initial=0) == {"a": -5.0, "b": 5.0}


def test_elo_skips_what_nobody_won_and_depends_on_the_order():
    games = [("a", "b", "a"), ("b", "c", "d"), ("c", "a", None), ("c", "a", ""), ("b", "b", "b")]
    assert elo_ratings(games) == {"a": 1016.0, "b": 984.0, "c": 1000.0}
    assert elo_ratings([]) == {} and elo_ratings(iter(games)) == elo_ratings(games)
    won = [("a", "b", "a"), ("b", "c", "b"), ("c", "a", "c")]
    assert elo_ratings(won) != elo_ratings(won[::-1])


def test_two_players_are_apart_by_the_log_odds_of_their_games():
    found = bradley_terry([("a", "b", "a")] * 3000 + [("b", "a", "b")] * 1000, resamples=0)
    assert found["a"].value - found["b"].value == pytest.approx(400 * math.log10(3), abs=0.1)
    assert found["a"].value + found["b"].value == pytest.approx(2000)
    assert found["a"].games == found["b"].games == 4000 and found["a"].low is None


def test_bradley_terry_is_the_maximum_of_the_likelihood():
    """Three players, by stationarity: each one's expected wins are the wins it has."""
    games = [("a", "b", "a")] * 400 + [("a", "b", "b")] * 200 + [("b", "c", "b")] * 300 + [("c", "b", "c")] * 100
    games += [("a", "c", "c")] * 150 + [("c", "a", "a")] * 250
    ratings = {name: rating.value for name, rating in bradley_terry(games, resamples=0).items()}
    for name in "abc":
        expected = sum(
            1 / (1 + 10 ** ((ratings[other] - ratings[name]) / 400))
            for first, second, _ in games
            if name in (first, second)
            for other in {first, second} - {name}
        )
        assert expected == pytest.approx(sum(winner == name for _, _, winner in games), rel=2e-3)


def test_bradley_terry_does_not_depend_on_the_order_and_stays_finite():
    games = [("a", "b", "a")] * 5 + [("b", "c", "b"), ("c", "b", "c"), ("c", "d", "x")]
    found = bradley_terry(games, resamples=20)
    turned = bradley_terry(games[::-1], resamples=0)
    assert {name: r.value for name, r in found.items()} == pytest.approx({n: r.value for n, r in turned.items()})
    assert all(math.isfinite(number) for r in found.values() for number in (r.value, r.low, r.high))
    assert found["a"].value > found["b"].value and found["d"].games == 0
    assert list(found) == ["a", "b", "c", "d"] and bradley_terry([]) == {}


def draw(strengths, n, rng):
    games = []
    for _ in range(n):
        a, b = rng.sample(list(strengths), 2)
        games.append((a, b, a if rng.random() < 1 / (1 + 10 ** ((strengths[b] - strengths[a]) / 400)) else b))
    return games


def test_intervals_hold_the_strengths_that_games_were_drawn_from():
    rng = random.Random(0)
    strengths = {f"p{i}": 1000 + 60 * (i - 4.5) for i in range(10)}
    held = []
    for _ in range(5):
        found = bradley_terry(draw(strengths, 600, rng), resamples=100, seed=1)
        held += [found[name].low <= strengths[name] <= found[name].high for name in strengths]
    assert 0.86 <= sum(held) / len(held) <= 1.0


def test_games_of_one_cluster_are_drawn_together():
    """Ten copies of each game say no more than one: the interval of clusters is the wider one."""
    games = draw({"a": 1050.0, "b": 950.0}, 40, random.Random(3))
    clusters = [str(i) for i in range(40) for _ in range(10)]
    copied = [game for game in games for _ in range(10)]
    alone, apart = bradley_terry(copied, clusters=clusters, seed=2), bradley_terry(copied, seed=2)
    assert alone["a"].value == apart["a"].value
    assert alone["a"].high - alone["a"].low > 2.5 * (apart["a"].high - apart["a"].low)
    with pytest.raises(ValueError, match="2 games, 1 clusters"):
        bradley_terry(games[:2], clusters=["x"])


def test_a_change_is_paired_by_game():
    rng = random.Random(5)
    before = {str(i): game for i, game in enumerate(draw({"a": 1000.0, "b": 1000.0, "c": 1000.0}, 300, rng))}
    same = bradley_terry_change(before, before, resamples=50)
    assert all((r.value, r.low, r.high) == (0, 0, 0) for r in same.values())
    after = {id: (a, b, "a" if "a" in (a, b) else winner) for id, (a, b, winner) in before.items()}
    moved = bradley_terry_change(before, after, resamples=50)
    assert moved["a"].low > 200 and moved["b"].high < 0 and moved["c"].high < 0
    # What was not decided both times counts in neither, nor does a game that only one side has.
    lost = {**after, "0": (*after["0"][:2], None), "only here": ("a", "b", "b")}
    assert sum(r.games for r in bradley_terry_change(before, lost, resamples=0).values()) == 2 * 299
    with pytest.raises(ValueError, match="game 0 is between"):
        bradley_terry_change(before, {"0": ("a", "d", "d")})


def test_rank_correlation_by_hand():
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: products of deviations 2.25 + 0 + 0 + 2.25 over sqrt(4.5 * 5).
    tied = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 9.0}
    assert spearman(tied, {"a": 1.0, "b": 3.0, "c": 2.0, "d": 4.0}) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(tied, {name: -value for name, value in tied.items()}) == pytest.approx(-1)
    assert math.isnan(spearman({"a": 1.0}, {"a": 2.0})) and math.isnan(
        spearman({"a": 1.0, "b": 1.0}, {"a": 1, "b": 2})
    )
    with pytest.raises(ValueError, match="b, c is in one only"):
        spearman({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})
