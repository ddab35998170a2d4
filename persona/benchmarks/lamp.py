"""LaMP's scores and the leaderboard's file format (reference/lamp.md §4, §5).

By default the official scorer's definitions, with the plain mean for ROUGE. `compat` reproduces published code:
"lamp_reference" LaMP's own scorer, "pplug_reference" the scorer inside Persona-Plug's trainer (docs/errata.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson

from persona import metrics
from persona.data import base
from persona.data.base import People, Task
from persona.data.lamp import read_outputs
from persona.data.rows import first_few
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.results import Row
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.files import atomic_write, inside
from persona.types import Request, Sample, Sampling, Score

if TYPE_CHECKING:
    from persona.benchmarks import PeopleBenchmarkConfig

COMPAT = (None, "lamp_reference", "pplug_reference")


def _ends(task: Task) -> tuple[float, float]:
    """Lowest and highest rating of a rating task's scale."""
    return float(task.labels[0]), float(task.labels[-1])


def _number(text: str) -> float | None:
    try:
        return float(text.strip())
    except ValueError:
        return None


def worst_rating(gold: float, low: float, high: float) -> float:
    """The end of the scale that is farther from `gold`; the upper one when both are equally far."""
    return low if abs(low - gold) > abs(high - gold) else high


def rating(task: Task, prediction: str, gold: float, compat: str | None = None) -> float:
    """A rating read out of a prediction. A finite number is taken as it is, also one outside the scale.

    Anything else is the worst value there is (`worst_rating`), also "nan" and "inf", which LaMP's own scorer lets
    through (compat="lamp_reference"). compat="pplug_reference": the first digit in the text, else 1.
    """
    number = _number(prediction)
    if number is not None and (math.isfinite(number) or compat is not None):
        return number
    if compat == "pplug_reference":
        return next((float(char) for char in prediction if char in "0123456789"), 1.0)
    return worst_rating(gold, *_ends(task))


def invalid_answer(task: Task, prediction: str) -> bool:
    """Whether a prediction is no answer at all: not a label of a classification, not a finite number for a rating.

    Such answers count as wrong in `score`; reports should say how many there are. A text is never invalid.
    """
    if task.kind == "classification":
        return prediction.strip() not in task.labels
    number = _number(prediction)
    return task.kind == "rating" and (number is None or not math.isfinite(number))


def _gold_rating(task: Task, id: str, gold: str) -> float:
    number = _number(gold)
    if number is None or not math.isfinite(number):
        raise UserError(f"the gold of {id} in {task.name} is {gold!r}, which should be a number")
    return number


def _gold_label(task: Task, id: str, gold: str) -> str:
    if gold.strip() not in task.labels:
        raise UserError(
            f"the gold of {id} in {task.name} is {gold!r}, which should be one of {', '.join(task.labels)}"
        )
    return gold.strip()


def sample_values(task: Task, id: str, prediction: str, gold: str) -> dict[str, float]:
    """What one sample contributes, for paired intervals: accuracy; or absolute_error and squared_error; or ROUGE.

    The mean of accuracy, absolute_error, rouge1 or rougeL over samples is the score of that name (mae for
    absolute_error), rmse the root of the mean of squared_error. Raises UserError for a gold outside the task.
    """
    if task.kind == "classification":
        return {"accuracy": float(prediction.strip() == _gold_label(task, id, gold))}
    if task.kind == "rating":
        truth = _gold_rating(task, id, gold)
        error = abs(rating(task, prediction, truth) - truth)
        return {"absolute_error": error, "squared_error": error**2}
    return metrics.rouge(prediction, gold)


def _check_ids(task: str, predictions: Mapping[str, str], golds: Mapping[str, str]) -> None:
    missing = [id for id in golds if id not in predictions]
    spare = [id for id in predictions if id not in golds]
    parts = []
    if missing:
        parts.append(f"{len(missing)} golds have no prediction (ids {first_few(missing)})")
    if spare:
        parts.append(f"{len(spare)} predictions have no gold (ids {first_few(spare)})")
    if parts:
        raise UserError(f"predictions and golds of {task} do not have the same ids: {'; '.join(parts)}")
    if not golds:
        raise UserError(f"there is nothing to score for {task}: no golds")


