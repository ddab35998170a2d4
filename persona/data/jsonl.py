"""People of one's own as plain JSONL: one JSON object per line, UTF-8, in one folder.

    people.jsonl            {"id": "ann", "description": "...", "statements": ["..."], "attributes": {"age": "30"},
                             "history": [{"id": "a1", "text": "...", "label": "4", "date": "2024-05-01"}, ...]}
    train.jsonl, dev.jsonl  {"id": "q1", "person": "ann", "input": "...", "target": "..."}
    test.jsonl              the same; may be missing, and its rows may lack "target"
    tasks.jsonl             {"name": "stars", "kind": "rating", "labels": ["1", "2", "3"]}; may be missing

Of a person only `id` is required, of a history item `id` and `text`. A sample may hold
    "messages": [{"role": "user", "content": "..."}, ...]   instead of "input", for longer conversations;
    "options":  ["...", "..."]                              the answers to choose among;
    "task":     a name of tasks.jsonl or a LaMP task        (else `data.task`, else "plain": generation);
    "history":  ["a1", ...]                                 ids of the person's items it may see (else all of them):
                                                            leave out the item whose text is the target.
Other keys are refused, so that a mistyped one is noticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from persona.data import base
from persona.data.base import DataConfig, People, Task
from persona.data.rows import check_folder, field, first_few, read_jsonl
from persona.data.table import Samples, TableWriter, cached_table
from persona.errors import UserError
from persona.types import HistoryItem, Message

log = logging.getLogger(__name__)
PERSON_KEYS = {"id", "description", "statements", "attributes", "history"}
ITEM_KEYS = {"id", "text", "label", "date"}
SAMPLE_KEYS = {"id", "person", "input", "messages", "target", "options", "task", "history"}
ROLES = ("system", "user", "assistant")


def _closed(row: dict, known: Collection[str], where: str) -> None:
    if unknown := [key for key in row if key not in known]:
        raise UserError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _strings(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UserError(f"{where} has {value!r:.60} as {name!r}, which should be a list of strings")
    return value


def _item(value: Any, where: str) -> HistoryItem:
    id = field(value, "id", where)
    _closed(value, ITEM_KEYS, where)
    optional = {key: field(value, key, where) for key in ("label", "date") if value.get(key) is not None}
    return HistoryItem(id=id, text=field(value, "text", where), **optional)


class _Person:
    """What samples need to know of a written person: the row, and the position of each item."""

    def __init__(self, row: int, positions: dict[str, int]) -> None:
        self.row, self.positions = row, positions


def _write_people(path: Path, writer: TableWriter, advance: Callable[[int], None], facts: dict) -> dict[str, _Person]:
    people: dict[str, _Person] = {}
    for line, row, offset in read_jsonl(path):
        where = f"{path}, line {line}"
        id = field(row, "id", where)
        where = f"{where} (id {id})"
        if id in people:
            raise UserError(f"{where} repeats an id; every person should occur once")
        _closed(row, PERSON_KEYS, where)
        entries = row.get("history", [])
        attributes = row.get("attributes", {})
        if not isinstance(entries, list) or not isinstance(attributes, dict):
            raise UserError(f"{where}: 'history' should be a list and 'attributes' an object")
        items = [_item(entry, f"{where}, item {number}") for number, entry in enumerate(entries, start=1)]
        positions = {item.id: position for position, item in enumerate(items)}
        if len(positions) < len(items):
            raise UserError(f"{where} repeats the id of a history item; every id should occur once per person")
        facts["empty_texts"] += [f"{item.id} of {id}" for item in items if not item.text.strip()]
        person = writer.person(
            id,
            items,
            description=field(row, "description", where) if "description" in row else "",
            statements=_strings(row.get("statements", []), "statements", where),
            attributes={name: field(attributes, name, f"{where}, attributes") for name in attributes},
        )
        people[id] = _Person(person, positions)
        advance(offset)
    return people


def _messages(row: dict, where: str) -> tuple[Message, ...]:
    if ("input" in row) == ("messages" in row):
        raise UserError(f"{where} should have either 'input' or 'messages'")
    if "input" in row:
        return (Message("user", field(row, "input", where)),)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' should be a list of {{role, content}}")
    found = tuple(Message(field(entry, "role", where), field(entry, "content", where)) for entry in messages)
    if wrong := [message.role for message in found if message.role not in ROLES]:
        raise UserError(f"{where} has a message of role {wrong[0]!r}, which should be one of {', '.join(ROLES)}")
    return found


def _selection(row: dict, person: _Person | None, where: str) -> list[int] | None:
    if "history" not in row:
        return None
    ids = _strings(row["history"], "history", where)
    positions = {} if person is None else person.positions
    if missing := [id for id in ids if id not in positions]:
        raise UserError(f"{where} names history items its person does not have: {first_few(missing)}")
    return [positions[id] for id in ids]


class _Builder:
    """Writes people.jsonl and one split's samples into a table."""

    def __init__(self, people: Path, samples: Path, task: str, tasks: Collection[str], hidden: bool) -> None:
        self.people, self.samples, self.task, self.tasks, self.hidden = people, samples, task, tasks, hidden

    def __call__(self, writer: TableWriter, advance: Callable[[int], None]) -> dict:
        facts: dict[str, list[str]] = {"empty_profiles": [], "empty_texts": [], "tasks": []}
        people = _write_people(self.people, writer, advance, facts)
        seen: set[str] = set()
        for line, row, _ in read_jsonl(self.samples):
            where = f"{self.samples}, line {line}"
            id = field(row, "id", where)
            where = f"{where} (id {id})"
            if id in seen:
                raise UserError(f"{where} repeats an id; every id should occur once")
            seen.add(id)
            self._write(writer, row, id, where, people, facts)
        if not seen:
            raise UserError(f"{self.samples} holds no rows")
        return facts

    def _write(
        self, writer: TableWriter, row: dict, id: str, where: str, people: dict[str, _Person], facts: dict
    ) -> None:
        _closed(row, SAMPLE_KEYS, where)
        name = field(row, "person", where) if "person" in row else None
        if name is not None and name not in people:
            raise UserError(f"{where} is of person {name!r}, who is not in {self.people.name}")
        person = None if name is None else people[name]
        task = field(row, "task", where) if "task" in row else self.task
        if task not in self.tasks:
            task = base.canonical(task)
        if task not in facts["tasks"]:
            facts["tasks"].append(task)
        selection = _selection(row, person, where)
        if person is not None and not (person.positions if selection is None else selection):
            facts["empty_profiles"].append(id)
        writer.sample(
            id=id,
            messages=_messages(row, where),
            target="" if self.hidden and "target" not in row else field(row, "target", where),
            task=task,
            person=None if person is None else person.row,
            selection=selection,
            options=_strings(row["options"], "options", where) if "options" in row else None,
        )


