"""What the tests of benchmarks share: a model whose every answer is stated, and a run without files to clean up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from persona.evaluation.episodes import Benchmark, run_benchmark
from persona.evaluation.results import Row, Summary, read_rows
from persona.types import Request, Response


class Stated:
    """`reply(request)` is what it says; its log p of a text is -1 per byte for `reply`, -2 for anything else."""

    def __init__(self, reply: Callable[[Request], str]) -> None:
        self.reply = reply

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        return [Response(self.reply(request)) for request in requests]

    def choose(self, requests: Sequence[Request]) -> list[list[float]]:
        return [[self._logp(request, option) for option in request.options or ()] for request in requests]

    def loglikelihood(self, requests: Sequence[Request], targets: Sequence[str]) -> list[tuple[float, int]]:
        return [
            (self._logp(request, target), len(target.split()) + 1)
            for request, target in zip(requests, targets, strict=True)
        ]

    def _logp(self, request: Request, text: str) -> float:
        return -(1.0 if text == self.reply(request) else 2.0) * len(text.encode())


def run(benchmark: Benchmark, model, folder: Path) -> tuple[Summary, list[Row]]:
    summary = run_benchmark(benchmark, model, folder, stack="toy", settings={}, batch_size=4, progress=False)
    return summary, read_rows(folder / "samples.jsonl")


def values(summary: Summary) -> dict[str, float]:
    return {name: estimate.value for name, estimate in summary.estimates.items()}
