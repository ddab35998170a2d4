"""Fourth stage: two small classifiers learn the labels, and are measured on statements that they never saw.

Full fine-tuning by cross-entropy (reference/apc.md 3.4), with dropout on and rows shuffled between epochs, as neither
was in the published code (docs/errata.md). The rows they learn from hold far more contradictions than scoring meets,
where a reply meets every statement, and what they say is added up over all of them: so their probabilities are
calibrated on rows in the natural share, which is not published (docs/errata.md).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from scipy.special import log_softmax
from torch import Tensor

from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.evaluation.judges.apc import MEANING
from persona.evaluation.statistics import Metric, estimate
from persona.files import atomic_folder, write_json
from persona.methods.apc.config import DiscriminatorConfig
from persona.methods.apc.labels import DEV, HELD_OUT, TRAIN, split_of
from persona.metrics.apc import (
    NLI_CLASSES,
    NLI_TEMPLATE,
    RELEVANCE_CLASSES,
    RELEVANCE_TEMPLATE,
    TEMPLATE,
    Classifier,
    adds_special,
    chat_template,
    relevance_order,
)
from persona.metrics.nli import NEUTRAL, class_order
from persona.training.classifier import body, train_classifier
from persona.training.trainer import TrainerConfig

# ---- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """One row: what fills the template, its class, the statement it is about, and whose it is."""

    slots: Mapping[str, str]
    label: str
    cluster: str


def relevance_row(row: Mapping[str, str], owner: str) -> Labelled:
    """A row of the published relevance file."""
    slots = {key: row[key] for key in ("character", "statement", "query")}
    return Labelled(slots, row["relevant"], f"{owner}/{row['statement']}")


def nli_row(row: Mapping[str, str], owner: str) -> Labelled:
    """A row of the published NLI file."""
    slots = {"reply": row["response"], **{key: row[key] for key in ("character", "statement", "query")}}
    return Labelled(slots, MEANING[row["label"]], f"{owner}/{row['statement']}")


def split(rows: Sequence[Labelled], config: DiscriminatorConfig, seed: int) -> dict[str, list[Labelled]]:
    """The rows of train, dev and held_out (`labels.split_of`)."""
    found: dict[str, list[Labelled]] = {name: [] for name in (TRAIN, DEV, HELD_OUT)}
    for row in rows:
        found[split_of(row.cluster, config, seed)].append(row)
    return found


def thinned(rows: Sequence[Labelled], neutral: float, seed: int) -> list[Labelled]:
    """At most `neutral` neutral rows for each other row, drawn by the row's own hash; most replies are neutral to most
    statements, and teach little."""
    others = sum(row.label != NEUTRAL for row in rows)
    drawn = sorted(
        (row for row in rows if row.label == NEUTRAL),
        key=lambda row: seed_of(seed, "neutral", row.cluster, sorted(row.slots.items())),
    )
    kept = {id(row) for row in drawn[: round(neutral * others)]}
    return [row for row in rows if row.label != NEUTRAL or id(row) in kept]


def class_weights(labels: Sequence[str], classes: Sequence[str], balanced: bool = True) -> Tensor:
    """[classes]: n / (classes present · n of the class), so that a row weighs 1 on average; 0 for an absent one."""
    counts = Counter(labels)
    if not balanced:
        return torch.ones(len(classes))
    present = sum(counts[label] > 0 for label in classes)
    return torch.tensor([len(labels) / (present * counts[c]) if counts[c] else 0.0 for c in classes])


# ---- training ------------------------------------------------------------------------------------------------------

TASKS: dict[str, dict[str, Any]] = {
    "relevance": {"classes": RELEVANCE_CLASSES, "template": RELEVANCE_TEMPLATE, "order": relevance_order},
    "nli": {"classes": NLI_CLASSES, "template": NLI_TEMPLATE, "order": class_order},
}


def train_discriminator(
    task: str,
    rows: Sequence[Labelled],
    natural: Sequence[Labelled],
    config: DiscriminatorConfig,
    trainer: TrainerConfig,
    work: Path,
    folder: Path,
) -> None:
    """Fine-tune the classifier of `task` ("relevance" or "nli") into `folder`, calibrate it on the dev statements'
    `natural` rows, and measure it on those of held_out statements.

    `folder/report.json` holds per set the rows of each class, accuracy with its interval (statements resampled), macro
    F1, mean loss, the share of the most frequent class; for natural rows also as it was trained. Raises UserError
    unless training rows of two classes are there.
    """
    classes, template = TASKS[task]["classes"], TASKS[task]["template"]
    parts = split(rows, config, trainer.seed)
    if task == "nli" and config.neutral is not None:
        parts[TRAIN] = thinned(parts[TRAIN], config.neutral, trainer.seed)
    seen = Counter(row.label for row in parts[TRAIN])
    if len(seen) < 2:
        told = ", ".join(f"{n} × {label}" for label, n in sorted(seen.items())) or "none"
        raise UserError(f"the {task} discriminator needs training rows of two classes at least, but has {told}")
    weights = class_weights([row.label for row in parts[TRAIN]], classes, config.class_weights)
    # No neighbour has to agree on how a head is drawn: it is this task's own.
    head = seed_of(trainer.seed, "head", task)
    model, tokenizer = body(config.base, classes, head, "method.discriminator.base")
    template = chat_template(tokenizer, template)
    texts = {name: [(template.format(**row.slots), row.label) for row in own] for name, own in parts.items()}
    own = replace(
        trainer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
        gradient_accumulation=1,
        epochs=config.relevance_epochs if task == "relevance" else config.nli_epochs,
        max_steps=-1,
    )
    trained = train_classifier(
        model, tokenizer, texts[TRAIN], own, work, dev=texts[DEV], weights=weights, max_length=config.max_length,
        special=adds_special(tokenizer, template),
    )  # fmt: skip
    if PartialState().is_main_process:
        with atomic_folder(folder) as temporary:
            shutil.copytree(trained, temporary, dirs_exist_ok=True)
            shutil.copyfile(work / "metrics.jsonl", temporary / "metrics.jsonl")
            (temporary / TEMPLATE).write_text(template + "\n", encoding="utf-8")
            apart = split(natural, config, trainer.seed)
            measured = {DEV: parts[DEV], HELD_OUT: parts[HELD_OUT], "natural": apart[HELD_OUT]}
            report: dict[str, Any] = {"task": task, "settings": asdict(config), "train": classes_of(parts[TRAIN])}
            if apart[DEV]:
                report["natural, as trained"] = measure(_classifier(task, temporary), apart[HELD_OUT])
                scale, bias = calibration(*_logits(_classifier(task, temporary), apart[DEV]))
                model.config.calibration = {"scale": scale, "bias": bias}
                model.config.save_pretrained(temporary)
            calibrated = _classifier(task, temporary)
            report |= {name: measure(calibrated, some) for name, some in measured.items()}
            write_json(temporary / "report.json", report)


# ---- calibrating ---------------------------------------------------------------------------------------------------


def calibration(logits: np.ndarray, labels: Sequence[int]) -> tuple[float, list[float]]:
    """(scale, bias [C]): of softmax(scale · logits + bias) that give `labels` of rows [N, C] the highest likelihood.

    Temperature and prior in one (vector scaling with a single scale); log scale and biases have a normal prior of
    standard deviation 3, so that a class without a row stays possible.
    """
    from scipy.optimize import minimize

    def loss(values: np.ndarray) -> float:
        known = log_softmax(np.exp(values[0]) * logits + values[1:], axis=-1)[np.arange(len(labels)), labels]
        return float((values**2).sum() / 18 - known.sum())

    found = minimize(loss, np.zeros(1 + logits.shape[1])).x
    return float(np.exp(found[0])), [float(value) for value in found[1:]]


def _classifier(task: str, folder: Path) -> Classifier:
    return Classifier(str(folder), task, TASKS[task]["order"], TASKS[task]["template"])


def _logits(classifier: Classifier, rows: Sequence[Labelled]) -> tuple[np.ndarray, list[int]]:
    """Of each row log-probabilities [C], which are logits, and the number of its class."""
    found = classifier([dict(row.slots) for row in rows])
    probabilities = np.stack([found[label] for label in classifier.classes], axis=-1)
    return np.log(probabilities.clip(1e-30)), [classifier.classes.index(row.label) for row in rows]


# ---- measuring -----------------------------------------------------------------------------------------------------


def classes_of(rows: Sequence[Labelled]) -> dict[str, Any]:
    return {"rows": len(rows), "classes": dict(sorted(Counter(row.label for row in rows).items()))}


def measure(classifier: Classifier, rows: Sequence[Labelled]) -> dict[str, Any]:
    """What the classifier gets right of the rows, and its mean loss (nats)."""
    from sklearn.metrics import f1_score

    report = classes_of(rows)
    if not rows:
        return report
    logits, labels = _logits(classifier, rows)
    told = logits.argmax(-1)
    right = [{"accuracy": float(one == other)} for one, other in zip(told, labels, strict=True)]
    accuracy = estimate(right, [row.cluster for row in rows], "accuracy", Metric(description="right"))
    assert accuracy is not None
    return report | {
        "statements": accuracy.n_clusters,
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "macro_f1": float(f1_score(labels, told, average="macro")),
        "most_frequent": max(report["classes"].values()) / len(rows),
        "loss": float(-logits[np.arange(len(rows)), labels].mean()),
    }
