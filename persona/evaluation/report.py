"""One self-contained HTML page over any number of runs: offline, light and dark, wide and narrow."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from persona.evaluation import charts
from persona.evaluation.results import Attention, Comparison, Point, Row, Run, compare, find_runs
from persona.evaluation.statistics import Estimate, Metric, estimate
from persona.files import atomic_write

_BINS = 5
_BIN_RESAMPLES = 1000  # of intervals that are only drawn
_SHOWN_ITEMS = 12  # of an attention chart
_SHOWN_GROUPS = charts.COLOURS * len(charts.SHAPES)
_LONGEST_TEXT = 6000
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the overview."""

    estimate: Estimate | None
    comparison: Comparison | None
    best: bool


@dataclass(frozen=True, slots=True)
class Track:
    """One row of a metric's plot."""

    stack: str
    estimate: Estimate
    comparison: Comparison | None
    svg: Markup


@dataclass(frozen=True, slots=True)
class MetricPart:
    """A metric's plots."""

    name: str
    metric: Metric
    axis: Markup
    tracks: list[Track]
    by_history: Markup | None


@dataclass(frozen=True, slots=True)
class BenchmarkPart:
    """A benchmark's section."""

    name: str
    version: str
    runs: list[Run]
    parts: list[MetricPart]
    samples: int
    rows: int
    unscored: int


