"""What the report says of one benchmark: metrics of all stacks, breakdowns, judges, what it cost, how runs differ."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from persona.evaluation.comparison import Comparison, differing, is_trivial
from persona.evaluation.judges.agreement import Agreement, judge_agreement
from persona.evaluation.report import charts
from persona.evaluation.results import Row, Run
from persona.evaluation.statistics import Estimate, Metric, estimate

_BINS = 5
_PART_RESAMPLES = 1000  # of intervals of parts of a benchmark
_SHOWN_VALUES = 40  # of one breakdown
_SHOWN_REASONS = 12
_NOT_ALIKE = ("model", "stack")  # settings by which stacks differ anyway

Comparisons = Mapping[tuple[str, str, str], Comparison]


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table, or None where the stack has none."""

    estimate: Estimate | None
    comparison: Comparison | None = None
    best: bool = False
    n: int = 0
    n_unscored: int = 0


@dataclass(frozen=True, slots=True)
class Track:
    """One row of a metric's plot."""

    stack: str
    estimate: Estimate
    comparison: Comparison | None
    svg: Markup


@dataclass(frozen=True, slots=True)
class MetricPart:
    """A metric: a cell per run, its plot, and its plot over the length of the history."""

    name: str
    metric: Metric
    cells: list[Cell]
    axis: Markup
    tracks: list[Track]
    by_history: Markup | None


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The primary metric by one key of the rows' groups: a row per value of the key, a cell per run."""

    key: str
    rows: list[tuple[str, list[Cell]]]
    left_out: int


@dataclass(frozen=True, slots=True)
class JudgePart:
    """One judge under one rubric: per run what it said (None: nothing was asked), and why it could not be read."""

    judge: str
    rubric: str
    said: list[tuple[str, int, int] | None]
    reasons: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class BenchmarkPart:
    """A benchmark's section. `primary` is None where no run has a value of the primary metric; `without` are the
    metrics that no run has a value of; `cut` says (stack, role, samples, of how many, tokens) where prompts did not
    fit the positions of a role's model; `curves` are a title and a plot each."""

    name: str
    version: str
    runs: list[Run]
    primary: MetricPart | None
    parts: list[MetricPart]
    without: list[str]
    samples: int
    rows: int
    unscored: int
    reasons: list[tuple[str, list[tuple[str, int]], int]]
    cut: list[tuple[str, str, int, int, int]]
    breakdowns: list[Breakdown]
    curves: list[tuple[str, Markup]]
    judges: list[JudgePart]
    agreement: dict[str, Agreement]
    usage: list[tuple[str, str, dict[str, float]]]
    not_alike: list[tuple[str, list[tuple[str, str | None]]]]

    @property
    def others(self) -> list[MetricPart]:
        """All metrics but the primary one."""
        return [part for part in self.parts if part is not self.primary]

    @property
    def usage_keys(self) -> list[str]:
        """What is counted of roles, in the order in which it was reported."""
        return list(dict.fromkeys(key for *_, counted in self.usage for key in counted))


def benchmark_part(
    runs: list[Run], comparisons: Comparisons, looks: Mapping[str, charts.Look], baseline: str
) -> BenchmarkPart:
    """The section of the benchmark that all `runs` are of."""
    first = runs[0].summary
    bins = history_bins([row.n_items for run in runs for row in run.rows])
    parts = [
        part
        for name, metric in first.metrics.items()
        if (part := _metric_part(name, metric, runs, comparisons, looks, baseline, bins)) is not None
    ]
    return BenchmarkPart(
        name=first.benchmark,
        version=first.benchmark_version,
        runs=runs,
        primary=next((part for part in parts if part.name == first.primary), None),
        parts=parts,
        without=[name for name in first.metrics if all(part.name != name for part in parts)],
        samples=max(run.summary.n for run in runs),
        rows=sum(run.summary.n for run in runs),
        unscored=sum(run.summary.n_unscored for run in runs),
        reasons=[_reasons(run) for run in runs if run.summary.n_unscored],
        cut=[
            (run.summary.stack, role, lost["samples"], run.summary.n, lost["tokens"])
            for run in runs
            for role, lost in run.summary.cut.items()
        ],
        breakdowns=breakdowns(runs),
        curves=curves(runs, looks),
        judges=judge_parts(runs),
        agreement=agreement(runs),
        usage=[
            (run.summary.stack, role, counted)
            for run in runs
            for role, counted in run.summary.environment.get("usage", {}).items()
        ],
        not_alike=_not_alike(runs),
    )


