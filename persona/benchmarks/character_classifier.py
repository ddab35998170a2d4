"""Which character speaks? A classifier trained on plain replies, tested under "drop the role" and after a prefill.

    python -m persona.benchmarks.character_classifier --model answerdotai/ModernBERT-base --output outputs/which \\
        sarcasm=outputs/sarcasm/evaluation/character/character humor=outputs/humor/evaluation/character/character …

Each folder holds the replies of one stack on benchmark=character, under one character; a character may have several
stacks. Maiya et al. 2025, arXiv 2511.01689 (reference/open_character_training §3.9 b, c, §5): as published, trained on
the replies of all stacks; unlike there, no question is in training and test. Settings of training are the published
ones. `report.json` and a table say accuracy and macro-F1 of each stack and variant, with intervals over questions.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from persona.benchmarks.character import DEFAULT, PREFILL
from persona.errors import UserError
from persona.evaluation.results import load_run
from persona.evaluation.statistics import Metric, estimate
from persona.files import write_json
from persona.metrics.apc import Classifier
from persona.training.classifier import body, train_classifier
from persona.training.trainer import TrainerConfig

log = logging.getLogger(__name__)

SUFFIXES = "all ways to drop the role"


@dataclass(frozen=True)
class Reply:
    """One stored reply: under which character and stack, to which question in which variant."""

    character: str
    stack: str
    variant: str
    question: str
    text: str


def read_replies(places: Sequence[tuple[str, Path | str]]) -> list[Reply]:
    """The replies of (character, results folder) pairs. Rows without a reply (an endpoint failed) are left out, and
    counted in the log.

    Raises UserError for a folder of another benchmark, and for a stack that lacks one of the characters: macro-F1 is
    over all of them.
    """
    found, empty = [], 0
    for character, place in places:
        run = load_run(place)
        if run.summary.benchmark != "character":
            raise UserError(f"{run.folder} holds results of {run.summary.benchmark}, where character should be")
        for row in run.rows:
            if not row.raw.strip():
                empty += 1
                continue
            found.append(Reply(character, run.summary.stack, row.groups["variant"], row.cluster, row.raw))
    if empty:
        log.warning("%d rows without a reply are left out", empty)
    characters = sorted({character for character, _ in places})
    for stack in sorted({reply.stack for reply in found}):
        there = {reply.character for reply in found if reply.stack == stack}
        if lacking := [character for character in characters if character not in there]:
            raise UserError(f"stack {stack} has no replies as {', '.join(lacking)}: every stack needs every character")
    return found


def in_training(question: str, seed: int) -> bool:
    """Whether a question is one of training's: about half of them, drawn by the question alone."""
    return hashlib.sha256(f"{seed}-{question}".encode()).digest()[0] % 2 == 0


def divide(replies: Sequence[Reply], seed: int, compat: str | None = None) -> tuple[list[Reply], list[Reply]]:
    """(train, test): plain replies to one half of the questions, all replies to the other half.

    compat="reference": both to all questions, so that the test's plain replies are the training's (as published).
    Raises UserError when a half is empty.
    """
    if compat == "reference":
        train, test = list(replies), list(replies)
    else:
        train = [reply for reply in replies if in_training(reply.question, seed)]
        test = [reply for reply in replies if not in_training(reply.question, seed)]
    train = [reply for reply in train if reply.variant == DEFAULT]
    if not train or not test:
        raise UserError(
            f"{len(replies)} replies leave {len(train)} for training and {len(test)} for the test: too few"
        )
    return train, test


