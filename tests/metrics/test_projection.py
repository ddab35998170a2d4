"""Projection onto an axis, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from persona.metrics.projection import project


def test_by_hand() -> None:
    hidden = np.array([[3.0, 4.0], [-1.0, 2.0]], dtype=np.float32)
    assert project(hidden, np.array([0.0, 2.0])).tolist() == [4.0, 2.0]  # the axis's length does not matter
    assert project(hidden, np.array([3.0, 4.0])) == pytest.approx([5.0, 1.0])
    # One direction for each layer: the second state is seen along the second one.
    both = project(np.stack([hidden, 2 * hidden]), np.array([[0.0, 2.0], [-3.0, 0.0]]))
    assert both.tolist() == [[4.0, 1.0], [8.0, 2.0]]


def test_tensors_and_arrays_give_the_same_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, axis = torch.randn(2, 5, 3, 64, generator=generator), torch.randn(3, 64, generator=generator)
    there, here = project(hidden, axis), project(hidden.numpy(), axis.numpy())
    assert there.shape == (2, 5, 3) and there.dtype == torch.float32 and here.dtype == np.float32
    assert np.array_equal(there.numpy(), here)
    exact = (hidden.double() * axis.double()).sum(-1) / axis.double().norm(dim=-1)
    assert (there - exact).abs().max() < 1e-5
    half = project(hidden.bfloat16(), axis)  # widened before anything is summed
    assert half.dtype == torch.float32
    assert (half - project(hidden.bfloat16().float(), axis)).abs().max() == 0


@pytest.mark.parametrize(
    ("hidden", "axis", "complaint"),
    [
        ((4, 3), np.ones(4), "shape"),
        ((4, 3), np.ones((2, 3)), "shape"),
        ((3,), np.ones((2, 3)), "shape"),
        ((4, 3), np.zeros(3), "length zero"),
        ((4, 2, 3), np.array([[1.0, 0, 0], [0, np.nan, 0]]), "not finite"),
    ],
)
def test_what_has_no_projection(hidden: tuple[int, ...], axis: np.ndarray, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        project(np.ones(hidden), axis)
