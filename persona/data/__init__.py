"""Readers of people and tasks. `load(cfg)` reads what `cfg.name` says; `task(name)` looks a task's rules up."""

from __future__ import annotations

from persona.data import biography, constitution, jsonl, lamp, town
from persona.data import lamp_tasks as lamp_tasks  # registers LaMP's tasks
from persona.data.base import DataConfig, People, Task, register, task
from persona.data.biography import BiographyConfig
from persona.data.constitution import ConstitutionConfig
from persona.data.town import TownCharactersConfig, TownConfig
from persona.errors import UserError

__all__ = [
    "BiographyConfig",
    "ConstitutionConfig",
    "DataConfig",
    "People",
    "Task",
    "TownCharactersConfig",
    "TownConfig",
    "load",
    "register",
    "task",
]

READERS = {
    "lamp": lamp.load,
    "jsonl": jsonl.load,
    "biography": biography.load,
    "constitution": constitution.load,
    "town": town.load,
    "town_characters": town.load_characters,
}


def load(cfg: DataConfig | BiographyConfig | ConstitutionConfig | TownConfig | TownCharactersConfig) -> People:
    """The people that `cfg` names. Raises UserError for an unknown reader or bad input."""
    if cfg.name not in READERS:
        raise UserError(f"data.name is {cfg.name!r}; it should be one of {', '.join(READERS)}")
    return READERS[cfg.name](cfg)  # type: ignore[operator]
