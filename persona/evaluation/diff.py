"""What differs between two evaluations, and by how much: `python -m persona.evaluation.diff A B [--json]`.

A and B are folders of results or trees of them. Values are over the samples that both have scored; a difference is
B minus A. Holm's correction is over everything that is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from persona.errors import UserError
from persona.evaluation.comparison import Comparison, compare_pairs, differing, is_trivial, shared_rows
from persona.evaluation.report.charts import bounds, number, signed
from persona.evaluation.report.table import MARKS
from persona.evaluation.results import Row, Run, find_runs
from persona.evaluation.statistics import RESAMPLES, Estimate, Metric, estimate

_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Line:
    """One metric: both values over the shared samples, and the comparison of B with A."""

    metric: Metric
    a: Estimate
    b: Estimate
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs of one benchmark. `settings` are those that differ, with A's and B's value (None: it has no such);
    `without` the metrics that one of them lacks, or that are not defined on the shared samples."""

    a: Run
    b: Run
    settings: dict[str, list[str | None]]
    shared: int
    lines: list[Line]
    without: list[str]


@dataclass(frozen=True, slots=True)
class Diff:
    """All pairs of two places, and the runs without a counterpart."""

    pairs: list[Pair]
    only_a: list[Run]
    only_b: list[Run]


def diff(place_a: Path | str, place_b: Path | str, *, resamples: int = RESAMPLES) -> Diff:
    """Compare the runs in or below two places.

    Runs of one benchmark belong together when their stacks have one name, or when each place has a single stack there;
    trivial answers count only where a place has nothing else. Raises UserError when a place holds no run or two of one
    stack and benchmark, when nothing belongs together, and for different versions, data or prompts of a benchmark.
    """
    runs_a, runs_b = _runs(place_a), _runs(place_b)
    matched: list[tuple[Run, Run]] = []
    for benchmark in dict.fromkeys(run.summary.benchmark for run in runs_a):
        ours = {run.summary.stack: run for run in runs_a if run.summary.benchmark == benchmark}
        theirs = {run.summary.stack: run for run in runs_b if run.summary.benchmark == benchmark}
        if len(ours) == 1 and len(theirs) == 1:
            matched += zip(ours.values(), theirs.values(), strict=True)
        else:
            matched += [(ours[stack], theirs[stack]) for stack in ours if stack in theirs]
    if not matched:
        raise UserError(f"Nothing to compare: {place_a} holds {_said(runs_a)}; {place_b} holds {_said(runs_b)}.")
    found = compare_pairs([(b, a) for a, b in matched], resamples=resamples)
    pairs = []
    for a, b in matched:
        names = list({**b.summary.metrics, **a.summary.metrics})
        of_pair = {
            c.metric: c
            for c in found
            if (c.benchmark, c.stack, c.baseline) == (b.summary.benchmark, b.summary.stack, a.summary.stack)
        }
        rows_b, rows_a = shared_rows(b, a)
        lines = [
            _line(name, b.summary.metrics[name], rows_a, rows_b, of_pair[name], resamples)
            for name in names
            if name in of_pair
        ]
        without = [name for name in names if name not in of_pair]
        pairs.append(Pair(a, b, differing([a, b]), len(rows_a), lines, without))
    both_a, both_b = {id(a) for a, _ in matched}, {id(b) for _, b in matched}
    return Diff(pairs, [r for r in runs_a if id(r) not in both_a], [r for r in runs_b if id(r) not in both_b])


def _runs(place: Path | str) -> list[Run]:
    """The runs to compare: no trivial answers unless there is nothing else on a benchmark."""
    seen: dict[tuple[str, str], Run] = {}
    for run in find_runs([place]):
        key = (run.summary.benchmark, run.summary.stack)
        if key in seen:
            stack, benchmark = run.summary.stack, run.summary.benchmark
            raise UserError(
                f'Below {place} are two runs of "{stack}" on {benchmark}, {seen[key].folder} and {run.folder}: '
                "name one of them."
            )
        seen[key] = run
    serious = {benchmark for benchmark, stack in seen if not is_trivial(stack)}
    return [run for (benchmark, stack), run in seen.items() if not is_trivial(stack) or benchmark not in serious]


def _said(runs: Sequence[Run]) -> str:
    return ", ".join(f'"{run.summary.stack}" on {run.summary.benchmark}' for run in runs)