def _score_labels(task: Task, ids: list[str], predictions: list[str], golds: list[str], compat: str | None) -> dict:
    if compat is None:
        golds = [_gold_label(task, id, gold) for id, gold in zip(ids, golds, strict=True)]
    if compat != "pplug_reference":
        predictions, golds = [text.strip() for text in predictions], [text.strip() for text in golds]
    guesses = metrics.label_indices(predictions, task.labels)
    truths = metrics.label_indices(golds, task.labels)
    result = {"accuracy": metrics.accuracy(guesses, truths)}
    if "f1" in task.metrics:
        result["f1"] = metrics.macro_f1(guesses, truths, len(task.labels))
    return result


def score(
    task: str, predictions: Mapping[str, str], golds: Mapping[str, str], compat: str | None = None
) -> dict[str, float]:
    """Scores of `{id: text}` predictions against `{id: text}` golds; the ids must be the same.

    task: "LaMP_1" (the hyphen form will do) or another registered task. Returns accuracy (LaMP_1), accuracy and f1
    (2), mae and rmse (3), rouge1 and rougeL (4, 5, 7). Labels match exactly after strip(); f1 is the mean over the
    full label list; ratings as in `rating`; ROUGE is the plain mean.
    compat: "lamp_reference" takes the bootstrap median for ROUGE (seeded), lets "nan" and "inf" through and counts
    an unknown prediction as right when the gold is unknown too; "pplug_reference" takes the median, does not strip
    labels, and reads ratings its own way. Raises UserError for differing ids, an unknown task, a gold outside it.
    """
    if compat not in COMPAT:
        raise UserError(f"compat {compat!r} is not known for scores; it should be null, {COMPAT[1]} or {COMPAT[2]}")
    rules = base.task(task)
    _check_ids(rules.name, predictions, golds)
    ids = list(golds)
    guesses, truths = [predictions[id] for id in ids], [golds[id] for id in ids]
    if rules.kind == "classification":
        return _score_labels(rules, ids, guesses, truths, compat)
    if rules.kind == "rating":
        numbers = np.array([_gold_rating(rules, id, gold) for id, gold in zip(ids, truths, strict=True)])
        ratings = np.array([rating(rules, text, gold, compat) for text, gold in zip(guesses, numbers, strict=True)])
        return {"mae": metrics.mae(ratings, numbers), "rmse": metrics.rmse(ratings, numbers)}
    pairs = [metrics.rouge(guess, truth) for guess, truth in zip(guesses, truths, strict=True)]
    columns = {name: [pair[name] for pair in pairs] for name in pairs[0]}
    summarize = np.mean if compat is None else metrics.bootstrap_median
    return {name: float(summarize(values)) for name, values in columns.items()}


def write_predictions(path: Path | str, task: str, predictions: Mapping[str, str], ids: Sequence[str]) -> None:
    """Write predictions as the leaderboard reads them: {"task": "LaMP_k", "golds": [{"id", "output"}, ...]}.

    `ids` are those of the questions: every one must have a prediction, and no other; rows come in their order. The
    file appears whole or not at all. Raises UserError.
    """
    name = base.canonical(task)
    _check_ids(name, predictions, dict.fromkeys(ids, ""))
    rows = {"task": name, "golds": [{"id": id, "output": predictions[id]} for id in ids]}
    with atomic_write(path) as temporary:
        temporary.write_bytes(orjson.dumps(rows))


def read_predictions(path: Path | str) -> tuple[str, dict[str, str]]:
    """(task name, {id: text}) of a predictions or outputs file. Raises UserError where it is not in that format."""
    name, outputs = read_outputs(Path(path))
    if name is None:
        raise UserError(f"{path} names no task; it should be {{task: LaMP_k, golds: [{{id, output}}, ...]}}")
    return base.canonical(name), outputs


# ---- the benchmark -------------------------------------------------------------------------------------------------

_METRICS = {
    "accuracy": Metric(description="share of answers that are the true label"),
    "f1": Metric(
        aggregate="macro_f1", columns=("true_label", "label"), description="macro F1 over the full label list"
    ),
    "mae": Metric(higher_is_better=False, description="mean distance from the true rating"),
    "rmse": Metric(
        higher_is_better=False,
        aggregate="rmse",
        columns=("true_rating", "rating"),
        description="root mean square error",
    ),
    "rouge1": Metric(description="ROUGE-1 F, plain mean"),
    "rougeL": Metric(description="ROUGE-L F, plain mean"),
    "logp_per_token": Metric(
        aggregate="ratio",
        columns=("logp", "tokens"),
        description="log p of the true reply per token, end of turn included",
    ),
    "choice": Metric(description="share of samples whose true reply is likelier per byte than other users' replies"),
}


