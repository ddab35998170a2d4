"""Who is to be played: the characters of the data, and how a question is put to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from persona.data.base import People
from persona.errors import UserError
from persona.types import Conversation, Message, Persona


@dataclass(frozen=True)
class Character:
    """`name` is what statements call the persona; `role` the messages in front of every question ("you are ada")."""

    persona: Persona
    name: str
    role: Conversation
    task: str
    questions: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.persona.id

    @property
    def file(self) -> str:
        """The id as it stands in names of files."""
        return quote(self.id, safe=" ")

    def ask(self, query: str) -> Conversation:
        return (*self.role, Message("user", query))


def characters(people: People) -> list[Character]:
    """The personas of the train split with the questions asked there; without any, those of test, without questions.

    A biography has nothing but test questions: they say who the character is, and none of them is learned from.
    Raises UserError for data without personas.
    """
    samples, own = (people.train, True) if people.train else (people.test, False)
    found: dict[str, Character] = {}
    questions: dict[str, list[str]] = {}
    for sample in samples:
        persona = sample.persona
        if persona is None or not sample.messages or sample.messages[-1].role != "user":
            raise UserError(f"method apc plays characters, but sample {sample.id} has no persona or no user's message")
        if persona.id not in found:
            name = persona.attributes.get("name", persona.id)
            found[persona.id] = Character(persona, name, sample.messages[:-1], sample.task, ())
        if own:
            questions.setdefault(persona.id, []).append(sample.messages[-1].content)
    if not found:
        raise UserError(f"method apc plays characters, but data {people.name} has none")
    return [
        Character(c.persona, c.name, c.role, c.task, tuple(dict.fromkeys(questions.get(c.id, ()))))
        for c in found.values()
    ]
