"""Floors, bands and the front, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from persona.errors import UserError
from persona.methods.assistant_axis.calibration import Band, bands, engaged, floors, pareto_front, parse_band

# Five rollouts, two layers; the assistant is at the high end of the axis.
PROJECTIONS = np.array([[0.0, -40], [1.0, -30], [2.0, -20], [3.0, -10], [4.0, 0]])


def test_direction_of_the_quantile() -> None:
    """Published p0.25 is a ceiling at the .25-quantile of -4 … 0, the negated projections: -3, so a floor at 3."""
    assert floors(PROJECTIONS, 0.25).tolist() == [3.0, -10.0]
    assert floors(PROJECTIONS, 0.25, "negated").tolist() == [3.0, -10.0]
    assert floors(PROJECTIONS, 0.25, "axis").tolist() == [1.0, -30.0]
    assert floors(PROJECTIONS, 0.5, "axis").tolist() == floors(PROJECTIONS, 0.5).tolist() == [2.0, -20.0]
    assert floors(PROJECTIONS, 0.1).tolist() == pytest.approx([3.6, -4.0])  # linear between 4 and 3
    assert (floors(PROJECTIONS, 0.01) == -floors(-PROJECTIONS, 0.01, "axis")).all()


def test_negated_quarter_engages_on_three_rollouts_of_four() -> None:
    many = np.random.default_rng(0).normal(size=(4000, 3))
    assert engaged(many, floors(many, 0.25)) == pytest.approx(np.full(3, 0.75), abs=1e-3)
    assert engaged(many, floors(many, 0.25, "axis")) == pytest.approx(np.full(3, 0.25), abs=1e-3)
    assert engaged(PROJECTIONS, np.array([3.0, -30.0])).tolist() == [0.6, 0.2]  # at the floor is not below it


def test_floors_of_bad_input() -> None:
    with pytest.raises(UserError, match="between 0 and 1: 25 does not"):
        floors(PROJECTIONS, 25)
    with pytest.raises(UserError, match="negated or axis, not up"):
        floors(PROJECTIONS, 0.25, "up")  # type: ignore[arg-type]
    for bad in (PROJECTIONS[:0], PROJECTIONS * np.nan, PROJECTIONS[0]):
        with pytest.raises(UserError, match="finite projections of at least one rollout"):
            floors(bad, 0.25)


def test_band_ids_exclude_their_end() -> None:
    band = Band(46, 54, 0.25)
    assert band.id == "layers_46:54-p0.25" and list(band.layers) == list(range(46, 54))
    assert parse_band(band.id) == band and parse_band("layers_0:1-p0.5") == Band(0, 1, 0.5)
    for id in ("layers_46:46-p0.25", "layers_54:46-p0.25", "46:54-p0.25", "layers_46:54-p25", "layers_46:54-p0.25x"):
        with pytest.raises(UserError, match='say layers_46:54-p0.25, not "'):
            parse_band(id)


def test_bands_around_middles() -> None:
    assert [band[:2] for band in bands(8, (4,), every=2, quantiles=(0.25,))] == [(0, 4), (2, 6), (4, 8)]
    both = list(bands(8, (2, 8), every=4))
    assert [band.id for band in both if band.quantile == 0.25] == ["layers_3:5-p0.25", "layers_0:8-p0.25"]
    assert len({band.id for band in both}) == len(both) == 8
    # The published best ones are among those of the paper's widths and steps.
    assert Band(46, 54, 0.25) in set(bands(64, (4, 8, 16), every=2))
    assert Band(56, 72, 0.25) in set(bands(80, (8, 16, 24), every=4))


def test_pareto_front_by_hand() -> None:
    #       on it  beaten by 0  on it  beaten by 2  equal to 2  loses nothing, on it
    loss = [0.02, 0.03, 0.05, 0.05, 0.05, -0.01]
    reduction = [0.30, 0.30, 0.60, 0.50, 0.60, 0.10]
    assert pareto_front(loss, reduction) == [5, 0, 2, 4]
    assert pareto_front([], []) == [] and pareto_front([1], [1]) == [0]
    for bad in (([1.0], []), ([float("nan")], [1.0])):
        with pytest.raises(ValueError, match="a loss and a reduction"):
            pareto_front(*bad)
