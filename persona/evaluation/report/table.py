"""The results of several runs in the terminal: one table of all metrics, or an overview of several benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from persona.evaluation.comparison import Comparison, compare, default_baseline, is_trivial, tell_apart
from persona.evaluation.report.charts import bounds, number
from persona.evaluation.results import Summary, find_runs
from persona.evaluation.statistics import Estimate

MARKS = {True: ("▲", "green"), False: ("▼", "red"), None: ("○", "")}
_CELL = 18  # width of a value with its interval, and the space around it

Comparisons = dict[tuple[str, str, str], Comparison]


def print_table(folders: Sequence[Path | str], *, baseline: str | None = None, console: Console | None = None) -> None:
    """Print a row per stack: every metric of one benchmark, or the primary metric of each of several.

    Values have their 95 % interval and a mark against `baseline`, by default the first run's stack. Trivial answers
    come last. Raises UserError as `results.find_runs` and `comparison.compare` do.
    """
    console = console or Console()
    runs = tell_apart(find_runs(folders))
    baseline = default_baseline(runs) if baseline is None else baseline
    found = {(c.benchmark, c.metric, c.stack): c for c in compare(runs, baseline)}
    summaries = [run.summary for run in runs]
    benchmarks = list(dict.fromkeys(summary.benchmark for summary in summaries))
    if len(benchmarks) == 1:
        console.print(_one(summaries, found))
    else:
        for table in _overview(summaries, benchmarks, found, console.width):
            console.print(table)
    if cut := sum(lost["samples"] for summary in summaries for lost in summary.cut.values()):
        said = f"{cut} samples with a prompt that did not fit its model's positions and was cut (see the report)"
        console.print(Text(said, style="yellow"))
    console.print(
        Text(
            f"Against {baseline} on the same samples: ▲ better, ▼ worse, ○ not told apart "
            f"(permutation test, Holm over {len(found)} comparisons, 0.05)",
            style="dim",
        )
    )


def _table(title: str, summaries: Sequence[Summary]) -> tuple[Table, list[str]]:
    """An empty table, and the stacks in the order of its rows."""
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    table.add_column("stack")
    stacks = dict.fromkeys(summary.stack for summary in summaries)
    return table, sorted(stacks, key=is_trivial)


def _one(summaries: Sequence[Summary], found: Comparisons) -> Table:
    first = summaries[0]
    table, stacks = _table(first.benchmark, summaries)
    shown = [name for name in first.metrics if any(name in summary.estimates for summary in summaries)]
    for name in shown:
        table.add_column(Text(f"{name} {_arrow(first, name)}"), overflow="fold")
    table.add_column("n", justify="right")
    table.add_column("unscored", justify="right")
    by_stack = {summary.stack: summary for summary in summaries}
    for index, stack in enumerate(stacks):
        one = by_stack[stack]
        cells = [_cell(one.estimates.get(name), found.get((one.benchmark, name, stack))) for name in shown]
        _add(table, stacks, index, [*cells, Text(str(one.n)), Text(str(one.n_unscored))])
    return table


def _overview(summaries: Sequence[Summary], benchmarks: Sequence[str], found: Comparisons, width: int) -> list[Table]:
    """As many tables as it takes for each column to have its place in `width` characters."""
    by_place = {(summary.benchmark, summary.stack): summary for summary in summaries}
    longest = max(len(summary.stack) for summary in summaries)
    each = max(1, (width - min(longest, width // 3) - 4) // _CELL)
    tables = []
    for start in range(0, len(benchmarks), each):
        part = benchmarks[start : start + each]
        table, stacks = _table("Overview" if start == 0 else "", summaries)
        for name in part:
            one = next(summary for summary in summaries if summary.benchmark == name)
            table.add_column(Text(f"{name}\n{one.primary} {_arrow(one, one.primary)}"), overflow="fold")
        for index, stack in enumerate(stacks):
            cells = []
            for name in part:
                summary = by_place.get((name, stack))
                if summary is None:
                    cells.append(Text("–"))
                    continue
                cell = _cell(summary.estimates.get(summary.primary), found.get((name, summary.primary, stack)))
                if summary.n_unscored:
                    cell.append(f"\n{summary.n_unscored} of {summary.n} unscored", style="yellow")
                cells.append(cell)
            _add(table, stacks, index, cells)
        tables.append(table)
    return tables


def _add(table: Table, stacks: Sequence[str], index: int, cells: Sequence[Text]) -> None:
    """A row for a stack, with a line before the trivial answers."""
    trivial = is_trivial(stacks[index])
    if index + 1 < len(stacks) and is_trivial(stacks[index + 1]) and not trivial:
        table.add_row(Text(stacks[index]), *cells, end_section=True)
    else:
        table.add_row(Text(stacks[index]), *cells, style="dim italic" if trivial else None)


def _arrow(summary: Summary, name: str) -> str:
    return "↑" if summary.metrics[name].higher_is_better else "↓"


def _cell(estimate: Estimate | None, comparison: Comparison | None) -> Text:
    if estimate is None:
        return Text("–")
    text = Text(number(estimate.value))
    if comparison is not None:
        mark, style = MARKS[comparison.better]
        text.append(f" {mark}", style=style)
    return text.append(f"\n{bounds(estimate)}")
