"""The samples that can be read in the report: which ones, and how much of each, so that the page stays small."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from persona.evaluation.report import charts
from persona.evaluation.results import Row, Run
from persona.evaluation.statistics import Metric
from persona.types import Verdict

BYTES = 3_000_000  # of all samples in a page
_UNSCORED = 20  # per run, beside the drawn ones
_TEXT, _RAW, _CONVERSATION = 6000, 2000, 16_000  # characters of one text, of a judge's reply, of a whole conversation


def book(runs: Sequence[Run], browse: int, budget: int) -> dict[str, Any]:
    """The chosen samples of one benchmark, each with what every stack made of it, within `budget` bytes of JSON.

    Chosen are `browse` samples by a fixed draw that depends on their ids only, and of every run up to 20 unscored
    ones. "drawn" says how many of the drawn ones fitted, "unscored" how many in the book some stack left unscored, and
    "of_unscored" how many there are.
    """
    by_id = [{row.id: row for row in run.rows} for run in runs]
    order = {key: place for place, key in enumerate(dict.fromkeys(row.id for run in runs for row in run.rows))}
    unscored = {row.id for run in runs for row in run.rows if not row.values}
    worst = _worst(runs)
    drawn, left, size = 0, 0, 0
    chosen: list[tuple[int, dict[str, Any]]] = []
    for key, by_draw in _choose(runs, list(order), browse):
        sample = _sample(key, runs, by_id, worst)
        length = len(json.dumps(sample, ensure_ascii=False).encode(errors="replace"))
        if chosen and size + length > budget:
            continue
        size += length
        drawn, left = drawn + by_draw, left + (key in unscored)
        chosen.append((order[key], sample))
    chosen.sort(key=lambda entry: entry[0])
    primary = runs[0].summary.primary
    return {
        "benchmark": runs[0].summary.benchmark,
        "total": len(order),
        "drawn": drawn,
        "unscored": left,
        "of_unscored": len(unscored),
        "primary": primary,
        "wrong": "wrong" if worst is None else "in the worst quarter",
        "samples": [sample for _, sample in chosen],
    }


def _choose(runs: Sequence[Run], ids: Sequence[str], browse: int) -> list[tuple[str, bool]]:
    """Ids with whether they were drawn: two drawn ones, then an unscored one, so that a small budget has both."""
    drawn = sorted(ids, key=_draw)[:browse]
    rest: dict[str, None] = {}
    for run in runs:
        missing = sorted((row.id for row in run.rows if not row.values), key=_draw)[:_UNSCORED]
        rest |= dict.fromkeys(key for key in missing if key not in set(drawn))
    result: list[tuple[str, bool]] = []
    others = iter(rest)
    for place, key in enumerate(drawn):
        result.append((key, True))
        if place % 2 and (other := next(others, None)) is not None:
            result.append((other, False))
    return result + [(key, False) for key in others]


def _draw(key: str) -> str:
    return hashlib.sha256(f"0-{key}".encode(errors="replace")).hexdigest()


def row_value(row: Row, name: str, metric: Metric) -> float | None:
    """What one row adds to a metric, higher being better or not as in the metric; None where it has no such thing."""
    columns = [row.values.get(column) for column in metric.reads(name)]
    numbers = [value for value in columns if value is not None]
    if len(numbers) < len(columns):
        return None
    if metric.aggregate == "macro_f1":
        return float(numbers[0] == numbers[1])
    if metric.aggregate in ("rmse", "ece"):
        return abs(numbers[0] - numbers[1])
    if metric.aggregate == "ratio":
        return numbers[0] / numbers[1] if numbers[1] else None
    if metric.aggregate == "group_mean":
        return numbers[0]  # the other column is the group
    return numbers[0] if len(numbers) == 1 else None


def _worst(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Where the worst quarter of all replies begins in the primary metric, and the best value there is; None where it
    only knows right and wrong."""
    name, metric = runs[0].summary.primary, runs[0].summary.metrics[runs[0].summary.primary]
    values = [value for run in runs for row in run.rows if (value := row_value(row, name, metric)) is not None]
    if set(values) <= {0.0, 1.0}:
        return None
    better = max if metric.higher_is_better else min
    return float(np.quantile(values, 0.25 if metric.higher_is_better else 0.75)), better(values)