def _metric_part(
    name: str,
    metric: Metric,
    runs: Sequence[Run],
    comparisons: Comparisons,
    looks: Mapping[str, charts.Look],
    baseline: str,
    bins: Sequence[tuple[int, int]],
) -> MetricPart | None:
    having = [run.summary for run in runs if name in run.summary.estimates]
    shown = charts.spread([summary.estimates[name] for summary in having])
    if not shown:
        return None
    axes = charts.scale(shown)
    reference = next((s.estimates[name].value for s in having if s.stack == baseline), None)
    tracks = []
    for summary in having:
        found, stack = summary.estimates[name], summary.stack
        said = f"{stack}: {charts.number(found.value)} {charts.bounds(found)}, n = {found.n}"
        svg = charts.track(found, axes, looks[stack], reference, said)
        tracks.append(Track(stack, found, comparisons.get((summary.benchmark, name, stack)), svg))
    by_history = _by_history(runs, name, metric, bins, looks) if len(bins) > 1 else None
    cells = metric_cells(name, metric, runs, comparisons)
    return MetricPart(name, metric, cells, charts.axis(axes), tracks, by_history)


def metric_cells(name: str, metric: Metric, runs: Sequence[Run], comparisons: Comparisons) -> list[Cell]:
    """A cell per run. The best value is marked among stacks that are no trivial answers, if there are others."""
    rivals = [run.summary.estimates.get(name) for run in runs if not is_trivial(run.summary.stack)]
    finite = [entry.value for entry in rivals if entry is not None and math.isfinite(entry.value)]
    best = (max if metric.higher_is_better else min)(finite, default=None)
    cells = []
    for run in runs:
        summary = run.summary
        entry = summary.estimates.get(name)
        rival = entry is not None and not is_trivial(summary.stack) and len(set(finite)) > 1
        comparison = comparisons.get((summary.benchmark, name, summary.stack))
        marked = rival and entry is not None and entry.value == best
        cells.append(Cell(entry, comparison, marked, summary.n, summary.n_unscored))
    return cells


def history_bins(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Inclusive ranges of history length: each length by itself if they are few, else of about equal counts."""
    distinct = sorted(set(lengths))
    if len(distinct) <= _BINS + 1:
        return [(length, length) for length in distinct]
    ordered = sorted(lengths)
    edges = sorted({ordered[len(ordered) * i // _BINS] for i in range(_BINS)} | {distinct[0]})
    return [(low, high - 1) for low, high in zip(edges, [*edges[1:], distinct[-1] + 1], strict=True)]


def _part_of(rows: Sequence[Row], name: str, metric: Metric) -> Estimate | None:
    scored = [row for row in rows if row.values]
    values, clusters = [row.values for row in scored], [row.cluster for row in scored]
    return estimate(values, clusters, name, metric, resamples=_PART_RESAMPLES)


def _by_history(
    runs: Sequence[Run], name: str, metric: Metric, bins: Sequence[tuple[int, int]], looks: Mapping[str, charts.Look]
) -> Markup | None:
    series = []
    for index, run in enumerate(runs):
        row = [_part_of([r for r in run.rows if low <= r.n_items <= high], name, metric) for low, high in bins]
        series.append(charts.Series(index, run.summary.stack, looks[run.summary.stack], row))
    if not charts.spread([entry for one in series for entry in one.estimates if entry is not None]):
        return None
    labels = [str(low) if low == high else f"{low}–{high}" for low, high in bins]
    return charts.lines(labels, series, f"{name} by number of items in the user's history")


def in_order(names: Sequence[str]) -> list[str]:
    """Sorted with numbers inside names as numbers: "level 2" comes before "level 10"."""
    return sorted(
        names, key=lambda name: [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )


def breakdowns(runs: Sequence[Run]) -> list[Breakdown]:
    """One per key of the rows' groups. Of a key with many values the largest groups are kept and the rest counted."""
    name = runs[0].summary.primary
    metric = runs[0].summary.metrics[name]
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row.groups)
    result = []
    for key in keys:
        members: list[dict[str, list[Row]]] = []
        counts: Counter[str] = Counter()
        for run in runs:
            by_value: dict[str, list[Row]] = {}
            for row in run.rows:
                if key in row.groups:
                    by_value.setdefault(row.groups[key], []).append(row)
            members.append(by_value)
            counts |= Counter({value: len(rows) for value, rows in by_value.items()})
        kept = in_order([value for value, _ in counts.most_common(_SHOWN_VALUES)])
        table = []
        for value in kept:
            found = [by_value.get(value, []) for by_value in members]
            unscored = [sum(not row.values for row in rows) for rows in found]
            cells = [
                Cell(_part_of(rows, name, metric), n=len(rows), n_unscored=n)
                for rows, n in zip(found, unscored, strict=True)
            ]
            table.append((value, cells))
        result.append(Breakdown(key, table, len(counts) - len(kept)))
    return result


