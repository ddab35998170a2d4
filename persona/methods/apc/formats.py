"""The published files, one JSON list per character (reference/apc.md 4), written and read.

<id>.json                                  {"character", "passage", "statement"}
<id>.query_relevant_to_statement.json      {"statement", "queries": [...]}
<id>.relevance.json                        {"character", "statement", "query", "relevant": "yes" | "no"}
<id>.nli.v2.json                           {"character", "statement", "query", "response", "label"}
<id>.natural.json                          those of the last two together; not published, ours for calibration
<id>.rag.dpo.json                          {"prompt", "chosen", "rejected"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona.errors import UserError
from persona.evaluation.judges.apc import CONTRADICTED, ENTAILED, NEITHER
from persona.files import write_json
from persona.methods.apc.characters import Character

STATEMENTS, QUERIES, RELEVANCE, NLI, NATURAL, PAIRS = (
    ".json", ".query_relevant_to_statement.json", ".relevance.json", ".nli.v2.json", ".natural.json", ".rag.dpo.json",
)  # fmt: skip
KEYS: dict[str, tuple[str, ...]] = {
    STATEMENTS: ("character", "passage", "statement"),
    QUERIES: ("statement", "queries"),
    RELEVANCE: ("character", "statement", "query", "relevant"),
    NLI: ("character", "statement", "query", "response", "label"),
    NATURAL: ("character", "statement", "query", "response", "relevant", "label"),
    PAIRS: ("prompt", "chosen", "rejected"),
}
# Both spellings occur in published files; ours has the one that the judge is asked for.
LABELS = {ENTAILED: ENTAILED, NEITHER: NEITHER, CONTRADICTED: CONTRADICTED, "contradict": CONTRADICTED}
_VALUES: dict[str, Mapping[str, str]] = {"relevant": {"yes": "yes", "no": "no"}, "label": LABELS}


def read(path: Path) -> list[dict[str, Any]]:
    """The checked rows of one file; its name's ending says of which kind they are.

    Raises UserError, naming the row, for a key that is missing or a label that there is not.
    """
    kind = next(ending for ending in sorted(KEYS, key=len, reverse=True) if path.name.endswith(ending))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} should hold a JSON list of objects with the keys {', '.join(KEYS[kind])}")
    for number, row in enumerate(rows, start=1):
        if lacking := [key for key in KEYS[kind] if not isinstance(row.get(key), list if key == "queries" else str)]:
            what = "a list of queries" if lacking[0] == "queries" else "a text"
            raise UserError(f"{path}, row {number}, has no {lacking[0]!r}, which should be {what}")
        for key, known in _VALUES.items():
            if key in KEYS[kind]:
                if row[key] not in known:
                    raise UserError(
                        f"{path}, row {number}, has the {key} {row[key]!r}, which should be {', '.join(known)}"
                    )
                row[key] = known[row[key]]
    return rows


def write(folder: Path, character: Character, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    write_json(folder / f"{character.file}{kind}", list(rows))


def given(files: str | None, character: Character, kind: str) -> Path | None:
    """The user's own file of this kind about a character, if there is one."""
    path = Path(files).expanduser() / f"{character.file}{kind}" if files else None
    return path if path is not None and path.is_file() else None