def read_tasks(path: Path) -> dict[str, Task]:
    """The tasks of a tasks.jsonl, registered under their names; none when the file is missing."""
    tasks = {}
    if path.exists():
        for line, row, _ in read_jsonl(path):
            where = f"{path}, line {line}"
            _closed(row, {"name", "kind", "labels"}, where)
            labels = _strings(row.get("labels", []), "labels", where)
            task = base.plain_task(field(row, "name", where), field(row, "kind", where), labels)
            tasks[task.name] = base.register(task)
    return tasks


def load(cfg: DataConfig) -> People:
    """Read a folder of the format above. Raises UserError, with file and line, for anything wrong in it."""
    if cfg.path is None:
        raise UserError("data.path is not set; for data=jsonl it should be the folder that holds people.jsonl")
    folder = Path(cfg.path)
    check_folder(folder, "data.path", "a folder with people.jsonl")
    default = cfg.task or "plain"
    if default == "plain":
        base.register(base.plain_task("plain"))
    tasks = read_tasks(folder / "tasks.jsonl")
    used: dict[str, Task] = {}
    splits: dict[str, Samples] = {}
    for split in base.SPLITS:
        samples = folder / f"{split}.jsonl"
        if split == "test" and not samples.exists():
            continue
        sources = [folder / "people.jsonl", samples]
        if absent := [path for path in sources if not path.exists()]:
            raise UserError(f"{absent[0]} is missing; see persona/data/jsonl.py for the files of data=jsonl")
        if (folder / "tasks.jsonl").exists():
            sources.append(folder / "tasks.jsonl")
        build = _Builder(sources[0], samples, default, tasks, hidden=split == "test")
        table, facts = cached_table(Path(cfg.cache), sources, f"jsonl {split} {default}", build)
        base.check_empty(samples, facts, cfg)
        used |= {name: base.task(name, cfg.compat) for name in facts["tasks"]}
        splits[split] = Samples(str(table), cfg.limit)
    return People(f"jsonl/{folder.name}", used, splits["train"], splits["dev"], splits.get("test", ()))
