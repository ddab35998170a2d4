"""Small SVG charts. Horizontal positions are percentages, so a chart fills any width while its text keeps its size.

Colours are CSS classes (c0 … c6, base for the baseline, trivial for answers that read nothing), so the page's light
and dark themes both apply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from persona.evaluation.results import Point
from persona.evaluation.statistics import Estimate

COLOURS = 7
_MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "square": "M-4 -4H4V4H-4Z",
    "diamond": "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "triangle": "M0 -5L5 4H-5Z",
}
SHAPES = tuple(_MARKS)


@dataclass(frozen=True, slots=True)
class Look:
    """How one stack or group is drawn wherever it appears."""

    colour: str
    shape: str


def looks(names: Sequence[str], baseline: str | None = None, trivial: Sequence[str] = ()) -> dict[str, Look]:
    """Colours in order, and another mark after each round of colours; the baseline is grey, `trivial` ones hollow."""
    others = [name for name in names if name != baseline and name not in trivial]
    result = {name: Look(f"c{i % COLOURS}", SHAPES[i // COLOURS % len(SHAPES)]) for i, name in enumerate(others)}
    result |= {name: Look("trivial", SHAPES[1 + i % 3]) for i, name in enumerate(trivial)}
    if baseline is not None:
        result[baseline] = Look("base", "circle")
    return result


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear axis with round ticks; `share` is a value's position between 0 and 1."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def percent(self, value: float) -> str:
        """Position as an SVG length, with a margin at both ends so that marks and tick labels stay inside."""
        return f"{4 + 92 * self.share(value):.2f}%"

    def label(self, tick: float) -> str:
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(self.ticks[0]) or 1.0
        return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "−")


def scale(values: Sequence[float], most_ticks: int = 6) -> Scale:
    """An axis over all values with at most `most_ticks` ticks at multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.05 * max(1.0, abs(low)), high + 0.05 * max(1.0, abs(high))
    power = 10.0 ** math.floor(math.log10((high - low) / most_ticks))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most_ticks - 1)
    first = math.ceil(low / step - 1e-9)
    ticks = tuple(round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1))
    return Scale(low, high, ticks)


def spread(estimates: Sequence[Estimate]) -> list[float]:
    """The finite numbers an axis for these estimates has to show."""
    return [v for e in estimates for v in (e.value, e.low, e.high) if v is not None and math.isfinite(v)]


def number(value: float | None) -> str:
    """A value with three digits after the point, fewer when it is large; a real minus sign."""
    if value is None or not math.isfinite(value):
        return "–"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """`number` with an explicit plus."""
    return ("+" if value >= 0 else "") + number(value)


def bounds(estimate: object) -> str:
    """ "[low, high]" of an estimate or difference, or a word where they are undefined."""
    low, high = getattr(estimate, "low"), getattr(estimate, "high")  # noqa: B009
    return "no interval" if low is None else f"[{number(low)}, {number(high)}]"


def mark(look: Look, x: str, y: str, title: str = "") -> Markup:
    """One mark at (x, y), two SVG lengths."""
    shown = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<svg x="{}" y="{}"><path class="mark {}" d="{}">{}</path></svg>').format(
        x, y, look.colour, _MARKS[look.shape], shown
    )


def key(look: Look) -> Markup:
    """The mark alone, for a legend."""
    return Markup('<svg class="key" width="14" height="14" aria-hidden="true">{}</svg>').format(
        mark(look, "50%", "50%")
    )


def axis(axes: Scale) -> Markup:
    """Tick labels over the tracks of one metric."""
    texts = Markup("").join(
        Markup('<text x="{}" y="12" text-anchor="middle">{}</text>').format(axes.percent(tick), axes.label(tick))
        for tick in axes.ticks
    )
    return Markup('<svg class="axis" height="16" aria-hidden="true">{}</svg>').format(texts)


