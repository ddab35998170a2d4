"""Readers of people and tasks. `load(cfg)` reads what `cfg.name` says; `task(name)` looks a task's rules up."""

from __future__ import annotations

from persona.data import biography, constitution, jsonl, lamp, roles, situations, town
from persona.data import lamp_tasks as lamp_tasks  # registers LaMP's tasks
from persona.data.base import DataConfig, People, Task, register, task
from persona.data.biography import BiographyConfig
from persona.data.constitution import ConstitutionConfig
from persona.data.roles import RolesConfig, TownRolesConfig
from persona.data.situations import SituationsConfig
from persona.data.town import TownCharactersConfig, TownConfig, TownSituationsConfig
from persona.errors import UserError

__all__ = [
    "BiographyConfig",
    "ConstitutionConfig",
    "DataConfig",
    "People",
    "RolesConfig",
    "SituationsConfig",
    "Task",
    "TownCharactersConfig",
    "TownConfig",
    "TownRolesConfig",
    "TownSituationsConfig",
    "load",
    "register",
    "task",
]

READERS = {
    "roles": roles.load,
    "town_roles": roles.load_town,
    "lamp": lamp.load,
    "jsonl": jsonl.load,
    "biography": biography.load,
    "constitution": constitution.load,
    "situations": situations.load,
    "town": town.load,
    "town_characters": town.load_characters,
    "town_situations": town.load_situations,
}


Config = (
    BiographyConfig
    | ConstitutionConfig
    | DataConfig
    | RolesConfig
    | SituationsConfig
    | TownCharactersConfig
    | TownConfig
    | TownRolesConfig
    | TownSituationsConfig
)


def load(cfg: Config) -> People:
    """The people that `cfg` names. Raises UserError for an unknown reader or bad input."""
    if cfg.name not in READERS:
        raise UserError(f"data.name is {cfg.name!r}; it should be one of {', '.join(READERS)}")
    return READERS[cfg.name](cfg)  # type: ignore[operator]
