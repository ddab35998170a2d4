"""Runs against each other: paired differences on shared samples, corrected over everything compared together."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from persona.errors import UserError
from persona.evaluation.results import Row, Run
from persona.evaluation.statistics import RESAMPLES, Difference, Metric, difference, holm

TRIVIAL = ("constant answer", "random answer")  # stacks that read nothing: what every score has to be read against
_SAME = ("benchmark_version", "data", "prompts")  # settings without which two numbers do not measure the same thing


@dataclass(frozen=True, slots=True)
class Comparison:
    """One stack against the baseline on one metric. `p_holm` is corrected over all comparisons made together.

    `better` is True or False when p_holm < 0.05, and None when the data do not tell.
    """

    benchmark: str
    metric: str
    stack: str
    baseline: str
    difference: Difference
    p_holm: float
    better: bool | None


def is_trivial(stack: str) -> bool:
    """Whether the stack answers without reading; "constant answer (somewhere)" does as well."""
    return stack.split(" (")[0] in TRIVIAL


def default_baseline(runs: Sequence[Run]) -> str:
    """The first run's stack that is no trivial answer, if there is one."""
    stacks = [run.summary.stack for run in runs]
    return next((stack for stack in stacks if not is_trivial(stack)), stacks[0])


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with stacks that occur twice on one benchmark renamed after the output folders they are in."""
    counts = Counter((run.summary.benchmark, run.summary.stack) for run in runs)
    double = {stack for (_, stack), n in counts.items() if n > 1}
    taken: set[tuple[str, str]] = set()
    result = []
    for run in runs:
        stack = run.summary.stack
        if stack in double:
            above = run.folder.resolve().parts
            # outputs/<name>/evaluation/...: the name tells two trainings of one method apart.
            named = above[above.index("evaluation") - 1] if "evaluation" in above[1:] else str(run.folder)
            stack = f"{stack} ({named})"
            if (run.summary.benchmark, stack) in taken:
                stack = f"{run.summary.stack} ({run.folder})"
        taken.add((run.summary.benchmark, stack))
        result.append(replace(run, summary=replace(run.summary, stack=stack)))
    return result


def compare(runs: Sequence[Run], baseline: str, *, resamples: int = RESAMPLES) -> list[Comparison]:
    """Every run against the run of stack `baseline` on the same benchmark, over the samples both have scored.

    On a benchmark that the baseline was not run on, nothing is compared. Holm's correction is over all that is
    returned. Raises UserError when no run has that stack, or when two runs of one benchmark do not measure the same.
    """
    if all(run.summary.stack != baseline for run in runs):
        known = ", ".join(sorted({run.summary.stack for run in runs}))
        raise UserError(f'No run has the stack "{baseline}"; the stacks given are {known}.')
    first: dict[str, Run] = {}
    against: dict[str, Run] = {}
    for run in runs:
        check_same(first.setdefault(run.summary.benchmark, run), run)
        if run.summary.stack == baseline:
            against.setdefault(run.summary.benchmark, run)
    pairs = [
        (run, against[run.summary.benchmark])
        for run in runs
        if run.summary.stack != baseline and run.summary.benchmark in against
    ]
    return compare_pairs(pairs, resamples=resamples)


def compare_pairs(pairs: Sequence[tuple[Run, Run]], *, resamples: int = RESAMPLES) -> list[Comparison]:
    """First minus second of each pair on every metric they share, Holm-corrected over all of them. Raises as
    `difference_of`."""
    found = []
    for run, other in pairs:
        for name, metric in run.summary.metrics.items():
            if name in other.summary.metrics:
                difference = difference_of(run, other, name, metric, resamples=resamples)
                if difference is not None:
                    found.append((run, other, name, metric, difference))
    corrected = holm([difference.p for *_, difference in found])
    result = []
    for (run, other, name, metric, difference), p_holm in zip(found, corrected, strict=True):
        better = None if p_holm >= 0.05 else (difference.value > 0) == metric.higher_is_better
        mine, theirs = run.summary, other.summary
        result.append(Comparison(mine.benchmark, name, mine.stack, theirs.stack, difference, p_holm, better))
    return result


def check_same(run: Run, other: Run) -> None:
    """Raise UserError unless both runs are of the same benchmark, version, data and prompts."""
    if run.summary.benchmark != other.summary.benchmark:
        names = f"{run.folder} is of benchmark {run.summary.benchmark} and {other.folder} of {other.summary.benchmark}"
        raise UserError(f"{names}, so they cannot be compared.")
    for key in _SAME:
        mine, theirs = run.summary.settings.get(key), other.summary.settings.get(key)
        if mine != theirs:
            what = f"{key} ({mine} and {theirs})"
            if isinstance(mine, dict) and isinstance(theirs, dict):
                odd = [one for one in {**mine, **theirs} if mine.get(one) != theirs.get(one)]
                what = f"{key} ({', '.join(odd)})"
            raise UserError(f"{run.folder} and {other.folder} differ in {what}, so they cannot be compared.")


def shared_rows(run: Run, other: Run) -> tuple[list[Row], list[Row]]:
    """The rows of the samples that both have scored, side by side in the first run's order."""
    theirs = {row.id: row for row in other.rows if row.values}
    shared = [row for row in run.rows if row.values and row.id in theirs]
    return shared, [theirs[row.id] for row in shared]


def difference_of(run: Run, other: Run, name: str, metric: Metric, *, resamples: int = RESAMPLES) -> Difference | None:
    """Paired difference run minus other on one metric; None where they share no scored sample or it is undefined.

    Raises UserError as `check_same`.
    """
    check_same(run, other)
    mine, theirs = shared_rows(run, other)
    values, clusters = [row.values for row in mine], [row.cluster for row in mine]
    found = difference(values, [row.values for row in theirs], clusters, name, metric, resamples=resamples)
    # An undefined number (0 / 0) is smaller than none of its permutations, which would pass for p = 0.
    return found if found is not None and math.isfinite(found.value) else None


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"stack.0.r": "8"}: the path to each plain value, and the value written out."""
    result: dict[str, str] = {}
    for key, entry in value.items():
        inner = dict(enumerate(entry)) if isinstance(entry, list) else entry
        if isinstance(inner, dict) and inner:
            result |= flatten({str(name): one for name, one in inner.items()}, f"{prefix}{key}.")
        else:
            result[prefix + key] = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
    return result


def differing(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Settings in which runs differ, each with its value in every run; None where a run has no such setting."""
    flat = [flatten(run.summary.settings) for run in runs]
    rows = {key: [one.get(key) for one in flat] for key in dict.fromkeys(key for one in flat for key in one)}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}
