"""One self-contained HTML page over any number of runs: offline, light and dark, wide and narrow."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from persona.errors import UserError
from persona.evaluation.comparison import compare, default_baseline, flatten, is_trivial, tell_apart
from persona.evaluation.report import browser, charts
from persona.evaluation.report.sections import BenchmarkPart, Cell, benchmark_part, in_order, metric_cells
from persona.evaluation.results import Attention, Point, Run, find_runs
from persona.files import atomic_write

_SHOWN_ITEMS = 12  # of an attention chart
_SHOWN_GROUPS = charts.COLOURS * len(charts.SHAPES)
OTHER = "other"


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
    page. `browse` is how many samples of each benchmark are drawn to be read in the page; unscored ones are added, and
    of very long ones there are fewer, as the page says. Raises UserError when there is no run, no such baseline, or
    when runs of one benchmark are not comparable.
    """
    runs = tell_apart(find_runs(folders))
    baseline = default_baseline(runs) if baseline is None else baseline
    comparisons = {(c.benchmark, c.metric, c.stack): c for c in compare(runs, baseline)}
    stacks = sorted(dict.fromkeys(run.summary.stack for run in runs), key=is_trivial)
    trivial = [stack for stack in stacks if is_trivial(stack)]
    looks = charts.looks(stacks, baseline, trivial)
    names = dict.fromkeys(run.summary.benchmark for run in runs)
    runs.sort(key=lambda run: stacks.index(run.summary.stack))
    shelves = [[run for run in runs if run.summary.benchmark == name] for name in names]
    benchmarks = [benchmark_part(shelf, comparisons, looks, baseline) for shelf in shelves]
    text = _environment().get_template("report.html.jinja").render(
        title=title,
        baseline=baseline,
        stacks=stacks,
        trivial=trivial,
        keys={stack: charts.key(look) for stack, look in looks.items()},
        benchmarks=benchmarks,
        cells=_overview(benchmarks, stacks, comparisons),
        cost=sum(counted.get("cost", 0) for part in benchmarks for *_, counted in part.usage),
        n_comparisons=len(comparisons),
        attention=[(run, [_attention(entry) for entry in run.plots.attention]) for run in runs if run.plots.attention],
        embeddings=[(run, *_embeddings(run)) for run in runs if run.plots.points],
        mixtures=[(run, run.plots.mixture) for run in runs if run.plots.mixture],
        browser=browser.books(shelves, browse),
        metadata=[(run, *(list(flatten(x).items()) for x in (run.summary.settings, run.summary.environment)))
                  for run in runs],
        style=_asset("report.css"),
        script=_asset("report.js"),
    )  # fmt: skip
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return Path(path)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("persona.evaluation.report"), autoescape=select_autoescape(default=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        name=_breakable,
        number=charts.number,
        signed=charts.signed,
        bounds=charts.bounds,
        p=_p_value,
        plain=browser.plain,
        zip=zip,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment


def _asset(name: str) -> Markup:
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _overview(benchmarks: Sequence[BenchmarkPart], stacks: Sequence[str], comparisons: Any) -> dict[str, list[Cell]]:
    """Per stack a cell per benchmark, of its primary metric; a cell with n = 0 where the stack was not run."""
    result: dict[str, list[Cell]] = {stack: [] for stack in stacks}
    for part in benchmarks:
        summary = part.runs[0].summary
        cells = metric_cells(summary.primary, summary.metrics[summary.primary], part.runs, comparisons)
        by_stack = {run.summary.stack: cell for run, cell in zip(part.runs, cells, strict=True)}
        for stack in stacks:
            result[stack].append(by_stack.get(stack, Cell(None)))
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
    names = in_order(kept)
    points: list[Point] = [
        point if point.group in kept else replace(point, group=OTHER, label=f"{point.label} ({point.group})")
        for point in run.plots.points
    ]
    groups = charts.looks(names) | ({OTHER: charts.Look("base", "circle")} if len(counts) > len(kept) else {})
    said = f"{run.plots.points_title}: {len(points)} users of {run.summary.stack} in two dimensions"
    totals = Counter(point.group for point in points)
    return charts.scatter(points, groups, said), [(g, charts.key(look), totals[g]) for g, look in groups.items()]


def _breakable(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def _p_value(value: float, name: str = "p") -> str:
    if value < 0.001:
        return f"{name} < 0.001"
    return f"{name} = {value:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m persona.evaluation.report outputs/a outputs/b --output report.html`."""
    parser = argparse.ArgumentParser(prog="python -m persona.evaluation.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of results, or trees of them")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--baseline", help="the stack to compare with (default: the first run's)")
    given = parser.parse_args(arguments)
    try:
        print(write_report(given.folders, given.output, baseline=given.baseline))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
