"""Results on disk: one folder per (stack, benchmark), and what may be read from several of them together.

<folder>/meta.json      what the run was made of; a folder never mixes two settings
<folder>/samples.jsonl  one `Row` per finished episode
<folder>/summary.json   one `Summary`
<folder>/curves.json    optional `Curve`s of a benchmark, over the turns of conversations
<folder>/plots.json     optional `Plots` from a method (attention over items, user embeddings)
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from persona.errors import UserError
from persona.evaluation.statistics import RESAMPLES, Estimate, Metric, estimate
from persona.files import read_lines, write_json
from persona.types import Message, Sample, Score, Verdict

FORMAT_VERSION = 3
SHOWN_ITEMS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One finished episode, as a line of samples.jsonl. `values` is empty where unscored, and `reason` says why.

    `n_items` is the length of the user's history; `items` its first few texts, for the reader of the report.
    `groups` are the breakdowns the row belongs to, as {"tier": "hard"}; `transcript` the conversation of an episode
    with more turns than its sample, `verdicts` what judges said in it. `failed`: it is unscored as a call to an
    endpoint (the model's, a judge's) got no reply; a run that is started again asks again. `cut`: what prompts lost in
    it as they did not fit a local model's positions, as {role: tokens}.
    """

    id: str
    cluster: str
    task: str
    persona: str
    description: str
    n_items: int
    items: tuple[str, ...]
    messages: tuple[dict[str, str], ...]
    options: tuple[str, ...] | None
    target: str
    raw: str
    values: dict[str, float]
    reason: str
    failed: bool
    groups: dict[str, str]
    verdicts: tuple[Verdict, ...]
    transcript: tuple[dict[str, str], ...]
    cut: dict[str, int]

    @staticmethod
    def of(sample: Sample, cluster: str, score: Score, groups: Mapping[str, str] | None = None) -> Row:
        """The row of a finished episode."""
        persona = sample.persona
        first = [] if persona is None else [persona.history[i] for i in range(min(SHOWN_ITEMS, len(persona.history)))]
        return Row(
            id=sample.id,
            cluster=cluster,
            task=sample.task,
            persona="" if persona is None else persona.id,
            description="" if persona is None else persona.description,
            n_items=0 if persona is None else len(persona.history),
            items=tuple(item.text if item.label is None else f"{item.text} → {item.label}" for item in first),
            messages=_plain(sample.messages),
            options=sample.options,
            target=sample.target,
            raw=score.raw,
            values=dict(score.values),
            reason=score.reason,
            failed=not score.values and (score.failed or any(verdict.failed for verdict in score.verdicts)),
            groups=dict(groups or {}),
            verdicts=score.verdicts,
            transcript=_plain(score.transcript),
            cut=dict(score.cut),
        )

    def line(self) -> bytes:
        """The row as one line of JSON, newline included."""
        return (json.dumps(asdict(self), ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")


def _plain(messages: Sequence[Message]) -> tuple[dict[str, str], ...]:
    return tuple({"role": message.role, "content": message.content} for message in messages)


_ROW_KEYS = {entry.name for entry in fields(Row)}


@dataclass(frozen=True, slots=True)
class Summary:
    """summary.json (summary.schema.json). `metrics[name]` is how a number is formed, `estimates[name]` the number.

    `primary` is the metric that stands for the benchmark in an overview. `cut[role]` counts the `samples` in which a
    prompt of that role did not fit its local model's positions, and the `tokens` lost.
    `settings` is what the fingerprint covers (benchmark, data, base model, personalizers, sampling, seed);
    `environment` is what may differ without making results incomparable (versions, machine, duration in seconds).
    """

    benchmark: str
    benchmark_version: str
    stack: str
    primary: str
    n: int
    n_unscored: int
    unscored_reasons: dict[str, int]
    cut: dict[str, dict[str, int]]
    metrics: dict[str, Metric]
    estimates: dict[str, Estimate]
    settings: dict[str, Any]
    fingerprint: str
    environment: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Attention:
    """How much each of one user's items counted for one query; weights sum to 1."""

    user: str
    query: str
    items: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One user in two dimensions; points of one `group` share a colour, `label` is shown on hovering."""

    x: float
    y: float
    label: str
    group: str


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a method mixes for each query, how alike its parts are (cosines), and what the stack says to the first
    query with each part alone."""

    names: tuple[str, ...]
    queries: tuple[tuple[str, tuple[float, ...]], ...]
    similarity: tuple[tuple[float, ...], ...]
    replies: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Plots:
    """plots.json: what a method wants shown beside its scores."""

    attention: tuple[Attention, ...] = ()
    points: tuple[Point, ...] = ()
    points_title: str = "User embeddings"
    mixture: Mixture | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """A number at every step of something, such as the turns of a conversation (`step`: "turn"), counted from 1."""

    title: str
    step: str
    points: Mapping[int, Estimate]


@dataclass(frozen=True, slots=True)
class Run:
    """A results folder in memory."""

    folder: Path
    summary: Summary
    rows: list[Row]
    plots: Plots
    curves: tuple[Curve, ...] = ()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a finished evaluation would have written it.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error


def read_rows(path: Path) -> list[Row]:
    """All rows of a samples.jsonl; a torn last line (no newline: the writer was killed) is passed over.

    Raises UserError naming file and line for anything else that is not a row.
    """
    rows = []
    for number, entry in enumerate(read_lines(path), start=1):
        if not isinstance(entry, dict) or set(entry) != _ROW_KEYS:
            found = ", ".join(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
            raise UserError(f"{path}, line {number}, has {found} where {', '.join(sorted(_ROW_KEYS))} belong.")
        for key in ("items", "messages", "options", "transcript"):
            entry[key] = None if entry[key] is None else tuple(entry[key])
        entry["verdicts"] = tuple(Verdict(**verdict) for verdict in entry["verdicts"])
        rows.append(Row(**entry))
    return rows


def summarize(
    rows: Sequence[Row],
    *,
    benchmark: str,
    benchmark_version: str,
    stack: str,
    metrics: Mapping[str, Metric],
    settings: Mapping[str, Any],
    fingerprint: str,
    environment: Mapping[str, Any],
    primary: str = "",
    resamples: int = RESAMPLES,
) -> Summary:
    """Counts and estimates over finished rows; unscored rows are counted, and kept out of every metric.

    `primary` is by default the first metric. Raises UserError when it is none of `metrics`.
    """
    primary = primary or next(iter(metrics), "")
    if primary not in metrics:
        known = ", ".join(metrics) or "none"
        raise UserError(f'Benchmark "{benchmark}" has "{primary}" as its primary metric; its metrics are {known}.')
    scored = [row for row in rows if row.values]
    values, clusters = [row.values for row in scored], [row.cluster for row in scored]
    estimates = {key: estimate(values, clusters, key, metric, resamples=resamples) for key, metric in metrics.items()}
    return Summary(
        benchmark=benchmark,
        benchmark_version=benchmark_version,
        stack=stack,
        primary=primary,
        n=len(rows),
        n_unscored=len(rows) - len(scored),
        unscored_reasons=dict(Counter(row.reason for row in rows if not row.values).most_common()),
        cut=_cut(rows),
        metrics=dict(metrics),
        estimates={name: value for name, value in estimates.items() if value is not None},
        settings=dict(settings),
        fingerprint=fingerprint,
        environment=dict(environment),
    )


def _cut(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    lost: dict[str, list[int]] = {}
    for row in rows:
        for role, tokens in row.cut.items():
            lost.setdefault(role, []).append(tokens)
    return {role: {"samples": len(tokens), "tokens": sum(tokens)} for role, tokens in sorted(lost.items())}


def write_summary(folder: Path, summary: Summary) -> Path:
    """Write summary.json and return its path. A value that is not finite is written as null."""
    content = asdict(summary)
    for entry in content["estimates"].values():
        entry["value"] = entry["value"] if math.isfinite(entry["value"]) else None
    write_json(folder / "summary.json", content)
    return folder / "summary.json"


def read_summary(folder: Path | str) -> Summary:
    """The summary of a results folder. Raises UserError when it is missing, broken or of another format version."""
    path = Path(folder) / "summary.json"
    content = _read_json(path)
    wanted = {entry.name for entry in fields(Summary)}
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION or set(content) != wanted:
        raise UserError(f"{path} is not a summary of format version {FORMAT_VERSION}; evaluate again to renew it.")
    content["metrics"] = {
        name: Metric(**(entry | {"columns": tuple(entry["columns"])})) for name, entry in content["metrics"].items()
    }
    content["estimates"] = {
        name: Estimate(**(entry | {"value": math.nan if entry["value"] is None else entry["value"]}))
        for name, entry in content["estimates"].items()
    }
    return Summary(**content)


def write_plots(folder: Path | str, plots: Plots) -> Path:
    """Write plots.json beside a run's other results, for the report."""
    write_json(Path(folder) / "plots.json", asdict(plots))
    return Path(folder) / "plots.json"


def read_plots(folder: Path | str) -> Plots:
    """The folder's plots, or none. Raises UserError when the file is there and not of the form of `Plots`."""
    path = Path(folder) / "plots.json"
    if not path.exists():
        return Plots()
    content = _read_json(path)
    try:
        return Plots(
            attention=tuple(
                Attention(entry["user"], entry["query"], tuple((str(text), float(w)) for text, w in entry["items"]))
                for entry in content["attention"]
            ),
            points=tuple(
                Point(float(entry["x"]), float(entry["y"]), entry["label"], entry["group"])
                for entry in content["points"]
            ),
            points_title=content["points_title"],
            mixture=None if content.get("mixture") is None else _mixture(content["mixture"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has not the form of plots.json: {error!r}.") from error


def _mixture(content: dict[str, Any]) -> Mixture:
    return Mixture(
        tuple(map(str, content["names"])),
        tuple((str(query), tuple(map(float, weights))) for query, weights in content["queries"]),
        tuple(tuple(map(float, row)) for row in content["similarity"]),
        tuple((str(name), str(reply)) for name, reply in content["replies"]),
    )


def write_curves(folder: Path | str, curves: Sequence[Curve]) -> Path:
    """Write curves.json beside a run's other results, for the report; curves without points are left out."""
    content = [
        {"title": c.title, "step": c.step, "points": [{c.step: at, **asdict(point)} for at, point in c.points.items()]}
        for c in curves
        if c.points
    ]
    write_json(Path(folder) / "curves.json", content)
    return Path(folder) / "curves.json"


def read_curves(folder: Path | str) -> tuple[Curve, ...]:
    """The folder's curves, or none. Raises UserError when the file is there and not as `write_curves` writes it."""
    path = Path(folder) / "curves.json"
    if not path.exists():
        return ()
    content = _read_json(path)
    try:
        return tuple(
            Curve(c["title"], c["step"], {int(point.pop(c["step"])): Estimate(**point) for point in c["points"]})
            for c in content
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has not the form of curves.json: {error!r}.") from error


def load_run(folder: Path | str) -> Run:
    """A results folder with its summary, rows and plots. Raises UserError where one of them is missing or broken."""
    folder = Path(folder)
    return Run(
        folder, read_summary(folder), read_rows(folder / "samples.jsonl"), read_plots(folder), read_curves(folder)
    )


def find_runs(places: Sequence[Path | str]) -> list[Run]:
    """All runs in or below the given folders, each once, in the order given, then by path. UserError for none."""
    runs: dict[Path, Run] = {}
    for place in places:
        found = sorted(path.parent for path in Path(place).rglob("summary.json"))
        if not found:
            raise UserError(f"No summary.json in or below {place}; give the folder of a finished evaluation.")
        for folder in found:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = load_run(folder)
    return list(runs.values())
