"""Fourth stage: two small classifiers learn the labels, and are measured on statements that they never saw.

Full fine-tuning by cross-entropy (reference/apc.md 3.4), with dropout on and rows shuffled between epochs, as neither
was in the published code (docs/errata.md).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.evaluation.judges.apc import MEANING
from persona.evaluation.statistics import Metric, estimate
from persona.files import atomic_folder, write_json
from persona.methods.apc.config import DiscriminatorConfig
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

SPLITS = ("train", "dev", "held_out")


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
    """train; dev: held-out rows of the same statements; held_out: rows of statements that train never has.

    By the hash of the statement, then of the row, so that a row's split does not depend on the others.
    """
    found: dict[str, list[Labelled]] = {name: [] for name in SPLITS}
    for row in rows:
        if seed_of(seed, "held out", row.cluster) / 2**31 < config.held_out:
            found["held_out"].append(row)
        elif seed_of(seed, "dev", row.cluster, sorted(row.slots.items())) / 2**31 < config.dev:
            found["dev"].append(row)
        else:
            found["train"].append(row)
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
    task: str, rows: Sequence[Labelled], config: DiscriminatorConfig, trainer: TrainerConfig, work: Path, folder: Path
) -> None:
    """Fine-tune the classifier of `task` ("relevance" or "nli") into `folder`, and measure it.

    `folder/report.json` holds per split the rows of each class, accuracy with its interval (statements resampled),
    macro F1 and the share of the most frequent class. Raises UserError unless rows of two classes are there.
    """
    classes, template = TASKS[task]["classes"], TASKS[task]["template"]
    parts = split(rows, config, trainer.seed)
    if task == "nli" and config.neutral is not None:
        parts["train"] = thinned(parts["train"], config.neutral, trainer.seed)
    seen = Counter(row.label for row in parts["train"])
    if len(seen) < 2:
        told = ", ".join(f"{n} × {label}" for label, n in sorted(seen.items())) or "none"
        raise UserError(f"the {task} discriminator needs training rows of two classes at least, but has {told}")
    weights = class_weights([row.label for row in parts["train"]], classes, config.class_weights)
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
        model, tokenizer, texts["train"], own, work, dev=texts["dev"], weights=weights, max_length=config.max_length,
        special=adds_special(tokenizer, template),
    )  # fmt: skip
    if PartialState().is_main_process:
        with atomic_folder(folder) as temporary:
            shutil.copytree(trained, temporary, dirs_exist_ok=True)
            (temporary / TEMPLATE).write_text(template + "\n", encoding="utf-8")
            write_json(temporary / "report.json", measure(task, str(temporary), parts, config))


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(
    task: str, folder: str, parts: Mapping[str, Sequence[Labelled]], config: DiscriminatorConfig
) -> dict[str, Any]:
    """What the classifier in `folder` gets right on each split."""
    from sklearn.metrics import f1_score

    classifier = Classifier(folder, task, TASKS[task]["order"], TASKS[task]["template"])
    report: dict[str, Any] = {"task": task, "settings": asdict(config)}
    for name in SPLITS:
        rows = parts[name]
        classes = Counter(row.label for row in rows)
        report[name] = {"rows": len(rows), "classes": dict(sorted(classes.items()))}
        if not rows or name == "train":
            continue
        found = classifier([dict(row.slots) for row in rows])
        told = [max(found, key=lambda label: found[label][i]) for i in range(len(rows))]  # noqa: B023
        right = [{"accuracy": float(label == row.label)} for label, row in zip(told, rows, strict=True)]
        accuracy = estimate(right, [row.cluster for row in rows], "accuracy", Metric(description="right"))
        assert accuracy is not None
        report[name] |= {
            "statements": accuracy.n_clusters,
            "accuracy": accuracy.value,
            "low": accuracy.low,
            "high": accuracy.high,
            "macro_f1": float(f1_score([row.label for row in rows], told, average="macro")),
            "most_frequent": max(classes.values()) / len(rows),
        }
    return report
