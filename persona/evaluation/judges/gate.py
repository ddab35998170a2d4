"""The judge gate: has a judge of role play shown, on PersonaEval, that it can tell who is speaking?

The record is PersonaEval's own results folder: measure the judge as a model once (`benchmark=personaeval`), and its
folder is the certificate. Nothing else is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from persona.errors import UserError
from persona.evaluation.results import Row, Summary, load_run
from persona.evaluation.statistics import Metric, estimate

BENCHMARK = "personaeval"
MIN_ROWS = 50  # fewer rows, the sample that comes with the package among them, are no certificate


@dataclass(frozen=True, slots=True)
class Certificate:
    """What one PersonaEval run says of one judge.

    `names` are those the judge is known by: the run's stack, and without personalizers the model's or endpoint's name.
    `top1` with its 95 % interval counts unreadable replies (`unscored` of the `n` rows) as wrong; `chance` is what
    guessing earns on these rows; `low_over_chance` the lower end of the interval of top1 minus chance, None with too
    few speakers for an interval.
    """

    names: tuple[str, ...]
    top1: float
    low: float | None
    high: float | None
    chance: float
    low_over_chance: float | None
    n: int
    unscored: int
    date: date
    folder: Path

    @property
    def passed(self) -> bool:
        """Better than chance beyond doubt (the whole interval), on at least MIN_ROWS rows."""
        return self.n >= MIN_ROWS and self.low_over_chance is not None and self.low_over_chance > 0

    @property
    def finding(self) -> str:
        """Half a sentence."""
        if self.n < MIN_ROWS:
            return f"was measured on {self.n} rows of PersonaEval only, and {MIN_ROWS} are needed"
        interval = "no interval" if self.low is None else f"95 % interval {self.low:.2f} to {self.high:.2f}"
        verb = "passed" if self.passed else "did not pass"
        return f"{verb} PersonaEval on {self.date}: top-1 {self.top1:.2f} ({interval}), chance {self.chance:.2f}"


def certificate(folder: Path | str) -> Certificate:
    """The certificate in a results folder of PersonaEval. Raises UserError where it is broken or of another one."""
    run = load_run(folder)
    if run.summary.benchmark != BENCHMARK or not run.rows:
        raise UserError(f"{folder} holds results of {run.summary.benchmark}, not of {BENCHMARK}")
    setting = run.summary.settings.get("benchmark")
    if isinstance(setting, dict) and setting.get("compat"):  # there, equal probabilities for all can be all right
        raise UserError(f"{folder} was scored under compat={setting['compat']}, which certifies nothing")
    # A reply that cannot be read would be no verdict either, so here it is wrong.
    values = [{"top1": row.values.get("top1", 0.0), "chance": _chance(row)} for row in run.rows]
    values = [entry | {"over": entry["top1"] - entry["chance"]} for entry in values]
    clusters = [row.cluster for row in run.rows]
    top1, over = (estimate(values, clusters, name, Metric()) for name in ("top1", "over"))
    assert top1 is not None and over is not None  # every row has both columns
    return Certificate(
        names=_names(run.summary),
        top1=top1.value,
        low=top1.low,
        high=top1.high,
        chance=top1.value - over.value,
        low_over_chance=over.low,
        n=len(run.rows),
        unscored=run.summary.n_unscored,
        date=date.fromtimestamp((run.folder / "summary.json").stat().st_mtime),
        folder=run.folder,
    )


def _chance(row: Row) -> float:
    return 1 / len(row.options or ("",))


def _names(summary: Summary) -> tuple[str, ...]:
    model, stack = summary.settings.get("model"), summary.settings.get("stack")
    of_model = [model.get(key) for key in ("endpoint", "name")] if isinstance(model, dict) and not stack else []
    return tuple(dict.fromkeys([summary.stack, *(name for name in of_model if name)]))


def certificates(folder: Path | str) -> list[Certificate]:
    """All certificates in and below `folder`, those on more rows first, then the newer ones.

    What cannot be read certifies nothing and is passed over: a warning should not end the evaluation it is about.
    """
    found = []
    for path in sorted(Path(folder).rglob("summary.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("benchmark") == BENCHMARK:
                found.append(certificate(path.parent))
        except (ValueError, OSError):  # UserError is a ValueError
            continue
    return sorted(found, key=lambda one: (one.n, one.date), reverse=True)


def warn_unless_passed(judge_names: Sequence[str], folder: Path | str) -> list[str]:
    """One sentence for each judge without a passed PersonaEval run in or below `folder`; none for those with one.

    A judge with several runs is spoken for by the one on most rows, and of those the newest.
    """
    known = certificates(folder)
    sentences = []
    for name in dict.fromkeys(judge_names):
        mine = next((one for one in known if name in one.names), None)
        if mine is None:
            finding = f"has no readable results of PersonaEval under {folder} (measure it with benchmark={BENCHMARK})"
        elif mine.passed:
            continue
        else:
            finding = mine.finding
        sentences.append(f"The judge {name} {finding}: its verdicts on role play are not to be relied on.")
    return sentences
