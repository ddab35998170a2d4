"""Constitutions: a character as first-person traits, each with questions whose answers would show it.

Three forms are read; which one a file has is seen from its first character:

    [{"trait": "I am …", "questions": ["…", …]}, …]              a JSON list, as published (hand-written/*.txt)
    {"trait": …, "questions": […], "additional_questions": […]}  one object a line, as published (few-shot/*.jsonl)

    # Anything else is plain text: a trait, and below it its questions, each beginning with "- ".
    I am patient, and I explain things one step at a time.
    - How do I tie a tie?
    - What is a prime number?

`python train.py method=character data=constitution data.path=me.txt` turns one such file into a character.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.data.base import People, plain_task, register
from persona.data.rows import field, first_few, open_file, read_json, read_jsonl
from persona.errors import UserError
from persona.types import Message, Persona, Sample

SHIPPED = Path(__file__).parent / "constitutions"
_KEYS = ("trait", "questions", "additional_questions", "clarification")
_BULLETS = ("- ", "* ", "• ")


@dataclass
class ConstitutionConfig:
    """`path`: a file of one's own, or the name of a constitution that comes with the package (`town_sunny`).
    `limit`: read only the first so many questions."""

    name: str = "constitution"
    path: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Trait:
    """A first-person assertion, its hand-written `questions`, and further ones that were written from those."""

    text: str
    questions: tuple[str, ...]
    additional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Constitution:
    name: str
    traits: tuple[Trait, ...]

    @property
    def statements(self) -> tuple[str, ...]:
        """The traits' texts, in order: what stands in prompts."""
        return tuple(trait.text for trait in self.traits)


def read_constitution(path: Path | str) -> Constitution:
    """Read a file in any of the three forms, or a shipped constitution by its name.

    Raises UserError, in one sentence with file and place, for: no such file, no trait at all, an empty trait or
    question, a trait without questions, a trait or one trait's question that occurs twice, an unknown key, broken
    JSON, text that is not UTF-8.
    """
    path = _find(path)
    with open_file(path) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text, at byte {error.start}") from error
    first = text.lstrip()[:1]
    if not first:
        raise UserError(f"{path} is empty: it should hold traits, each with questions")
    if first == "[":
        rows = _json_traits((f"{path}, item {row}", value) for row, value, _ in read_json(path, "item"))
    elif first == "{":
        rows = _json_traits((f"{path}, line {line}", value) for line, value, _ in read_jsonl(path))
    else:
        rows = _plain_traits(path, text)
    seen: dict[str, str] = {}
    traits = []
    for where, trait in rows:
        _check(where, trait)
        if trait.text in seen:
            raise UserError(f"{where} repeats the trait of {seen[trait.text]}: every trait should occur once")
        seen[trait.text] = where
        traits.append(trait)
    if not traits:
        raise UserError(f"{path} has no trait: it should hold traits, each with questions")
    return Constitution(path.stem, tuple(traits))


def load(cfg: ConstitutionConfig) -> People:
    """One persona, whose statements are the traits, with a training sample per question (metadata: its trait and
    where the question is from, "hand-written" or "additional"). Raises UserError as `read_constitution` does."""
    if not cfg.path:
        known = ", ".join(sorted(path.stem for path in SHIPPED.iterdir()))
        raise UserError(f"data.path has no value: it should be a constitution's file, or one of {known}")
    constitution = read_constitution(cfg.path)
    persona = Persona(constitution.name, statements=constitution.statements)
    samples = []
    for number, trait in enumerate(constitution.traits, start=1):
        questions = [*(("hand-written", q) for q in trait.questions), *(("additional", q) for q in trait.additional)]
        for place, (source, question) in enumerate(questions, start=1):
            metadata = {"trait": trait.text, "source": source}
            messages = (Message("user", question),)
            samples.append(
                Sample(f"{number}-{place}", messages, persona=persona, task="constitution", metadata=metadata)
            )
    return People("constitution", {"constitution": TASK}, samples[: cfg.limit], ())


TASK = register(plain_task("constitution"))


def from_people(people: People) -> Constitution:
    """The constitution that `load` made these people from. Raises UserError for people of another kind."""
    if people.name != "constitution" or not people.train:
        raise UserError("a character is trained from a constitution: choose data=constitution data.path=…")
    persona = people.train[0].persona
    assert persona is not None

    def questions(trait: str, source: str) -> tuple[str, ...]:
        own = {"trait": trait, "source": source}
        return tuple(sample.messages[0].content for sample in people.train if sample.metadata == own)

    traits = [
        Trait(text, questions(text, "hand-written"), questions(text, "additional")) for text in persona.statements
    ]
    return Constitution(persona.id, tuple(traits))


def _find(path: Path | str) -> Path:
    """A file as it is; a bare name is looked up among the shipped ones."""
    shipped = SHIPPED / f"{path}.txt"
    if not Path(path).exists() and Path(path).name == str(path) and shipped.is_file():
        return shipped
    return Path(path)


def _json_traits(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Trait]]:
    for where, row in rows:
        text = field(row, "trait", where).strip()
        if unknown := [key for key in row if key not in _KEYS]:
            raise UserError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(_KEYS)}")
        questions, additional = (
            _strings(row.get(key, []), key, where) for key in ("questions", "additional_questions")
        )
        yield where, Trait(text, questions, additional)


def _strings(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UserError(f"{where} has {value!r:.60} as {key!r}, which should be a list of strings")
    return tuple(entry.strip() for entry in value)


def _plain_traits(path: Path, text: str) -> Iterator[tuple[str, Trait]]:
    trait: tuple[str, str] | None = None
    questions: list[str] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        if line.startswith(_BULLETS) or line in ("-", "*", "•"):
            if trait is None:
                raise UserError(f"{where} has a question before the first trait: a trait's questions stand below it")
            questions.append(line[1:].strip())
            continue
        if trait is not None:
            yield trait[0], Trait(trait[1], tuple(questions))
        trait, questions = (where, line), []
    if trait is not None:
        yield trait[0], Trait(trait[1], tuple(questions))


def _check(where: str, trait: Trait) -> None:
    if not trait.text:
        raise UserError(f"{where} has an empty trait: it should be a sentence in the first person")
    if not trait.questions:
        raise UserError(
            f'{where}: the trait "{trait.text:.60}" has no questions; it should have some (in plain text each stands '
            'on a line of its own below the trait and begins with "- ")'
        )
    if not all((*trait.questions, *trait.additional)):
        raise UserError(f'{where}: the trait "{trait.text:.60}" has an empty question; fill it in or take it out')
    if twice := [q for n, q in enumerate(trait.questions) if q in trait.questions[:n]]:
        raise UserError(f'{where}: the trait "{trait.text:.60}" asks twice: {first_few(twice, 1)}')
