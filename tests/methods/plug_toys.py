"""Tiny people and settings: what the tests of Persona-Plug and of the training loop share."""

from __future__ import annotations

from pathlib import Path

from persona.data.base import People
from persona.encoders import EncoderConfig
from persona.methods.persona_plug import PersonaPlugConfig
from persona.training.trainer import TrainerConfig
from persona.types import HistoryItem, Message, Persona, Request, Sample, Sampling

WORDS = "the quick brown fox jumps over lazy dog red house river small boats long walks rain good morning day".split()


def history(who: int, n: int) -> tuple[HistoryItem, ...]:
    """n items of three words that depend on the person and the item."""
    pick = [[WORDS[(5 * who + 3 * i + 7 * k) % len(WORDS)] for k in range(3)] for i in range(n)]
    return tuple(HistoryItem(f"{who}-{i}", " ".join(words)) for i, words in enumerate(pick))


def person(who: int, n: int, description: bool = False) -> Persona:
    return Persona(str(who), f"they like {WORDS[who % len(WORDS)]}" if description else "", history=history(who, n))


def request(text: str, who: Persona | None, task: str = "") -> Request:
    return Request((Message("user", text),), who, Sampling(max_new_tokens=4), task=task)


def toy_people(train: int = 12, dev: int = 4, description: bool = False) -> People:
    """Histories of 0 to 5 items; a person's replies repeat a word of their own, a different number of times."""

    def sample(i: int) -> Sample:
        who = person(i, i % 6, description)
        reply = " ".join([WORDS[i % len(WORDS)]] * (1 + i % 3))
        return Sample(str(i), (Message("user", f"what about the {WORDS[(3 * i) % len(WORDS)]} ?"),), reply, who)

    return People("toy", {}, tuple(map(sample, range(train))), tuple(map(sample, range(100, 100 + dev))))


def config(encoder: Path | str, folder: Path, **changes) -> PersonaPlugConfig:
    settings = {"augment_copies": 2, "store": str(folder / "histories"), **changes}
    return PersonaPlugConfig(encoder=EncoderConfig(name=str(encoder), pooling="mean"), **settings)


def trainer(**changes) -> TrainerConfig:
    settings = {"learning_rate": 1e-3, "batch_size": 6, "log_every": 1, "eval_every": 100, "save_every": 100}
    return TrainerConfig(**{**settings, "wandb": "disabled", "cpu": True, **changes})
