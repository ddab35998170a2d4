"""Prompt files with named slots.

A file is Jinja text, one user message unless lines such as `=== system ===` divide it into messages. What is filled in
is never read as a template again.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta

from persona.errors import UserError
from persona.types import Conversation, Message

_ENVIRONMENT = Environment(undefined=StrictUndefined, keep_trailing_newline=False, trim_blocks=True)
_DIVIDER = re.compile(r"^=== (system|user|assistant) ===[ \t]*\n", flags=re.MULTILINE)
_LIKE_DIVIDER = re.compile(r"^[ \t]*=+[ \t]*(\w+)[ \t]*=+[ \t]*$", flags=re.MULTILINE)
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """A prompt file. `text` is the template as it stands in the file."""

    name: str
    text: str

    @staticmethod
    def load(path: Path | str) -> Prompt:
        """Read a prompt file.

        Raises UserError when it is missing, empty, not a template, or divided by a line that names no role.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"the prompt file {path} could not be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt file {path} is not UTF-8 text, at byte {error.start}") from error
        if not text.strip():
            raise UserError(f"the prompt file {path} is empty")
        prompt = Prompt(path.stem, text)
        for line in _LIKE_DIVIDER.finditer(text):
            meant = get_close_matches(line[1].lower(), _ROLES, n=1)
            if meant and not _DIVIDER.fullmatch(line[0] + "\n"):
                raise UserError(f"the prompt file {path} has the line {line[0]!r}: a divider is === {meant[0]} ===")
        for role, part in prompt._parts:
            if not part.strip():
                raise UserError(f"the prompt file {path} has nothing under === {role} ===")
            try:
                _ENVIRONMENT.from_string(part)
            except TemplateError as error:
                where = f" (line {error.lineno} under {role})" if isinstance(error, TemplateSyntaxError) else ""
                raise UserError(f"the prompt file {path} is not a template: {error.message}{where}") from error
        return prompt

    @cached_property
    def _parts(self) -> list[tuple[str, str]]:
        # Divided before it is filled, so that nothing filled in can open a message of its own.
        first, *rest = _DIVIDER.split(self.text)
        return ([("user", first)] if first.strip() else []) + list(zip(rest[::2], rest[1::2], strict=True))

    @cached_property
    def _templates(self) -> list[tuple[str, Template]]:
        return [(role, _ENVIRONMENT.from_string(part)) for role, part in self._parts]

    @cached_property
    def slots(self) -> frozenset[str]:
        """Names that `messages` has to be given."""
        parts = [meta.find_undeclared_variables(_ENVIRONMENT.parse(part)) for _, part in self._parts]
        return frozenset().union(*parts)

    @cached_property
    def hash(self) -> str:
        """12 hex digits of the file's text: rows keep it, so that results under another wording are told apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def messages(self, **slots: object) -> Conversation:
        """The filled conversation. Raises UserError unless exactly the file's slots are given."""
        lacking, unknown = sorted(self.slots - set(slots)), sorted(set(slots) - self.slots)
        if lacking or unknown:
            parts = [f"has no value for its slot {name}" for name in lacking]
            parts += [f"has no slot {name}, which was given" for name in unknown]
            raise UserError(f"the prompt {self.name} {' and '.join(parts)}; its slots are {self._slot_names}")
        try:
            return tuple(Message(role, template.render(slots).strip()) for role, template in self._templates)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the prompt {self.name} could not be filled: {error}") from error

    @property
    def _slot_names(self) -> str:
        return ", ".join(sorted(self.slots)) or "none"