def write_report(
    folders: Sequence[Path | str],
    path: Path | str,
    *,
    baseline: str | None = None,
    title: str = "Evaluation",
    browse: int = 50,
) -> Path:
    """Write one page over all runs in or below `folders`, and return its path.

    Stacks are compared with the stack named `baseline` (default: that of the first run), Holm-corrected over the whole
    page. `browse` is how many samples of each benchmark can be read in the page. Raises UserError when there is no
    run, no such baseline, or when runs of one benchmark are not comparable.
    """
    runs = _tell_apart(find_runs(folders))
    baseline = runs[0].summary.stack if baseline is None else baseline
    comparisons = {(c.benchmark, c.metric, c.stack): c for c in compare(runs, baseline)}
    stacks = list(dict.fromkeys(run.summary.stack for run in runs))
    looks = charts.looks(stacks, baseline)
    benchmarks = [
        _benchmark_part(name, [run for run in runs if run.summary.benchmark == name], comparisons, looks, baseline)
        for name in dict.fromkeys(run.summary.benchmark for run in runs)
    ]
    environment = Environment(
        loader=PackageLoader("persona.evaluation"), autoescape=select_autoescape(default=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        name=_breakable, number=charts.number, signed=charts.signed, bounds=charts.bounds, p=_p_value
    )
    text = environment.get_template("report.html.jinja").render(
        title=title,
        baseline=baseline,
        stacks=stacks,
        keys={stack: charts.key(look) for stack, look in looks.items()},
        benchmarks=benchmarks,
        columns=[(part, metric) for part in benchmarks for metric in part.parts],
        cells=_cells(benchmarks, stacks, comparisons),
        n_comparisons=len(comparisons),
        attention=[(run, [_attention(entry) for entry in run.plots.attention]) for run in runs if run.plots.attention],
        embeddings=[(run, *_embeddings(run)) for run in runs if run.plots.points],
        browser=[_browser(part.runs, part.name, browse) for part in benchmarks],
        metadata=[(run, _flat(run.summary.settings), _flat(run.summary.environment)) for run in runs],
        style=_asset("report.css"),
        script=_asset("report.js"),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def _asset(name: str) -> Markup:
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _tell_apart(runs: list[Run]) -> list[Run]:
    """Give runs of the same stack and benchmark different names, after the output folders they are in."""
    counts = Counter((run.summary.benchmark, run.summary.stack) for run in runs)
    taken: set[tuple[str, str]] = set()
    result = []
    for run in runs:
        stack = run.summary.stack
        if counts[run.summary.benchmark, stack] > 1:
            above = run.folder.resolve().parts
            # outputs/<name>/evaluation/...: the name tells two trainings of one method apart.
            named = above[above.index("evaluation") - 1] if "evaluation" in above[1:] else str(run.folder)
            stack = f"{stack} ({named})"
            if (run.summary.benchmark, stack) in taken:
                stack = f"{run.summary.stack} ({run.folder})"
        taken.add((run.summary.benchmark, stack))
        result.append(replace(run, summary=replace(run.summary, stack=stack)))
    return result


def _benchmark_part(
    name: str,
    runs: list[Run],
    comparisons: Mapping[tuple[str, str, str], Comparison],
    looks: Mapping[str, charts.Look],
    baseline: str,
) -> BenchmarkPart:
    bins = history_bins([row.n_items for run in runs for row in run.rows])
    parts = []
    for metric_name, metric in runs[0].summary.metrics.items():
        having = [run for run in runs if metric_name in run.summary.estimates]
        shown = charts.spread([run.summary.estimates[metric_name] for run in having])
        if not shown:
            continue
        axes = charts.scale(shown)
        reference = next((r.summary.estimates[metric_name].value for r in having if r.summary.stack == baseline), None)
        tracks = []
        for run in having:
            found, stack = run.summary.estimates[metric_name], run.summary.stack
            said = f"{stack}: {charts.number(found.value)} {charts.bounds(found)}, n = {found.n}"
            svg = charts.track(found, axes, looks[stack], reference, said)
            tracks.append(Track(stack, found, comparisons.get((name, metric_name, stack)), svg))
        by_history = _by_history(runs, metric_name, metric, bins, looks) if len(bins) > 1 else None
        parts.append(MetricPart(metric_name, metric, charts.axis(axes), tracks, by_history))
    return BenchmarkPart(
        name=name,
        version=runs[0].summary.benchmark_version,
        runs=runs,
        parts=parts,
        samples=max(run.summary.n for run in runs),
        rows=sum(run.summary.n for run in runs),
        unscored=sum(run.summary.n_unscored for run in runs),
    )


def history_bins(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Inclusive ranges of history length: each length by itself if they are few, else of about equal counts."""
    distinct = sorted(set(lengths))
    if len(distinct) <= _BINS + 1:
        return [(length, length) for length in distinct]
    ordered = sorted(lengths)
    edges = sorted({ordered[len(ordered) * i // _BINS] for i in range(_BINS)} | {distinct[0]})
    return [(low, high - 1) for low, high in zip(edges, [*edges[1:], distinct[-1] + 1], strict=True)]


def _by_history(
    runs: Sequence[Run], name: str, metric: Metric, bins: Sequence[tuple[int, int]], looks: Mapping[str, charts.Look]
) -> Markup | None:
    series = []
    for index, run in enumerate(runs):
        row: list[Estimate | None] = []
        for low, high in bins:
            inside = [r for r in run.rows if r.values and low <= r.n_items <= high]
            values, clusters = [r.values for r in inside], [r.cluster for r in inside]
            row.append(estimate(values, clusters, name, metric, resamples=_BIN_RESAMPLES))
        series.append(charts.Series(index, run.summary.stack, looks[run.summary.stack], row))
    if not charts.spread([entry for one in series for entry in one.estimates if entry is not None]):
        return None
    labels = [str(low) if low == high else f"{low}–{high}" for low, high in bins]
    return charts.lines(labels, series, f"{name} by number of items in the user's history")


def _cells(
    benchmarks: Sequence[BenchmarkPart],
    stacks: Sequence[str],
    comparisons: Mapping[tuple[str, str, str], Comparison],
) -> dict[str, list[Cell]]:
    result: dict[str, list[Cell]] = {stack: [] for stack in stacks}
    for part in benchmarks:
        for metric in part.parts:
            found = {track.stack: track.estimate for track in metric.tracks}
            finite = [entry.value for entry in found.values() if math.isfinite(entry.value)]
            best = (max if metric.metric.higher_is_better else min)(finite)
            for stack in stacks:
                entry = found.get(stack)
                marked = entry is not None and len(finite) > 1 and entry.value == best
                result[stack].append(Cell(entry, comparisons.get((part.name, metric.name, stack)), marked))
    return result


def _attention(entry: Attention) -> dict[str, Any]:
    ordered = sorted(entry.items, key=lambda item: -item[1])
    shown, rest = ordered[:_SHOWN_ITEMS], ordered[_SHOWN_ITEMS:]
    top = max((weight for _, weight in shown), default=1.0) or 1.0
    return {
        "user": entry.user,
        "query": entry.query,
        "items": [(text, weight, 100 * weight / top) for text, weight in shown],
        "rest": len(rest),
        "rest_weight": sum(weight for _, weight in rest),
        "uniform": min(100.0, 100 / len(ordered) / top) if ordered else 0.0,
        "n": len(ordered),
    }


def _embeddings(run: Run) -> tuple[Markup, list[tuple[str, Markup, int]]]:
    counts = Counter(point.group for point in run.plots.points)
    kept = [group for group, _ in counts.most_common(_SHOWN_GROUPS)]
    # Numbers inside names count as numbers: "voice 2" comes before "voice 10".
    names = sorted(kept, key=lambda group: [(part.isdigit(), part.zfill(9)) for part in re.split(r"(\d+)", group)])
    points: list[Point] = [
        point if point.group in kept else replace(point, group=OTHER, label=f"{point.label} ({point.group})")
        for point in run.plots.points
    ]
    groups = charts.looks(names) | ({OTHER: charts.Look("base", "circle")} if len(counts) > len(kept) else {})
    said = f"{run.plots.points_title}: {len(points)} users of {run.summary.stack} in two dimensions"
    totals = Counter(point.group for point in points)
    return charts.scatter(points, groups, said), [(g, charts.key(look), totals[g]) for g, look in groups.items()]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + f" … ({len(text)} characters)"


def _browser(runs: Sequence[Run], name: str, browse: int) -> dict[str, Any]:
    """The first samples of a benchmark, each with what every stack made of it."""
    by_id: list[dict[str, Row]] = [{row.id: row for row in run.rows} for run in runs]
    samples = []
    for row in runs[0].rows[:browse]:
        replies = [
            {"stack": run.summary.stack, "raw": _cut(rows[row.id].raw), "reason": rows[row.id].reason,
             "values": {key: _plain(value) for key, value in rows[row.id].values.items()}}
            for run, rows in zip(runs, by_id, strict=True)
            if row.id in rows
        ]  # fmt: skip
        samples.append(
            {"id": row.id, "task": row.task, "persona": row.persona, "description": _cut(row.description),
             "n_items": row.n_items, "items": [_cut(item) for item in row.items],
             "messages": [{"role": m["role"], "content": _cut(m["content"])} for m in row.messages],
             "options": row.options, "target": _cut(row.target), "replies": replies}
        )  # fmt: skip
    return {"benchmark": name, "total": len(runs[0].rows), "samples": samples}


def _breakable(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def _plain(value: float) -> str:
    return str(int(value)).replace("-", "−") if float(value).is_integer() else charts.number(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    result = []
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            result += _flat(entry, f"{prefix}{key}.")
        else:
            result.append((prefix + key, entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)))
    return result


def _p_value(value: float, name: str = "p") -> str:
    if value < 0.001:
        return f"{name} < 0.001"
    return f"{name} = {value:.3f}"
