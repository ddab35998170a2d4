"""One file per benchmark: its samples and one coroutine. A benchmark never knows which method it measures."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from persona.data.base import People
from persona.errors import UserError

# Name -> module with a `build(config, people)`. Imported only when asked for.
BENCHMARKS = {"lamp": "persona.benchmarks.lamp", "town": "persona.benchmarks.town"}


@dataclass
class BenchmarkConfig:
    """What to measure on. `candidates`: how many replies of other users the true one is chosen from (0: not asked)."""

    name: str = "town"
    split: str = "dev"
    limit: int | None = None
    max_new_tokens: int = 32
    num_beams: int = 1
    candidates: int = 0
    seed: int = 0


def build(config: BenchmarkConfig, people: People) -> Any:
    """The benchmark `config.name` over these people. Raises UserError with the nearest name for an unknown one."""
    if config.name not in BENCHMARKS:
        near = difflib.get_close_matches(config.name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(BENCHMARKS)}"
        raise UserError(f"there is no benchmark {config.name!r}: {hint}")
    return importlib.import_module(BENCHMARKS[config.name]).build(config, people)
