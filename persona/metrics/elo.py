"""Ratings from games between two: Elo in one pass, as published, and Bradley–Terry fitted to all games at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_expit

SCALE = 400.0  # points by which a player is ahead who wins ten games of eleven
RESAMPLES = 500
# Standard deviation, in points, of the prior of a player who was never beaten or never won: without one the maximum
# of the likelihood lies at infinity. Where games tell, it is too wide to matter.
_PRIOR = 1000.0

Game = tuple[str, str, str | None]  # two players and the winner; any other winner says that nobody won


def elo_ratings(games: Iterable[Game], k: float = 32, initial: float = 1000.0) -> dict[str, float]:
    """Elo ratings after one pass over the games in their order; a game with an invalid winner is skipped.

    Every player that occurs has a rating, in the order of appearance. The result depends on the order of the games
    (reference/open_character_training §3.9, §5): `bradley_terry` does not.
    """
    ratings: dict[str, float] = {}
    for first, second, winner in games:
        a, b = ratings.setdefault(first, initial), ratings.setdefault(second, initial)
        if winner not in (first, second) or first == second:
            continue
        gain = k * (float(winner == first) - 1 / (1 + 10 ** ((b - a) / SCALE)))
        ratings[first], ratings[second] = a + gain, b - gain
    return ratings


@dataclass(frozen=True, slots=True)
class Rating:
    """A rating, or the change of one, in Elo's points; `games` are those it rests on.

    The 95 % interval is None where there is nothing to resample: fewer than two clusters.
    """

    value: float
    low: float | None
    high: float | None
    games: int


def bradley_terry(
    games: Iterable[Game],
    *,
    initial: float = 1000.0,
    clusters: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Rating]:
    """Maximum-likelihood strengths by which i beats j with the chance 1 / (1 + 10^((r_j - r_i) / 400)).

    Ratings average `initial`, as Elo's do; the order of games does not matter. A wide normal prior keeps those finite
    who always won or always lost. Intervals are bootstrapped over `clusters` (one per game; by default every game is
    its own). Games with an invalid winner are skipped. Every player that occurs is rated, in the order of appearance.
    Raises ValueError for as many clusters as there are not games.
    """
    table = _Table(list(games), clusters)
    found = table.fit(np.ones(table.n_clusters))
    draws = [initial + table.fit(weights, found) for weights in _draws(table.n_clusters, resamples, seed)]
    return table.ratings(initial + found, draws)


def bradley_terry_change(
    before: Mapping[str, Game], after: Mapping[str, Game], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Rating]:
    """Bradley–Terry rating after minus before, over the games (by id) that somebody won both times.

    Both are fitted to the same resample of ids, so the interval is that of a paired difference. Raises ValueError
    when a game has other players before and after.
    """
    shared = [id for id in before if id in after and _won(before[id]) and _won(after[id])]
    if odd := [id for id in shared if set(before[id][:2]) != set(after[id][:2])]:
        raise ValueError(f"game {odd[0]} is between {before[odd[0]][:2]} before and {after[odd[0]][:2]} after")
    players = [name for id in shared for name in before[id][:2]]
    first, second = (_Table([games[id] for id in shared], None, players) for games in (before, after))

    once = np.ones(len(shared))
    start, end = first.fit(once), second.fit(once)
    draws = [second.fit(weights, end) - first.fit(weights, start) for weights in _draws(len(shared), resamples, seed)]
    return first.ratings(end - start, draws)


def spearman(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Rank correlation of two ratings of the same players, equal ratings at the average of their ranks.

    nan for fewer than two players, and where one rates all alike. Raises ValueError when the players differ.
    """
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))
        raise ValueError(f"rank correlation needs the same players in both ratings; {', '.join(odd)} is in one only")
    names = sorted(first)
    if min(len({ratings[name] for name in names}) for ratings in (first, second)) < 2:
        return math.nan
    from scipy.stats import spearmanr  # here, as every command would wait for it

    return float(spearmanr([first[name] for name in names], [second[name] for name in names]).statistic)