def measure(test: Sequence[Reply], told: Sequence[str], characters: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Stack → variant → accuracy and macro-F1 over `characters` with 95 % intervals over questions, as plain values.

    Beside the variants: all suffixes pooled, and `mean` over them, as published (no interval: its spread would be
    that of wordings).
    """
    place = {character: number for number, character in enumerate(characters)}
    metrics = {
        "accuracy": Metric(),
        "macro_f1": Metric(aggregate="macro_f1", columns=("truth", "told"), classes=len(characters)),
    }
    values = [
        {
            "accuracy": float(reply.character == said),
            "truth": float(place[reply.character]),
            "told": float(place[said]),
        }
        for reply, said in zip(test, told, strict=True)
    ]

    def numbers(rows: Sequence[int]) -> dict[str, Any]:
        clusters = [test[i].question for i in rows]
        found = {name: estimate([values[i] for i in rows], clusters, name, m) for name, m in metrics.items()}
        shown = {name: [one.value, one.low, one.high] for name, one in found.items() if one is not None}
        return {**shown, "n": len(rows), "questions": len(set(clusters))}

    report: dict[str, dict[str, Any]] = {}
    for stack in sorted({reply.stack for reply in test}):
        own = [i for i, reply in enumerate(test) if reply.stack == stack]
        variants = {
            name: [i for i in own if test[i].variant == name] for name in dict.fromkeys(r.variant for r in test)
        }
        report[stack] = {name: numbers(rows) for name, rows in variants.items() if rows}
        suffixes = [name for name in report[stack] if name not in (DEFAULT, PREFILL)]
        if suffixes:
            pooled = numbers([i for i in own if test[i].variant in suffixes])
            means = {name: fmean(report[stack][variant][name][0] for variant in suffixes) for name in metrics}
            report[stack][SUFFIXES] = {**pooled, "mean": means}
    return report


def classify(
    places: Sequence[tuple[str, Path | str]],
    model: str,
    output: Path,
    trainer: TrainerConfig,
    compat: str | None = None,
) -> dict[str, Any]:
    """Train, test, and write `output/report.json`, which is returned. Raises UserError as the parts do."""
    replies = read_replies(places)
    train, test = divide(replies, trainer.seed, compat)
    body_and_tokenizer = body(model, sorted({reply.character for reply in replies}), trainer.seed, "--model")
    rows = [(reply.text, reply.character) for reply in train]
    folder = train_classifier(*body_and_tokenizer, rows, trainer, output)
    classifier = Classifier(str(folder), "--model", lambda labels, name: list(labels), "{text}")
    chances = classifier([{"text": reply.text} for reply in test])
    told = [max(classifier.classes, key=lambda label: chances[label][i]) for i in range(len(test))]  # noqa: B023
    report = {
        "model": model,
        "characters": list(classifier.classes),
        "compat": compat,
        "seed": trainer.seed,
        "train": {"replies": len(train), "questions": len({reply.question for reply in train})},
        "test": {"replies": len(test), "questions": len({reply.question for reply in test})},
        "stacks": measure(test, told, classifier.classes),
    }
    write_json(output / "report.json", report)
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """A row for each stack and variant."""
    trained, tested = report["train"], report["test"]
    console.print(
        f"{len(report['characters'])} characters; trained on {trained['replies']} plain replies to "
        f"{trained['questions']} questions, tested on {tested['replies']} replies to {tested['questions']}"
    )
    table = Table("stack", "variant", "accuracy", "macro-F1", "n")
    for stack, variants in report["stacks"].items():
        for variant, numbers in variants.items():
            table.add_row(
                stack, variant, *(_shown(numbers[key]) for key in ("accuracy", "macro_f1")), str(numbers["n"])
            )
        table.add_section()
    console.print(table)


def _shown(number: Sequence[float | None]) -> str:
    value, low, high = number
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m persona.benchmarks.character_classifier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("replies", nargs="+", help="character=folder of results on benchmark=character")
    parser.add_argument("--model", required=True, help="the pretrained model to fine-tune: a folder, a name, or town")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compat", choices=["reference"], help="train and test share their questions, as published")
    given = parser.parse_args(arguments)
    trainer = TrainerConfig(
        learning_rate=given.learning_rate, weight_decay=1e-6, warmup_ratio=0.05, scheduler="cosine",
        epochs=given.epochs, batch_size=8, gradient_accumulation=2, seed=given.seed, wandb="disabled", resume=False,
        save_every=1_000_000,
    )  # fmt: skip
    try:
        places = [tuple(entry.split("=", 1)) for entry in given.replies]
        if odd := [entry for entry, place in zip(given.replies, places, strict=True) if len(place) != 2]:
            raise UserError(f"{odd[0]!r} should be character=folder")
        report = classify(places, given.model, given.output, trainer, given.compat)  # type: ignore[arg-type]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print_report(report, console or Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