def curves(runs: Sequence[Run], looks: Mapping[str, charts.Look]) -> list[tuple[str, Markup]]:
    """The runs' curves of one title in one plot, over all steps that any of them has."""
    result = []
    for title, step in dict.fromkeys((curve.title, curve.step) for run in runs for curve in run.curves):
        found = [next((c.points for c in run.curves if c.title == title), {}) for run in runs]
        steps = sorted({at for points in found for at in points})
        series = [
            charts.Series(index, run.summary.stack, looks[run.summary.stack], [points.get(at) for at in steps])
            for index, (run, points) in enumerate(zip(runs, found, strict=True))
        ]
        if charts.spread([entry for one in series for entry in one.estimates if entry is not None]):
            result.append((title, charts.lines([str(at) for at in steps], series, f"{title} by {step}")))
    return result


def judge_parts(runs: Sequence[Run]) -> list[JudgePart]:
    """Every (judge, rubric) of the rows' verdicts: what it said on average, how often, and how often unreadably."""
    found: dict[tuple[str, str], list[list]] = {}
    for index, run in enumerate(runs):
        for row in run.rows:
            for verdict in row.verdicts:
                key = (verdict.judge, verdict.rubric)
                found.setdefault(key, [[] for _ in runs])[index].append(verdict)
    result = []
    for (judge, rubric), per_run in found.items():
        said: list[tuple[str, int, int] | None] = []
        for verdicts in per_run:
            readable = [verdict.value for verdict in verdicts if verdict.value is not None]
            said.append((_typical(readable), len(verdicts), len(verdicts) - len(readable)) if verdicts else None)
        reasons = Counter(v.reason for verdicts in per_run for v in verdicts if v.value is None)
        result.append(JudgePart(judge, rubric, said, reasons.most_common(_SHOWN_REASONS)))
    return result


def agreement(runs: Sequence[Run]) -> dict[str, Agreement]:
    """By rubric that two judges or more were asked on, over the replies of all stacks but trivial answers."""
    rivals = [run for run in runs if not is_trivial(run.summary.stack)] or runs
    # The same sample under two stacks is two questions.
    rows = [replace(row, id=f"{place} {row.id}") for place, run in enumerate(rivals) for row in run.rows]
    return {rubric: one for rubric, one in judge_agreement(rows).items() if len(one.asked) > 1}


def _typical(values: Sequence[float | str]) -> str:
    """The mean of numbers; of words, the three commonest with their shares."""
    numbers = [value for value in values if not isinstance(value, str)]
    if not values:
        return "–"
    if len(numbers) == len(values):
        return charts.number(sum(numbers) / len(numbers))
    shares = Counter(map(str, values)).most_common(3)
    return ", ".join(f"{word} {100 * n / len(values):.0f} %" for word, n in shares)


def _reasons(run: Run) -> tuple[str, list[tuple[str, int]], int]:
    """The stack, its commonest reasons for unscored samples, and how many samples have another one."""
    reasons = list(run.summary.unscored_reasons.items())
    return run.summary.stack, reasons[:_SHOWN_REASONS], sum(n for _, n in reasons[_SHOWN_REASONS:])


def _not_alike(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Settings beside model and stack in which the runs differ (judges, rules of scoring), with each stack's value."""
    rivals = [run for run in runs if not is_trivial(run.summary.stack)] or list(runs)
    stacks = [run.summary.stack for run in rivals]
    found = {key: values for key, values in differing(rivals).items() if key.split(".")[0] not in _NOT_ALIKE}
    return [(key, list(zip(stacks, values, strict=True))) for key, values in found.items()]
