"""The axis of every layer: from what a model does by default minus what it does in a role, and how sure that is.

Notation of reference/assistant_axis 3.4: vectors are means of hidden states over rollouts, [L, H] (layers, hidden),
read at the outputs of the decoder blocks. Everything is summed in float64 and handed out as float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from persona.errors import UserError

FULLY, SOMEWHAT = 3, 2  # the judge's scores: wholly in the role; an AI with some of the role's attributes
SHARES = (0.70, 0.80, 0.90, 0.95)  # of the variance, for which the number of dimensions is reported


def compute_axis(default_vector: Any, role_vectors: Mapping[str, Any] | Sequence[Any] | np.ndarray) -> Any:
    """default - mean over roles: [L, H] (or any one shape), not normalised (reference 3.4).

    `role_vectors`: one vector for each role, as a mapping by name, a sequence, or stacked in front. Each role weighs
    the same, however many rollouts it is the mean of. numpy in, numpy out; tensors give a tensor on the default's
    device. Raises UserError without any role, for shapes that differ and for values that are not finite.
    """
    named: dict[Any, Any] = dict(role_vectors if isinstance(role_vectors, Mapping) else enumerate(role_vectors))
    if not named:
        raise UserError("there is no role vector: an axis is the default vector minus the mean of at least one")
    default = _finite("default", default_vector)
    total = np.zeros(default.shape)
    for name, vector in named.items():
        total += _finite(name, vector, default.shape)
    axis = (default - total / len(named)).astype(np.float32)
    return torch.from_numpy(axis).to(default_vector.device) if isinstance(default_vector, Tensor) else axis


def _finite(name: object, vector: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    values = _array(vector)
    if values.shape != (shape or values.shape):
        raise UserError(
            f"the vector of {name} has the shape {list(values.shape)} and the default vector {list(shape or ())}: "
            "both have to be of one model"
        )
    if not np.isfinite(values).all():
        raise UserError(f"the vector of {name} has values that are not finite: activations it is made of overflowed")
    return values


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


# ---- vectors from sums over rollouts -------------------------------------------------------------------------------


class Means(NamedTuple):
    """`vectors`: name -> [L, H], float32. `short`: name -> rollouts, of those that had too few for a vector."""

    vectors: dict[str, np.ndarray]
    short: dict[str, int]


def role_vectors(
    sums: Mapping[tuple[str, int], np.ndarray],
    counts: Mapping[tuple[str, int], int],
    min_count: int,
    score: int = FULLY,
) -> Means:
    """Mean activation of each role over its rollouts with `score`, where there are `min_count` of them.

    `sums` [L, H] and `counts` by (role, score). FULLY gives the vectors of the axis; the paper's persona space has
    those of SOMEWHAT beside them. The paper asks for 10 rollouts, its code for 50 (reference 3.4). A role of which
    `counts` knows other scores only is short with 0.
    """
    vectors, short = {}, {}
    for role in dict.fromkeys(role for role, _ in counts):
        count = counts.get((role, score), 0)
        if count >= max(min_count, 1):
            vectors[role] = (_array(sums[role, score]) / count).astype(np.float32)
        else:
            short[role] = count
    return Means(vectors, short)


def trait_pairs(
    positive: Sequence[float | None], negative: Sequence[float | None], min_difference: float = 50
) -> np.ndarray:
    """Which pairs of rollouts show their trait: positive score - negative score >= `min_difference`, bool [pairs].

    Scores 0 to 100 of the same question under the two instructions of a pair; None (a refusal, or a reply of the judge
    that cannot be read) leaves the pair out (reference 3.4).
    """
    return np.array(
        [
            more is not None and less is not None and more - less >= min_difference
            for more, less in zip(positive, negative, strict=True)
        ],
        dtype=bool,
    )


def trait_vectors(
    positive: Mapping[str, np.ndarray],
    negative: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    min_pairs: int = 10,
) -> Means:
    """mean(positive) - mean(negative) of each trait over its kept pairs, where there are `min_pairs` of them.

    Sums [L, H] over kept pairs and their counts, by trait.
    """
    vectors, short = {}, {}
    for trait, count in counts.items():
        if count >= max(min_pairs, 1):
            vectors[trait] = ((_array(positive[trait]) - _array(negative[trait])) / count).astype(np.float32)
        else:
            short[trait] = count
    return Means(vectors, short)


# ---- persona space -------------------------------------------------------------------------------------------------


class PersonaSpace(NamedTuple):
    """Principal components of one layer's vectors. `mean` [H]; `components` [K, H], of length 1, the strongest first;
    `explained` [K]: shares of the variance, which sum to 1; `coordinates` [N, K]: the vectors' places."""

    mean: np.ndarray
    components: np.ndarray
    explained: np.ndarray
    coordinates: np.ndarray

    def place(self, vectors: np.ndarray) -> np.ndarray:
        """Coordinates [..., K] of further vectors [..., H]."""
        return (_array(vectors) - self.mean) @ self.components.T

    def dimensions(self, share: float) -> int:
        """The fewest components that together explain `share` of the variance."""
        return int(np.searchsorted(np.cumsum(self.explained), share - 1e-9)) + 1


