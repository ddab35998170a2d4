"""The method's wording: a folder of prompt files, `english` or `town` (both come with the package) or one of your own.

    expand.md                  ask for further user messages                      slots: trait, questions, count
    teacher.md                 the teacher in the role                            slots: traits, prompt
    thinking.md                how the teacher's thoughts begin                   slots: traits
    reflection.md              the model alone with one of reflection_prompts.txt slots: traits, prompt
    interaction.md             two instances, led by guidance_free.txt or guidance_leading.txt and greeted out of
                               greetings.txt and greetings_leading.txt            slots: traits, guidance
    interaction_training.md    the system prompt that is kept of it
    extra.txt                  further prompts: `method.extra_prompts=town`

Every `.md` may also have the slot `name`, the assistant's name. A `.txt` holds one text a line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from persona.errors import UserError
from persona.evaluation.prompts import Prompt
from persona.types import Conversation

SHIPPED = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class PromptSet:
    """The prompt files of `folder`, filled for an assistant called `name`."""

    folder: Path
    name: str

    @staticmethod
    def open(folder: str, name: str) -> PromptSet:
        """A shipped set by its name, or a folder. Raises UserError when there is neither."""
        path = SHIPPED / folder if (SHIPPED / folder).is_dir() else Path(folder)
        if not path.is_dir():
            known = " or ".join(sorted(entry.name for entry in SHIPPED.iterdir()))
            raise UserError(f"method.prompts={folder} is neither a folder nor {known}")
        return PromptSet(path, name)

    def fill(self, file: str, /, **slots: object) -> Conversation:
        """The messages of `<file>.md`. Raises UserError unless the file has exactly these slots (and perhaps `name`):
        what is handed over reaches the model."""
        prompt = Prompt.load(self.folder / f"{file}.md")
        return prompt.messages(**slots, **({"name": self.name} if "name" in prompt.slots else {}))

    def lines(self, file: str) -> tuple[str, ...]:
        """The texts of `<file>.txt`, one a line."""
        return read_lines(self.folder / f"{file}.txt")

    def hash(self, *files: str) -> str:
        """12 hex digits over the named files and the assistant's name: under another wording a stage starts again."""
        digest = hashlib.sha256(self.name.encode())
        for file in files:
            path = self.folder / file
            digest.update(path.read_bytes() if path.is_file() else b"")
        return digest.hexdigest()[:12]


def read_lines(path: Path) -> tuple[str, ...]:
    """The non-blank lines of a text file. Raises UserError when it cannot be read or has none."""
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, at byte {error.start}") from error
    if not lines:
        raise UserError(f"{path} is empty: it should hold one text a line")
    return lines
