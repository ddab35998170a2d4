"""The town as people with tasks: residents to talk, rate and tag like, characters to play, situations to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from persona.data.base import People, Task, register
from persona.data.situations import TRAITS, expert_vector, metadata
from persona.town import people as town_people
from persona.town import sentences, situations
from persona.types import HistoryItem, Message, Persona, Sample


@dataclass
class TownConfig:
    """How many residents and questions. `with_truth` writes the full-knowledge description into each persona, where
    only the `description` personalizer looks: the upper bound of a table, not something a method may learn from."""

    name: str = "town"
    seed: int = 0
    train: int = 320
    dev: int = 40
    test: int = 60
    train_counts: dict[str, int] = field(default_factory=lambda: dict(town_people.TRAIN_COUNTS))
    held_out_counts: dict[str, int] = field(default_factory=lambda: dict(town_people.HELD_OUT_COUNTS))
    with_truth: bool = False
    limit: int | None = None  # samples per split


@dataclass
class TownCharactersConfig:
    """Residents as characters given by name and statements, and interviewed. `train` of them are asked `questions`
    in the train split and `held_out` others in dev; `test` further ones are asked `held_out` in test."""

    name: str = "town_characters"
    seed: int = 0
    train: int = 40
    test: int = 20
    questions: int = 16
    held_out: int = 8


@dataclass
class TownSituationsConfig:
    """Situations that call for traits by a convention that the LM does not know, and the share `neutral` of questions
    that call for nothing (persona/town/situations.py). `with_truth` writes what is called for into each persona's
    statements, where only prompt personalizers look: the upper bound of a table, not something to learn from."""

    name: str = "town_situations"
    seed: int = 0
    train: int = 480
    dev: int = 60
    test: int = 300
    neutral: float = 0.2
    with_truth: bool = False
    limit: int | None = None  # samples per split


def _join(snippets: Sequence[str], prompt: str) -> str:
    # The form the town's LM has seen: sentences.history_prompt, with items already written out.
    return f"past : {' ; '.join(snippets)} ; question : {prompt}" if snippets else prompt


def _snippet(item: HistoryItem, text: str) -> str:
    return sentences.item_text_with_label(HistoryItem(item.id, text, item.label, item.date))


def _rating_example(item: HistoryItem) -> tuple[str, str] | None:
    """A review asks for its score again: the thing's phrase is the review's first sentence."""
    if item.label is None or item.label not in town_people.RATINGS:
        return None
    return f"score for {item.text.split(' . ')[0]} ?", item.label


def _tag_example(item: HistoryItem) -> tuple[str, str] | None:
    if item.label is None or item.label not in town_people.TAGS:
        return None
    return f"tag for {item.text.removesuffix(' .')} ?", item.label


def _reply_example(item: HistoryItem) -> tuple[str, str] | None:
    return None if item.label is not None else ("how are you today ?", item.text)


def _task(name: str, kind: str, labels: tuple[str, ...], metrics: tuple[str, ...], example) -> Task:
    return register(
        Task(
            name=name,
            kind=kind,
            labels=labels,
            metrics=metrics,
            item_text=lambda item: item.text,
            item_text_with_label=sentences.item_text_with_label,
            query_text=lambda prompt: prompt,
            snippet_text=lambda item: item.text,
            snippet=_snippet,
            join=_join,
            example=example,
        )
    )


TASKS = {
    "town_reply": _task("town_reply", "generation", (), ("voice", "readable"), _reply_example),
    "town_rating": _task("town_rating", "rating", town_people.RATINGS, ("mae", "accuracy"), _rating_example),
    "town_tag": _task("town_tag", "classification", town_people.TAGS, ("accuracy",), _tag_example),
    "town_interview": _task("town_interview", "generation", (), (), _reply_example),
    "town_situation": _task("town_situation", "generation", (), (), _reply_example),
}


def load(config: TownConfig) -> People:
    """Residents split by person; the same seed gives the same town. Raises UserError for more residents than names."""
    town = town_people.people(
        config.seed,
        config.train,
        config.dev,
        config.test,
        train_counts=config.train_counts,
        held_out_counts=config.held_out_counts,
        with_truth=config.with_truth,
    )
    cut = slice(config.limit)
    return People("town", TASKS, town.train[cut], town.dev[cut], town.test[cut])


def load_characters(config: TownCharactersConfig) -> People:
    """Characters of the town; raises UserError for more of them than there are first names."""
    town = town_people.characters(
        config.seed, config.train, config.test, questions=config.questions, held_out=config.held_out
    )
    return People("town_characters", TASKS, town.train, town.dev, town.test)


def load_situations(config: TownSituationsConfig) -> People:
    """Situations and neutral questions; raises UserError for more of them than the town has."""
    town = situations.situations(config.seed, config.train, config.dev, config.test, config.neutral)
    splits = {
        split: tuple(_situation(f"{split}/{n}", one, config.with_truth) for n, one in enumerate(found[: config.limit]))
        for split, found in town.items()
    }
    return People("town_situations", TASKS, splits["train"], splits["dev"], splits["test"])


def _situation(id: str, one: situations.Situation, with_truth: bool) -> Sample:
    traits = {letter: one.calls.get(trait, 0) for letter, trait in TRAITS.items()}
    told = tuple(situations.wish(trait, level) for trait, level in one.calls.items())
    persona = Persona(id, statements=told) if with_truth else None
    notes = metadata(traits, expert_vector(traits), "town") | {"kind": one.kind}
    return Sample(id, (Message("user", one.question),), one.reply, persona, None, "town_situation", notes)
