"""A text about one character: statements where its lines read "Key: value", and interview questions to ask.

    python train.py data=biography data.path=Alice.txt method=apc teacher=endpoint judge=endpoint

UTF-8. The character's name stands in a line "Name: …", else in `data.character`, else it is the file's name
(`wiki_Ada_Lovelace.txt` is Ada Lovelace). A folder holds one such file per character. Prose gives no statements here:
a language model takes them out of it (method apc, stage statements).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from persona.data.base import People, plain_task, register
from persona.errors import UserError
from persona.types import Message, Persona, Sample

TASK = register(plain_task("interview"))
QUESTIONS = Path(__file__).parent / "interview.txt"
ROLE = "You are {name}. Answer as {name} would, in at most three sentences, and never as an AI."
_ENTRY = re.compile(r"(?P<key>[^\W\d_][^:.!?]{0,48}?)\s*:\s+(?P<value>\S.*)")


@dataclass
class BiographyConfig:
    """`path`: a text file, or a folder of them. `character`: the name, where file and text do not give it.
    `questions`: a file with one question a line, for the test split; null takes ten that anybody can be asked.
    `train_questions`: the same for the train split, or null. `statements`: a folder with what a model took out of the
    texts, <id>.json as method apc leaves it; null takes those of "Key: value" lines."""

    name: str = "biography"
    path: str | None = None
    character: str | None = None
    questions: str | None = None
    train_questions: str | None = None
    statements: str | None = None


def names(statement: str, character: str) -> bool:
    """Whether a statement names the character, by any word of the name ("Carter" for Alice Carter)."""
    words = {word.casefold() for word in re.findall(r"\w+", character) if len(word) > 2} or {character.casefold()}
    return not words.isdisjoint(word.casefold() for word in re.findall(r"\w+", statement))


def check_names(statements: tuple[str, ...], character: str, where: str) -> None:
    """Raise UserError for the first statement that does not name the character: alone, it would be about nobody."""
    for number, statement in enumerate(statements, start=1):
        if not names(statement, character):
            raise UserError(
                f"{where}, statement {number}, does not name {character}: {statement[:80]!r}; every statement should "
                "stand for itself"
            )


def paragraphs(text: str) -> list[str]:
    """The text's paragraphs, divided by blank lines; headings ("# …", a short line without a full stop) go."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [part for part in parts if part and not part.startswith("#") and (len(part) > 60 or part[-1] in ".!?")]


def statements_of(text: str, character: str, where: str) -> tuple[str, ...]:
    """One statement per "Key: value" line, each naming the character; () for prose (under half of its lines).

    A value that names the character is the statement, else "Alice's age: 26 years old.". The line "Name: …" gives
    none. Raises UserError for a line of another kind that does not name the character.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    entries = [_ENTRY.fullmatch(line) for _, line in lines]
    if 2 * sum(entry is not None for entry in entries) < len(lines):
        return ()
    found = []
    for (number, line), entry in zip(lines, entries, strict=True):
        if entry is None:
            check_names((line,), character, f"{where}, line {number}")
            found.append(line)
        elif entry["key"].casefold() != "name":
            key = " ".join(word.lower() if word.istitle() else word for word in entry["key"].split())
            value = entry["value"]
            found.append(value if names(value, character) else f"{character}'s {key}: {value}")
    return tuple(found)


def read(path: Path, character: str | None = None) -> Persona:
    """The character of one file; the text is its description. Raises UserError for a file that cannot be read, is
    empty, or holds a statement without the character's name."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"data.path {path} could not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.path {path} is not UTF-8 text, at byte {error.start}") from error
    if not text:
        raise UserError(f"data.path {path} is empty; it should be a text about one character")
    given = re.search(r"^Name\s*:\s*(.+?)\s*[.]?\s*$", text, flags=re.M)
    stem = path.stem.removeprefix("wiki_")
    name = character or (given[1] if given else stem.replace("_", " "))
    return Persona(stem, text, statements_of(text, name, str(path)), {"name": name})


def read_questions(path: Path, key: str) -> list[str]:
    """One question a line, blank lines aside. Raises UserError for a file without any."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.{key} {path} could not be read as UTF-8 text: {error}") from error
    questions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not questions:
        raise UserError(f"data.{key} {path} holds no question; it should have one a line")
    return questions


def read_statements(folder: Path, persona: Persona) -> tuple[str, ...]:
    """The statements of `<folder>/<id>.json`, a list of objects with the key "statement" (reference/apc.md 4).

    Raises UserError for another file, and for a statement that does not name the character.
    """
    path = folder.expanduser() / f"{quote(persona.id, safe=' ')}.json"
    try:
        found = tuple(dict.fromkeys(str(row["statement"]) for row in json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data.statements {path} should be a JSON list of objects with 'statement': {error!r}"
        ) from error
    check_names(found, persona.attributes["name"], str(path))
    return found


def load(config: BiographyConfig) -> People:
    """Every question to every character: the interview as the test split, `train_questions` as the train split.

    Raises UserError for bad files (`read`, `read_questions`, `read_statements`), a folder without texts, and a folder
    with `character`.
    """
    if config.path is None:
        raise UserError("data.path has no value: data.path=… names a text about one character, or a folder of them")
    path = Path(config.path).expanduser()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data.path {path} holds no text: it should have one .txt file per character")
    if config.character and len(files) > 1:
        raise UserError(
            f"data.character={config.character!r} names one character, but {path} holds {len(files)} texts"
        )
    asked = {"test": read_questions(Path(config.questions or QUESTIONS), "questions")}
    asked["train"] = read_questions(Path(config.train_questions), "train_questions") if config.train_questions else []
    samples: dict[str, list[Sample]] = {split: [] for split in asked}
    for file in files:
        persona = read(file, config.character)
        if config.statements:
            persona = replace(persona, statements=read_statements(Path(config.statements), persona))
        role = Message("system", ROLE.format(name=persona.attributes["name"]))
        for split, questions in asked.items():
            samples[split] += [
                Sample(f"{persona.id}/{split}/{n}", (role, Message("user", question)), "", persona, None, TASK.name)
                for n, question in enumerate(questions)
            ]
    return People("biography", {TASK.name: TASK}, tuple(samples["train"]), (), tuple(samples["test"]))
