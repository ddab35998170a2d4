"""Prompt files with named slots.

A file is Jinja text, one user message unless lines such as `=== system ===` divide it into messages. What is filled in
is never read as a template again.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError, meta

from persona.errors import UserError
from persona.types import Conversation, Message

_ENVIRONMENT = Environment(undefined=StrictUndefined, keep_trailing_newline=False, trim_blocks=True)
_DIVIDER = re.compile(r"^=== (system|user|assistant) ===\n", flags=re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """A prompt file. `text` is the template as it stands in the file."""

    name: str
    text: str

    @staticmethod
    def load(path: Path | str) -> Prompt:
        """Read a prompt file. Raises UserError when it is missing, empty, or not a template."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the prompt file {path} cannot be read: {error}") from error
        if not text.strip():
            raise UserError(f"the prompt file {path} is empty")
        prompt = Prompt(path.stem, text)
        try:
            _ = prompt.slots
        except TemplateError as error:
            raise UserError(f"the prompt file {path} is not a template: {error}") from error
        return prompt

    @cached_property
    def slots(self) -> frozenset[str]:
        """Names that `messages` has to be given."""
        return frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(self.text)))

    @cached_property
    def hash(self) -> str:
        """12 hex digits of the file's text: rows keep it, so that results under another wording are told apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def messages(self, **slots: object) -> Conversation:
        """The filled conversation. Raises UserError unless exactly the file's slots are given."""
        if set(slots) != self.slots:
            given, wanted = ", ".join(sorted(slots)), ", ".join(sorted(self.slots))
            raise UserError(f"the prompt {self.name} has the slots {wanted}, and was given {given}")
        # Divided before it is filled, so that nothing filled in can open a message of its own.
        first, *rest = _DIVIDER.split(self.text)
        pieces = ([("user", first)] if first.strip() else []) + list(zip(rest[::2], rest[1::2], strict=True))
        return tuple(Message(role, _ENVIRONMENT.from_string(part).render(slots).strip()) for role, part in pieces)