def pca(vectors: np.ndarray, towards: np.ndarray | None = None) -> PersonaSpace:
    """Principal components of vectors [N, H], less their mean and not scaled (reference 3.4), by a full decomposition.

    A component's sign is arbitrary: with `towards` [H] (the axis) the first one points the same way. Raises UserError
    for fewer than two vectors, or vectors that are all the same.
    """
    from sklearn.decomposition import PCA  # takes a second to import

    points = _array(vectors)
    if len(points) < 2 or not np.ptp(points, axis=0).any():
        raise UserError(f"a persona space needs at least two vectors that differ: there are {len(points)}")
    found = PCA(svd_solver="full").fit(points)
    signs = np.ones((len(found.components_), 1))
    if towards is not None and found.components_[0] @ _array(towards) < 0:
        signs[0] = -1
    components = found.components_ * signs
    return PersonaSpace(
        found.mean_, components, found.explained_variance_ratio_, (points - found.mean_) @ components.T
    )


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of two vectors over their last dimension: [L, H] and [L, H] give [L]. nan where one has no length."""
    one, other = _array(first), _array(second)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (one * other).sum(axis=-1) / lengths


# ---- how sure the direction is -------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """Cosines in each layer, each [L]: the middle and the two ends of the central 95 %."""

    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _interval(cosines: list[np.ndarray]) -> Interval:
    low, median, high = np.quantile(np.stack(cosines), (0.025, 0.5, 0.975), axis=1)
    return Interval(median, low, high)


def _layers_first(vectors: np.ndarray) -> np.ndarray:
    return _array(vectors).swapaxes(0, 1)  # [R, L, H] to [L, R, H]


def bootstrap_roles(default_vector: np.ndarray, vectors: np.ndarray, resamples: int = 1000, seed: int = 0) -> Interval:
    """Cosine to the full axis of axes from as many roles drawn with replacement. [L, H], [R, L, H].

    How far the direction hangs on which roles were thought of. The default vector is the same in every resample.
    """
    roles = len(vectors)
    draws = np.random.default_rng(seed).multinomial(roles, np.full(roles, 1 / roles), size=resamples) / roles
    layers = zip(compute_axis(default_vector, vectors), _array(default_vector), _layers_first(vectors), strict=True)
    return _interval([cosine(default - draws @ points, axis) for axis, default, points in layers])


def split_half(default_vector: np.ndarray, vectors: np.ndarray, splits: int = 200, seed: int = 0) -> Interval:
    """Cosine between the axes of two halves of the roles, over random splits. [L, H], [R, L, H], R >= 2.

    Both halves subtract from the same default vector. For the same of questions, take `cosine` of the two axes whose
    default and role vectors are of one half of the questions each: then nothing is shared.
    """
    roles = len(vectors)
    if roles < 2:
        raise UserError("roles can be split into halves only where there are at least two")
    ranks = np.argsort(np.random.default_rng(seed).random((splits, roles)), axis=1)
    first = (ranks < roles // 2) / (roles // 2)
    second = (ranks >= roles // 2) / (roles - roles // 2)
    layers = zip(_array(default_vector), _layers_first(vectors), strict=True)
    return _interval([cosine(default - first @ points, default - second @ points) for default, points in layers])
