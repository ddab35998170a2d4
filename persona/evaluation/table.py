"""The results of several runs as one table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from persona.evaluation.charts import bounds, number
from persona.evaluation.results import compare, find_runs

_MARKS = {True: " [green]▲[/]", False: " [red]▼[/]", None: " ○"}


def print_table(folders: Sequence[Path | str], *, baseline: str | None = None, console: Console | None = None) -> None:
    """Print one table per benchmark: a row per stack, value and 95 % interval per metric, marks against `baseline`.

    `baseline` is by default the first run's stack. Raises UserError as `results.find_runs` and `results.compare` do.
    """
    console = console or Console()
    runs = find_runs(folders)
    baseline = runs[0].summary.stack if baseline is None else baseline
    marks = {(c.benchmark, c.metric, c.stack): _MARKS[c.better] for c in compare(runs, baseline)}
    for benchmark in dict.fromkeys(run.summary.benchmark for run in runs):
        of_one = [run.summary for run in runs if run.summary.benchmark == benchmark]
        shown = [name for name in of_one[0].metrics if any(name in summary.estimates for summary in of_one)]
        table = Table(title=benchmark, title_justify="left", title_style="bold", caption_justify="left")
        table.add_column("stack")
        for name in shown:
            table.add_column(f"{name} {'↑' if of_one[0].metrics[name].higher_is_better else '↓'}", overflow="fold")
        table.add_column("n", justify="right")
        table.add_column("unscored", justify="right")
        for summary in of_one:
            cells = []
            for name in shown:
                found = summary.estimates.get(name)
                mark = marks.get((benchmark, name, summary.stack), "")
                # The bracket is escaped: rich would read "[0.1, 0.2]" as markup where it looks like a tag.
                text = "–" if found is None else f"{number(found.value)}{mark}\n\\{bounds(found)}"
                cells.append(text.replace("\\no interval", "no interval"))
            table.add_row(summary.stack, *cells, str(summary.n), str(summary.n_unscored))
        console.print(table)
    if len({run.summary.stack for run in runs}) > 1:
        console.print(f"▲ better, ▼ worse, ○ not different from {baseline}: permutation test by user, Holm-corrected.")
