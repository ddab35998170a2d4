"""One file per benchmark: its samples and one coroutine. A benchmark never knows which method it measures."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from persona.data.base import People
from persona.errors import UserError

# Name -> module with a `build(config)`, or `build(config, people)` for those over people. Imported when asked for.
BENCHMARKS = {
    "lamp": "persona.benchmarks.lamp",
    "town": "persona.benchmarks.town",
    "persobench": "persona.benchmarks.persobench",
    "personagym": "persona.benchmarks.personagym",
    "personamem": "persona.benchmarks.personamem",
    "personafeedback": "persona.benchmarks.personafeedback",
    "personaeval": "persona.benchmarks.personaeval",
    "rmtbench": "persona.benchmarks.rmtbench",
    "emobench": "persona.benchmarks.emobench",
    "eq_bench": "persona.benchmarks.eq_bench",
    "tombench": "persona.benchmarks.tombench",
    "big_five_inventory": "persona.benchmarks.big_five_inventory",
    "counselling": "persona.benchmarks.counselling",
    "review_reply": "persona.benchmarks.review_reply",
    "apc": "persona.benchmarks.apc",
    "character": "persona.benchmarks.character",
    "coherence": "persona.benchmarks.coherence",
    "revealed_preferences": "persona.benchmarks.revealed_preferences",
    "role_susceptibility": "persona.benchmarks.role_susceptibility",
    "persona_jailbreak": "persona.benchmarks.persona_jailbreak",
    "drift": "persona.benchmarks.drift",
    "drift_harm": "persona.benchmarks.drift_harm",
    "base_prefills": "persona.benchmarks.base_prefills",
    "town_tasks": "persona.benchmarks.town_tasks",
    "town_traits": "persona.benchmarks.town_traits",
    "lm_eval": "persona.benchmarks.lm_eval",
}
OVER_PEOPLE = ("lamp", "town", "town_traits", "apc", "character", "coherence")
# Left out of benchmark=all: over people of their own kind, with tasks or an axis to be named, or of beginnings that
# no user's message stands before, which many a personalizer needs.
NOT_IN_ALL = ("apc", "character", "coherence", "town_traits", "lm_eval", "drift_harm", "base_prefills")


@dataclass
class BenchmarkConfig:
    """What every benchmark has: at most `limit` samples, replies of at most `max_new_tokens`, a seed for its draws."""

    name: str = MISSING
    limit: int | None = None
    max_new_tokens: int = 32
    seed: int = 0


@dataclass
class PeopleBenchmarkConfig(BenchmarkConfig):
    """Over the people of `data`. `candidates`: of how many others' replies the true one is chosen (0: not asked)."""

    split: str = "dev"
    num_beams: int = 1
    candidates: int = 0


@dataclass
class FileBenchmarkConfig(BenchmarkConfig):
    """Over files of its own: `path` holds the official ones, null takes the small sample that comes with the package.
    `compat: reference` scores as the published code does, its errors included (docs/errata.md)."""

    path: str | None = None
    compat: str | None = None


@dataclass
class AllConfig:
    """Every benchmark there is but NOT_IN_ALL, each with its own defaults; what is set here holds for all of them."""

    name: str = "all"
    limit: int | None = None
    max_new_tokens: int | None = None
    seed: int | None = None


def build(config: BenchmarkConfig, people: People | None = None) -> Any:
    """The benchmark `config.name`, over these people where it is over people (OVER_PEOPLE). Raises UserError with the
    nearest name for an unknown one."""
    if config.name not in BENCHMARKS:
        near = difflib.get_close_matches(config.name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(BENCHMARKS)}"
        raise UserError(f"there is no benchmark {config.name!r}: {hint}")
    module = importlib.import_module(BENCHMARKS[config.name])
    return module.build(config, people) if config.name in OVER_PEOPLE else module.build(config)