def _outcome(row: Row, name: str, metric: Metric, worst: tuple[float, float] | None) -> str:
    if not row.values:
        return "unscored"
    value = row_value(row, name, metric)
    if value is None:
        return "scored"
    if worst is None:
        return "scored" if (value == 1.0) == metric.higher_is_better else "wrong"
    quarter, best = worst
    bad = value <= quarter if metric.higher_is_better else value >= quarter
    return "wrong" if bad and value != best else "scored"


def _sample(
    key: str, runs: Sequence[Run], by_id: Sequence[dict[str, Row]], worst: tuple[float, float] | None
) -> dict[str, Any]:
    row = next(rows[key] for rows in by_id if key in rows)
    summary = runs[0].summary
    name, metric = summary.primary, summary.metrics[summary.primary]
    return {
        "id": row.id,
        "task": row.task,
        "groups": row.groups,
        "persona": row.persona,
        "description": cut(row.description),
        "n_items": row.n_items,
        "items": [cut(item, _RAW) for item in row.items],
        "messages": conversation(row.messages),
        "options": None if row.options is None else [cut(option, _RAW) for option in row.options],
        "target": cut(row.target),
        "replies": [
            {
                "stack": run.summary.stack,
                "raw": cut(rows[key].raw),
                "chosen": _chosen(rows[key]),
                "reason": rows[key].reason,
                "cut": rows[key].cut,
                "outcome": _outcome(rows[key], name, metric, worst),
                "values": {column: plain(value) for column, value in rows[key].values.items()},
                "transcript": conversation(rows[key].transcript),
                "verdicts": [_verdict(verdict) for verdict in rows[key].verdicts],
            }
            for run, rows in zip(runs, by_id, strict=True)
            if key in rows
        ],
    }


def _verdict(verdict: Verdict) -> dict[str, str]:
    value = verdict.value
    shown = "" if value is None else value if isinstance(value, str) else plain(value)
    return {
        "judge": verdict.judge,
        "rubric": verdict.rubric,
        "value": shown,
        "reason": verdict.reason,
        "raw": cut(verdict.raw, _RAW),
    }


def _chosen(row: Row) -> int | None:
    """The option that the reply is, word for word; None for any other reply."""
    said = row.raw.strip().casefold()
    places = [i for i, option in enumerate(row.options or ()) if option.strip().casefold() == said]
    return places[0] if len(places) == 1 else None


def cut(text: str, longest: int = _TEXT) -> str:
    """A text of at most `longest` characters: of a longer one the beginning and, as the question may be there, the
    end."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end]}\n[… {len(text) - longest:,} characters left out …]\n{text[-end:]}"


def conversation(messages: Sequence[dict[str, str]]) -> list[list[str]]:
    """[role, content] of each message; of a long conversation the first message and as many of the last as fit."""
    shown = [[message["role"], cut(message["content"])] for message in messages]
    if sum(len(text) for _, text in shown) <= _CONVERSATION:
        return shown
    last: list[list[str]] = []
    left = _CONVERSATION - len(shown[0][1])
    for entry in reversed(shown[1:]):
        left -= len(entry[1])
        if left < 0 and last:
            break
        last.insert(0, entry)
    out = len(shown) - 1 - len(last)
    return [shown[0], *([["", f"[… {out} messages left out …]"]] if out else []), *last]


def plain(value: float) -> str:
    """A number as short as it can be said."""
    return str(int(value)).replace("-", "−") if float(value).is_integer() else charts.number(value)


def books(benchmarks: Iterable[Sequence[Run]], browse: int, budget: int = BYTES) -> list[dict[str, Any]]:
    """A book per benchmark, which share `budget` evenly."""
    shelves = list(benchmarks)
    return [book(runs, browse, budget // max(1, len(shelves))) for runs in shelves]
