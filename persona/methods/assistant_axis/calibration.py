"""Where to cap: thresholds from the projections of rollouts, bands of layers, and which settings are worth their cost.

The cap keeps a state's projection onto the axis at or above a floor, in each layer of a band of adjacent ones
(reference/assistant_axis 3.6). All functions are pure: what a setting costs and prevents is measured elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from persona.errors import UserError

QuantileDirection = Literal["negated", "axis"]
QUANTILES = (0.01, 0.25, 0.5, 0.75)  # tried in the paper; the best was .25


def floors(projections: np.ndarray, quantile: float, quantile_direction: QuantileDirection = "negated") -> np.ndarray:
    """Floors on the axis, one for each layer [L], from projections of rollouts' mean activations onto it [N, L].

    The trap of the sign: the axis points from roles to the assistant, but published caps are ceilings on the *negated*
    axis, and their "p0.25" is the .25-quantile of the negated projections (reference 3.6: by a third party's
    calibration; the paper's text leaves the sign open). On the axis itself this is a floor at the .75-quantile, near
    the assistant's own value, so that three rollouts in four lie below it. That is "negated", the default. "axis"
    takes the quantile of the projections as they are: a floor at the .25-quantile, which only the farthest quarter
    lies below, and so a much weaker cap. In the paper projections are those of all role and trait rollouts, whatever
    their score. Between two rollouts a quantile is linear. Raises UserError for a quantile outside 0 .. 1, another
    direction, and projections that are not finite.
    """
    if quantile_direction not in get_args(QuantileDirection):
        known = " or ".join(get_args(QuantileDirection))
        raise UserError(
            f"quantile_direction says on which side quantiles are counted: {known}, not {quantile_direction}"
        )
    if not 0 <= quantile <= 1:
        raise UserError(f"a quantile lies between 0 and 1: {quantile:g} does not")
    values = np.asarray(projections, dtype=np.float64)
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise UserError("floors are taken from finite projections of at least one rollout, [rollouts, layers]")
    if quantile_direction == "negated":
        return -np.quantile(-values, quantile, axis=0)
    return np.quantile(values, quantile, axis=0)


def engaged(projections: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Share of rollouts [N, L] below the floor of each layer [L]: what the cap is expected to change, 0 to 1.

    An expectation for means over a reply's tokens in an uncapped model. A cap acts on single tokens, whose projections
    scatter more, and on layers behind capped ones: the fraction that a run counts differs.
    """
    return (np.asarray(projections) < np.asarray(floor)).mean(axis=0)


class Band(NamedTuple):
    """Adjacent layers from `start` to `stop` - 1, and the quantile of their floors (published: of negated ones)."""

    start: int
    stop: int
    quantile: float

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)

    @property
    def id(self) -> str:
        """ "layers_46:54-p0.25": the end does not belong to the band."""
        return f"layers_{self.start}:{self.stop}-p{self.quantile:g}"


def parse_band(id: str) -> Band:
    """The inverse of `Band.id`. Raises UserError for another form, an empty band or a quantile outside 0 .. 1."""
    found = re.fullmatch(r"layers_(\d+):(\d+)-p(\d*\.?\d+)", id)
    band = Band(int(found[1]), int(found[2]), float(found[3])) if found else None
    if band is None or not band.layers or band.quantile > 1:
        raise UserError(f'a cap is named "layers_<first>:<last + 1>-p<quantile>", say layers_46:54-p0.25, not "{id}"')
    return band


def bands(layers: int, widths: Sequence[int], every: int, quantiles: Sequence[float] = QUANTILES) -> Iterator[Band]:
    """All bands of a model of `layers` that are to be tried: each width, its middle at every `every`-th layer.

    Bands that would reach beyond either end are left out. In the paper widths were 4, 8, 16 (Qwen3-32B, 64 layers) and
    8, 16, 24 (Llama-3.3-70B, 80 layers), and the best ones 46:54 and 56:72, at quantile .25.
    """
    for width in widths:
        for middle in range(0, layers, every):
            start = middle - width // 2
            if 0 <= start and start + width <= layers:
                yield from (Band(start, start + width, quantile) for quantile in quantiles)


def pareto_front(loss: Sequence[float], reduction: Sequence[float]) -> list[int]:
    """Which settings no other one beats: indices, by rising loss.

    `loss` of capability and `reduction` of harm, one of each for each setting, in any unit. A setting is beaten by one
    that loses no more and reduces no less, and is better in one of the two; equals stay both. Raises ValueError for
    unequal lengths or nan.
    """
    points = np.array([loss, reduction], dtype=np.float64).T if len(loss) == len(reduction) else None
    if points is None or np.isnan(points).any():
        raise ValueError("a front is taken over settings with a loss and a reduction each")
    better = (points[:, None, 0] <= points[None, :, 0]) & (points[:, None, 1] >= points[None, :, 1])
    beaten = (better & ~better.T).any(axis=0)
    return sorted(np.flatnonzero(~beaten).tolist(), key=lambda i: (points[i, 0], -points[i, 1], i))
