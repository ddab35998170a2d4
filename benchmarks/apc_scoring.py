"""APC scoring: (statement, query, reply) triples per second in batches, beside scoring one by one as published.

    python benchmarks/apc_scoring.py --base town --queries 40

Two classifiers with new heads over `--base` (town, minilm, a folder, a hub id) score interviews of the town's
residents. One by one is what the published code does for each query with two replies: 4 |S| relevance and 2 |S| NLI
forwards of one text each (reference/apc.md, defect 8); "shared" is one by one too, but asks for each relevance once.
Both run on fewer queries, in the same process, with the same models; equal probabilities are asserted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from persona import data
from persona.methods.apc.discriminators import TASKS
from persona.metrics.apc import Classifier, Discriminators, Probabilities, Question
from persona.metrics.nli import CONTRADICTION, ENTAILMENT
from persona.training.classifier import body


def questions(count: int, replies: int = 2) -> list[Question]:
    """Interviews of the town's residents; the replies are the true one and those of others."""
    people = data.load(data.TownCharactersConfig(train=20, test=20, questions=-(-count // 20), held_out=2))
    found = []
    for place, sample in enumerate(people.train[:count]):
        others = [people.train[(place + 7 * n) % len(people.train)].target for n in range(replies)]
        persona = sample.persona
        assert persona is not None
        found.append(
            Question(persona.attributes["name"], persona.statements, sample.messages[-1].content, tuple(others))
        )
    return found


def save_models(base: str, folder: Path) -> Discriminators:
    """Discriminators with heads that were never trained: speed does not depend on what they know."""
    for task in TASKS:
        model, tokenizer = body(base, TASKS[task]["classes"], 0, "--base")
        model.save_pretrained(folder / task)
        tokenizer.save_pretrained(folder / task)
    return Discriminators(str(folder / "relevance"), str(folder / "nli"))


def one_by_one(models: Discriminators, question: Question, relevance_passes: int) -> Probabilities:
    """Every text in a forward of its own; the relevance of each statement is computed `relevance_passes` times."""

    def alone(classifier: Classifier, **slots: str) -> dict[str, float]:
        return {label: float(values[0]) for label, values in classifier([slots]).items()}

    common = [{"character": question.character, "statement": s, "query": question.query} for s in question.statements]
    for _ in range(relevance_passes):
        relevance = [alone(models.relevance, **slots)["yes"] for slots in common]
    found = [[alone(models.nli, **slots, reply=reply) for slots in common] for reply in question.replies]
    entailment, contradiction = ([[one[key] for one in row] for row in found] for key in (ENTAILMENT, CONTRADICTION))
    return Probabilities(np.array(relevance), np.array(entailment), np.array(contradiction))


def timed(score: Callable[[Sequence[Question]], list[Probabilities]], asked: Sequence[Question]) -> tuple[float, list]:
    """Triples per second, and the probabilities."""
    began = time.perf_counter()
    found = score(asked)
    triples = sum(len(question.statements) * len(question.replies) for question in asked)
    return triples / (time.perf_counter() - began), found


def measure(base: str, queries: int, slow: int, replies: int = 2) -> dict[str, float]:
    """Triples per second: "published", "shared", "batched", and the speed-up of the last over the first."""
    asked = questions(queries, replies)
    with tempfile.TemporaryDirectory() as folder:
        models = save_models(base, Path(folder))
        models(asked[:1])  # the first call of everything
        rates = {}
        rates["batched"], found = timed(models, asked)
        rates["published"], alone = timed(
            lambda some: [one_by_one(models, q, 2 * replies) for q in some], asked[:slow]
        )
        rates["shared"], _ = timed(lambda some: [one_by_one(models, q, 1) for q in some], asked[:slow])
    for one, other in zip(alone, found, strict=False):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    return {**rates, "speed-up": rates["batched"] / rates["published"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="town")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--slow", type=int, default=4, help="queries that are scored one by one")
    parser.add_argument("--replies", type=int, default=2)
    given = parser.parse_args()
    found = measure(given.base, given.queries, given.slow, given.replies)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{given.base}, {given.replies} replies per query, {device}")
    for name in ("published", "shared", "batched"):
        print(f"{name:>10}: {found[name]:10.1f} triples/s")
    print(f"{'speed-up':>10}: {found['speed-up']:10.1f} ×, batched over published")


if __name__ == "__main__":
    main()