class LaMP(Benchmark):
    """Any people with LaMP-shaped tasks. Texts are generated and scored as LaMP does; for generation tasks the true
    reply's likelihood is read as well and, with `candidates`, the true reply is chosen among other users' replies."""

    name = "lamp"
    version = "1"

    def __init__(self, people: People, config: PeopleBenchmarkConfig):
        self.config, self.tasks = config, people.tasks
        # The town's people also have a task that only the oracle can score.
        measured = (
            sample for sample in people.split(config.split) if _METRICS.keys() & self.tasks[sample.task].metrics
        )
        self._samples = list(islice(measured, config.limit))
        if not self._samples:
            raise UserError(f"the {config.split} split has no sample of a task that LaMP's metrics are for")
        bare = [sample.id for sample in self._samples if not sample.target]
        if bare:
            raise UserError(f"{len(bare)} samples of the {config.split} split have no gold, the first is {bare[0]}")
        names = {name for sample in self._samples for name in self.tasks[sample.task].metrics}
        names |= {"logp_per_token"} if names & {"rouge1"} else set()
        names |= {"choice"} if names & {"rouge1"} and config.candidates else set()
        classes = max((len(task.labels) for task in self.tasks.values()), default=0)
        chosen = {name: metric for name, metric in _METRICS.items() if name in names}
        if "f1" in chosen:
            chosen["f1"] = Metric(True, "macro_f1", _METRICS["f1"].columns, classes, _METRICS["f1"].description)
        self.metrics = chosen
        self._replies: dict[str, set[str]] = {}
        for sample in self._samples:
            self._replies.setdefault(sample.target, set()).add(self.cluster(sample))

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def others(self, sample: Sample) -> tuple[str, ...]:
        """`candidates` distinct true replies of other users, drawn by (seed, sample id)."""
        owner = self.cluster(sample)
        pool = [reply for reply, owners in self._replies.items() if owner not in owners]
        wanted = self.config.candidates
        if len(pool) < wanted:
            raise UserError(f"benchmark.candidates={wanted}, but other users gave only {len(pool)} different replies")
        return tuple(random.Random(f"{self.config.seed}-{sample.id}").sample(pool, wanted))

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        task = self.tasks[sample.task]
        sampling = Sampling(self.config.max_new_tokens, num_beams=self.config.num_beams)
        request = Request(sample.messages, sample.persona, sampling, None, sample.task)
        reply = (await roles.model.respond(request)).text
        values = sample_values(task, sample.id, reply, sample.target)
        if task.kind == "classification":
            true, guess = metrics.label_indices([sample.target.strip(), reply.strip()], task.labels)
            values |= {"true_label": float(true), "label": float(guess)}
        elif task.kind == "rating":
            truth = float(sample.target)
            values = {"mae": values["absolute_error"], "true_rating": truth, "rating": rating(task, reply, truth)}
        elif roles.model.likelihoods:
            logp, tokens = await roles.model.loglikelihood(request, sample.target)
            values |= {"logp": logp, "tokens": float(tokens)}
            if self.config.candidates:
                options = (sample.target, *self.others(sample))
                logps = await roles.model.choose(
                    Request(sample.messages, sample.persona, sampling, options, sample.task)
                )
                per_byte = [p / len(option.encode()) for p, option in zip(logps, options, strict=True)]
                values["choice"] = float(all(per_byte[0] > other for other in per_byte[1:]))  # a tie is not found
        return Score(values, raw=reply)

    def write_artifacts(self, rows: Sequence[Row], folder: Path) -> None:
        """Predictions of every task in the leaderboard's own format."""
        for name in sorted({row.task for row in rows}):
            mine = {row.id: row.raw for row in rows if row.task == name}
            write_predictions(inside(folder, f"predictions_{name}.json"), name, mine, list(mine))


def build(config: PeopleBenchmarkConfig, people: People) -> LaMP:
    return LaMP(people, config)