def track(estimate: Estimate, axes: Scale, look: Look, reference: float | None, title: str) -> Markup:
    """One row of a dot-and-interval plot: gridlines, the baseline's value dashed, the interval and the dot."""
    parts = [
        Markup('<line class="grid" x1="{0}" x2="{0}" y1="0" y2="100%"/>').format(axes.percent(tick))
        for tick in axes.ticks
    ]
    if reference is not None and math.isfinite(reference):
        line = Markup('<line class="reference" x1="{0}" x2="{0}" y1="0" y2="100%"/>')
        parts.append(line.format(axes.percent(reference)))
    if estimate.low is not None and estimate.high is not None:
        parts.append(
            Markup('<line class="interval {}" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(
                look.colour, axes.percent(estimate.low), axes.percent(estimate.high)
            )
        )
    if math.isfinite(estimate.value):
        parts.append(mark(look, axes.percent(estimate.value), "50%"))
    return Markup('<svg class="track" role="img" aria-label="{0}"><title>{0}</title>{1}</svg>').format(
        title, Markup("").join(parts)
    )


@dataclass(frozen=True, slots=True)
class Series:
    """One stack's estimates over ordered categories; `index` ties it to its entry in the legend."""

    index: int
    name: str
    look: Look
    estimates: Sequence[Estimate | None]


def lines(labels: Sequence[str], series: Sequence[Series], title: str) -> Markup:
    """Estimates of several stacks over ordered categories, side by side in each, with their intervals."""
    height, top, bottom = 232, 10, 196
    axes = scale(spread([entry for one in series for entry in one.estimates if entry is not None]))

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * axes.share(value), 1)

    parts = []
    for tick in axes.ticks:
        parts.append(Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(y(tick)))
        text = Markup('<text x="-8" y="{}" text-anchor="end">{}</text>')
        parts.append(text.format(y(tick) + 4, axes.label(tick)))
    width = 100 / len(labels)
    for i, label in enumerate(labels):
        middle = f"{width * (i + 0.5):.2f}%"
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, height - 16, label))
    for place, one in enumerate(series):
        row = [None if entry is None or not math.isfinite(entry.value) else entry for entry in one.estimates]
        offset = width * 0.6 * ((place + 0.5) / len(series) - 0.5)
        xs = [width * (i + 0.5) + offset for i in range(len(labels))]
        shapes = []
        for x1, first, x2, second in zip(xs, row, xs[1:], row[1:], strict=False):
            if first is not None and second is not None:
                line = Markup('<line class="link {}" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>')
                shapes.append(line.format(one.look.colour, x1, x2, y(first.value), y(second.value)))
        for x, entry, label in zip(xs, row, labels, strict=True):
            if entry is None:
                continue
            if entry.low is not None and entry.high is not None:
                line = Markup('<line class="interval {0}" x1="{1:.2f}%" x2="{1:.2f}%" y1="{2}" y2="{3}"/>')
                shapes.append(line.format(one.look.colour, x, y(entry.low), y(entry.high)))
            said = f"{one.name}, {label}: {number(entry.value)} {bounds(entry)}, n = {entry.n}"
            shapes.append(mark(one.look, f"{x:.2f}%", str(y(entry.value)), said))
        parts.append(Markup('<g data-series="{}">{}</g>').format(one.index, Markup("").join(shapes)))
    return Markup('<div class="plot"><svg height="{}" role="img" aria-label="{}">{}</svg></div>').format(
        height, title, Markup("").join(parts)
    )


def scatter(points: Sequence[Point], groups: dict[str, Look], title: str) -> Markup:
    """Points in a plane with equal units on both axes; a point's label appears on hovering."""
    width, height, margin = 680.0, 420.0, 16.0
    xs, ys = [point.x for point in points], [point.y for point in points]
    unit = min(
        (width - 2 * margin) / max(max(xs) - min(xs), 1e-9), (height - 2 * margin) / max(max(ys) - min(ys), 1e-9)
    )
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    parts = []
    for point in points:
        look = groups[point.group]
        x, y = width / 2 + unit * (point.x - middle_x), height / 2 - unit * (point.y - middle_y)
        said = point.label if point.label == point.group else f"{point.label} ({point.group})"
        parts.append(mark(look, f"{x:.1f}", f"{y:.1f}", said))
    return Markup('<svg class="scatter" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, Markup("").join(parts)
    )
