"""Vectors, the axis, persona space, and how sure the axis is: against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from persona.errors import UserError
from persona.methods.assistant_axis import compute_axis, project, steer
from persona.methods.assistant_axis.axis import (
    FULLY,
    SOMEWHAT,
    bootstrap_roles,
    cosine,
    pca,
    role_vectors,
    split_half,
    trait_pairs,
    trait_vectors,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- the axis ------------------------------------------------------------------------------------------------------


def test_axis_is_the_default_minus_the_mean_over_roles_not_normalised() -> None:
    default = np.array([[4.0, 0.0], [1.0, 1.0]])
    roles = {"ghost": np.array([[1.0, 2.0], [0.0, 0.0]]), "judge": np.array([[3.0, 0.0], [1.0, -2.0]])}
    axis = compute_axis(default, roles)
    assert axis.tolist() == [[2.0, -1.0], [0.5, 2.0]] and axis.dtype == np.float32
    assert np.array_equal(axis, compute_axis(default, list(roles.values())))
    assert np.array_equal(axis, compute_axis(default, np.stack(list(roles.values()))))
    tensors = compute_axis(torch.tensor(default), {name: torch.tensor(role) for name, role in roles.items()})
    assert tensors.dtype == torch.float32 and tensors.tolist() == axis.tolist()


def test_axis_is_exact_where_bfloat16_rounds_it_away() -> None:
    default, role = torch.full((1, 2), 256.0), torch.tensor([[255.5, 256.0]])
    assert compute_axis(default, [role]).tolist() == [[0.5, 0.0]]
    assert (default.bfloat16() - role.bfloat16()).tolist() == [[0.0, 0.0]]


def test_axis_of_roles_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="no role vector"):
        compute_axis(np.ones((2, 3)), {})
    with pytest.raises(UserError, match=r"ghost has the shape \[1, 3\] and the default vector \[2, 3\]"):
        compute_axis(np.ones((2, 3)), {"ghost": np.ones((1, 3))})
    with pytest.raises(UserError, match="ghost has values that are not finite"):
        compute_axis(np.ones((1, 2)), {"judge": np.ones((1, 2)), "ghost": np.array([[np.nan, 1]])})
    with pytest.raises(UserError, match="default has values that are not finite"):
        compute_axis(np.array([[np.inf]]), [np.ones((1, 1))])


def test_roles_need_enough_rollouts() -> None:
    sums = {("ghost", FULLY): np.array([[8.0, 4.0]]), ("ghost", 0): np.array([[99.0, 99.0]]),
            ("judge", FULLY): np.array([[3.0, 3.0]]), ("judge", SOMEWHAT): np.array([[6.0, 2.0]]),
            ("muse", 0): np.array([[1.0, 1.0]])}  # fmt: skip
    counts = {("ghost", FULLY): 4, ("ghost", 0): 9, ("judge", FULLY): 3, ("judge", SOMEWHAT): 4, ("muse", 0): 9}
    fully = role_vectors(sums, counts, min_count=4)
    assert {name: vector.tolist() for name, vector in fully.vectors.items()} == {"ghost": [[2.0, 1.0]]}
    assert fully.short == {"judge": 3, "muse": 0}
    somewhat = role_vectors(sums, counts, min_count=4, score=SOMEWHAT)
    assert {name: vector.tolist() for name, vector in somewhat.vectors.items()} == {"judge": [[1.5, 0.5]]}
    assert somewhat.short == {"ghost": 0, "muse": 0}
    assert role_vectors(sums, counts, min_count=0).short == {"muse": 0}  # no vector out of nothing


def test_trait_vectors_are_of_pairs_that_show_the_trait() -> None:
    kept = trait_pairs([90, 90, None, 50, 100], [40, 41, 0, None, 0])
    assert kept.tolist() == [True, False, False, False, True]  # a difference of 50 is enough
    means = trait_vectors(
        {"calm": np.array([[6.0, 2.0]]), "vain": np.ones((1, 2))},
        {"calm": np.array([[2.0, 4.0]]), "vain": np.ones((1, 2))},
        {"calm": 2, "vain": 1}, min_pairs=2,
    )  # fmt: skip
    assert means.vectors["calm"].tolist() == [[2.0, -1.0]] and list(means.vectors) == ["calm"]
    assert means.short == {"vain": 1}


def test_steering_adds_a_share_of_the_mean_norm_along_the_axis() -> None:
    hidden = torch.tensor([[1.0, 1.0]])
    assert steer(hidden, torch.tensor([0.0, 9.0]), -0.5, 4.0).tolist() == [[1.0, -1.0]]
    moved = steer(hidden, torch.tensor([3.0, 4.0]), 0.2, 10.0)
    assert project(moved - hidden, torch.tensor([3.0, 4.0])).item() == pytest.approx(2.0)
    assert steer(hidden.bfloat16(), torch.ones(2), 0.1, 1.0).dtype == torch.bfloat16


# ---- persona space -------------------------------------------------------------------------------------------------


def test_components_and_variance_of_four_points() -> None:
    # Around the mean (10, 0, 5): +-3 in the first direction, +-1 in the second, nothing in the third.
    points = np.array([[13.0, 0, 5], [7.0, 0, 5], [10.0, 1, 5], [10.0, -1, 5]])
    space = pca(points)
    assert space.mean.tolist() == [10, 0, 5]
    assert space.explained[:2] == pytest.approx([0.9, 0.1])  # 18 and 2 of the sum of squares 20
    assert np.abs(space.components[:2]) == pytest.approx(np.eye(3)[:2])
    assert [space.dimensions(share) for share in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    assert space.place(points) == pytest.approx(space.coordinates)
    # Not scaled: otherwise both directions would count the same.
    assert np.abs(space.coordinates[:, 0]) == pytest.approx([3, 3, 0, 0])


@pytest.mark.parametrize("sign", [1, -1])
def test_first_component_points_along_the_axis(sign: int) -> None:
    points = np.array([[3.0, 0], [-3.0, 0], [0, 1], [0, -1]])
    space = pca(points, towards=np.array([sign * 1.0, 0.2]))
    assert space.components[0, 0] == pytest.approx(sign)
    assert space.coordinates[0, 0] == pytest.approx(3 * sign)


def test_no_space_without_differences() -> None:
    for points in (np.ones((1, 3)), np.ones((4, 3))):
        with pytest.raises(UserError, match="at least two vectors that differ"):
            pca(points)


def test_cosines_in_each_layer() -> None:
    assert cosine(np.array([[3.0, 4], [1, 0]]), np.array([[3.0, 4], [0, 2]])).tolist() == [1.0, 0.0]
    assert np.isnan(cosine(np.zeros(2), np.ones(2)))


# ---- how sure the direction is -------------------------------------------------------------------------------------


def test_bootstrap_over_two_roles_by_hand() -> None:
    # default - role is (1, 0) or (0, 1), so the axis is (.5, .5). A resample has one of them twice (cosine .707 to the
    # axis) or both (cosine 1), each half of the time.
    interval = bootstrap_roles(np.zeros((1, 2)), np.array([[[-1.0, 0]], [[0, -1.0]]]), resamples=2000)
    assert interval.low == pytest.approx([np.sqrt(0.5)]) and interval.high == pytest.approx([1.0])


def test_bootstrap_narrows_with_roles_that_agree() -> None:
    default, away = np.zeros((3, 8)), np.ones((1, 3, 8))
    few, many = (bootstrap_roles(default, away + normal(n, 3, 8), resamples=300, seed=5) for n in (5, 80))
    alike = bootstrap_roles(default, np.repeat(away, 6, axis=0), resamples=50)
    assert (few.low < many.low).all() and (many.low > 0.95).all() and few.low.shape == (3,)
    assert alike.low == pytest.approx(np.ones(3))


def test_split_halves_by_hand() -> None:
    # Two roles: a split puts one into each half, and default - role is (1, 0) and (3, 4): cosine .6.
    halves = split_half(np.array([[1.0, 0]]), np.array([[[0.0, 0]], [[-2.0, -4]]]), splits=5)
    assert halves.low == halves.median == halves.high == pytest.approx([0.6])
    # Three: the halves have one role and two, and no role is in both.
    odd = split_half(np.zeros((1, 3)), -np.eye(3)[:, None], splits=20)
    assert odd.low == odd.high == pytest.approx([0.0])
    with pytest.raises(UserError, match="at least two"):
        split_half(np.zeros((1, 2)), np.ones((1, 1, 2)))