def _won(game: Game) -> bool:
    return game[2] in game[:2] and game[0] != game[1]


def _draws(clusters: int, resamples: int, seed: int) -> Iterable[np.ndarray]:
    """How often each cluster is in each resample, [clusters]; none for fewer than two."""
    if clusters < 2:
        return []
    rng = np.random.default_rng(seed)
    return (rng.multinomial(clusters, np.full(clusters, 1 / clusters)) for _ in range(resamples))


class _Table:
    """Games as arrays: `winners[g]` beat `losers[g]` in a game of cluster `clusters[g]`."""

    def __init__(self, games: Sequence[Game], clusters: Sequence[str] | None, players: Sequence[str] = ()) -> None:
        if clusters is not None and len(clusters) != len(games):
            raise ValueError(f"every game has its cluster: {len(games)} games, {len(clusters)} clusters")
        named = range(len(games)) if clusters is None else clusters
        won = [(game, cluster) for game, cluster in zip(games, named, strict=True) if _won(game)]
        self.players = list(dict.fromkeys([*players, *(name for game in games for name in game[:2])]))
        place = {name: index for index, name in enumerate(self.players)}
        self.winners = np.array([place[str(game[2])] for game, _ in won], dtype=int)
        self.losers = np.array([place[game[1] if game[2] == game[0] else game[0]] for game, _ in won], dtype=int)
        numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(cluster for _, cluster in won))}
        self.clusters = np.array([numbers[cluster] for _, cluster in won], dtype=int)
        self.n_clusters = len(numbers)

    def fit(self, weights: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
        """Strengths in points around 0, [players], where clusters count `weights` times, [clusters]; `near` is where
        to begin to look."""
        from scipy.optimize import minimize  # here, as every command would wait for it

        n = len(self.players)
        if not n:
            return np.zeros(0)
        wins = np.zeros((n, n))
        np.add.at(wins, (self.winners, self.losers), weights[self.clusters])
        start = np.zeros(n) if near is None else near / _POINTS
        strengths = minimize(
            _loss(wins), start, jac=True, hess=_curvature(wins), method="trust-exact", options={"gtol": 1e-6}
        ).x
        return (strengths - strengths.mean()) * _POINTS

    def ratings(self, values: np.ndarray, draws: Sequence[np.ndarray]) -> dict[str, Rating]:
        counts = np.bincount(np.concatenate([self.winners, self.losers]), minlength=len(self.players))
        bounds = np.quantile(draws, [0.025, 0.975], axis=0) if len(draws) else None
        return {
            name: Rating(
                float(values[i]),
                None if bounds is None else float(bounds[0, i]),
                None if bounds is None else float(bounds[1, i]),
                int(counts[i]),
            )
            for i, name in enumerate(self.players)
        }


_POINTS = SCALE / math.log(10)  # points of one natural unit


def _loss(wins: np.ndarray) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """Minus the log posterior of strengths [n] given wins [n, n] (row beat column), and its gradient."""
    precision, games = (_POINTS / _PRIOR) ** 2, wins + wins.T

    def loss(strengths: np.ndarray) -> tuple[float, np.ndarray]:
        ahead = strengths[:, None] - strengths[None, :]
        value = -(wins * log_expit(ahead)).sum() + precision / 2 * (strengths**2).sum()
        return float(value), (games * expit(ahead) - wins).sum(axis=1) + precision * strengths

    return loss


def _curvature(wins: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The Hessian of `_loss`."""
    precision, games = (_POINTS / _PRIOR) ** 2, wins + wins.T

    def curvature(strengths: np.ndarray) -> np.ndarray:
        chance = expit(strengths[:, None] - strengths[None, :])
        weight = games * chance * (1 - chance)
        return np.diag(weight.sum(axis=1) + precision) - weight

    return curvature