def _line(
    name: str, metric: Metric, rows_a: Sequence[Row], rows_b: Sequence[Row], comparison: Comparison, resamples: int
) -> Line:
    """Both values over the rows in which both have what the metric reads, as the difference is."""
    columns = metric.reads(name)
    both = [
        (a, b)
        for a, b in zip(rows_a, rows_b, strict=True)
        if all(column in a.values and column in b.values for column in columns)
    ]
    clusters = [b.cluster for _, b in both]
    values = [[row.values for row in rows] for rows in zip(*both, strict=True)]
    a, b = (estimate(one, clusters, name, metric, resamples=resamples) for one in values)
    assert a is not None and b is not None  # the comparison is over these rows
    return Line(metric, a, b, comparison)


def as_json(found: Diff) -> dict[str, Any]:
    """The whole as plain JSON values; a number that is not defined is null."""

    def run(one: Run) -> dict[str, Any]:
        summary = one.summary
        scored = summary.n - summary.n_unscored
        return {"folder": str(one.folder), "stack": summary.stack, "n": summary.n, "scored": scored}

    def metric(line: Line) -> dict[str, Any]:
        return {
            "name": line.comparison.metric,
            "higher_is_better": line.metric.higher_is_better,
            "a": asdict(line.a),
            "b": asdict(line.b),
            "difference": asdict(line.comparison.difference),
            "p_holm": line.comparison.p_holm,
            "b_is_better": line.comparison.better,
        }

    pairs = [
        {
            "benchmark": pair.b.summary.benchmark,
            "a": run(pair.a),
            "b": run(pair.b),
            "shared": pair.shared,
            "settings": {key: {"a": a, "b": b} for key, (a, b) in pair.settings.items()},
            "metrics": [metric(line) for line in pair.lines],
            "without": pair.without,
        }
        for pair in found.pairs
    ]
    only = {"only_a": [run(r) for r in found.only_a], "only_b": [run(r) for r in found.only_b]}
    return _defined({"pairs": pairs, **only})


def print_diff(found: Diff, console: Console) -> None:
    """Two tables per pair: settings that differ, and metrics."""
    for pair in found.pairs:
        a, b = pair.a.summary, pair.b.summary
        console.print(Text(f"{b.benchmark}: A = {a.stack}, B = {b.stack}", style="bold"))
        counts = [f"{name} {one.n - one.n_unscored} of {one.n}" for name, one in (("A", a), ("B", b))]
        console.print(Text(f"over the {pair.shared} samples both scored ({', '.join(counts)})", style="dim"))
        if pair.settings:
            table = Table("setting", "A", "B")
            for key, values in pair.settings.items():
                table.add_row(Text(key), *(Text("–" if value is None else _cut(value)) for value in values))
            console.print(table)
        table = Table("metric", "A", "B", "B − A", "p", "Holm p", "n")
        for line in pair.lines:
            difference, (mark, style) = line.comparison.difference, MARKS[line.comparison.better]
            shift = Text(signed(difference.value)).append(f" {mark}", style=style).append(f"\n{bounds(difference)}")
            arrow = "↑" if line.metric.higher_is_better else "↓"
            table.add_row(
                Text(f"{line.comparison.metric} {arrow}"),
                *(Text(f"{number(one.value)}\n{bounds(one)}") for one in (line.a, line.b)),
                shift, _p(difference.p), _p(line.comparison.p_holm), str(difference.n),
            )  # fmt: skip
        console.print(table)
        if pair.without:
            console.print(Text(f"No difference can be given in {', '.join(pair.without)}.", style="dim"))
    for name, runs in (("A", found.only_a), ("B", found.only_b)):
        if runs:
            console.print(Text(f"Only in {name}: {_said(runs)}", style="dim"))
    total = sum(len(pair.lines) for pair in found.pairs)
    note = "▲ B is better, ▼ B is worse, ○ not told apart (permutation test by cluster, Holm over"
    console.print(Text(f"{note} {total} comparisons, 0.05)", style="dim"))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The command line; returns the exit status, 2 for places that cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m persona.evaluation.diff", description=__doc__)
    parser.add_argument("a", type=Path, help="a folder of results, or a tree of them")
    parser.add_argument("b", type=Path, help="what is compared with it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(arguments)
    try:
        found = diff(given.a, given.b)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(as_json(found), ensure_ascii=False, allow_nan=False, indent=1))
    else:
        print_diff(found, console or Console())
    return 0


def _defined(value: Any) -> Any:
    """The same JSON values with null for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _defined(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_defined(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
