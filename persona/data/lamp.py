"""LaMP's official files: tasks 1, 2, 3, 4, 5, 7, user-based and time-based (reference/lamp.md §4).

A split is `<split>_questions.json`, a list of {id, input, profile: [...]} with `user_id` and item dates in the
time-based setting, and `<split>_outputs.json`, {task: "LaMP_k", golds: [{id, output}]}; or questions alone that hold
their `output` (the merged form). The files may lie in the folder itself or in nests such as LaMP_3/train/.

The questions are streamed into Arrow files once (persona/data/table.py), whatever their size, so that neither building
nor training holds the histories in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona.data import base
from persona.data.base import DataConfig, People, Task
from persona.data.lamp_tasks import FIELDS
from persona.data.rows import check_folder, field, first_few, open_file, read_json
from persona.data.table import Samples, TableWriter, cached_table
from persona.errors import UserError
from persona.types import HistoryItem, Message

DEPTHS = ("", "*/", "*/*/", "*/*/*/")


def find_questions(folder: Path, split: str, task: str | None) -> Path | None:
    """The one `<split>_questions.json` in or below `folder` (three levels), of `task` where several tasks lie there.

    None when there is none; raises UserError when several remain, or the folder cannot be read.
    """
    check_folder(folder, "data.path", "a folder with LaMP's <split>_questions.json files")
    found = sorted(path for depth in DEPTHS for path in folder.glob(f"{depth}{split}_questions.json"))
    if len(found) > 1 and task is not None:
        found = [path for path in found if task_of_folder(path.parent, folder) == task]
    if len(found) > 1:
        names = first_few([str(path.relative_to(folder)) for path in found], 7)
        raise UserError(
            f"{folder} holds several {split}_questions.json ({names}): "
            "name one with data.task, or let data.path point further down"
        )
    return found[0] if found else None


def task_of_folder(folder: Path, top: Path) -> str | None:
    """The task named by a folder or the nearest one above it, up to `top`: LaMP_3, LaMP-3, LaMP_time_3."""
    for part in (folder, *folder.parents):
        match = re.fullmatch(r"lamp[-_](?:time[-_]|user[-_])?(\d)", part.name, flags=re.IGNORECASE)
        if match:
            return f"LaMP_{match[1]}"
        if part == top:
            return None
    return None


def read_outputs(path: Path) -> tuple[str | None, dict[str, str]]:
    """Task name and {id: output} of an outputs file, `golds` in its order. Raises UserError for duplicate ids."""
    names = [value for _, value, _ in read_json(path, "task")]
    outputs: dict[str, str] = {}
    for row, value, _ in read_json(path, "golds.item"):
        where = f"{path}, row {row} of golds"
        id = field(value, "id", where)
        if id in outputs:
            raise UserError(f"{where} repeats the id {id}; every id should occur once")
        outputs[id] = field(value, "output", where)
    if not outputs:
        raise UserError(f"{path} holds no golds; it should be {{task: LaMP_k, golds: [{{id, output}}, ...]}}")
    return (str(names[0]) if names else None), outputs


def read_item(value: Any, task: str, where: str) -> HistoryItem:
    """A profile item of LaMP's as a HistoryItem (lamp_tasks: which field becomes what); UserError if one lacks."""
    names = FIELDS[task]
    return HistoryItem(
        id=field(value, "id", where),
        text=field(value, names.text, where),
        label=None if names.label is None else field(value, names.label, where),
        date=str(value["date"]) if value.get("date") is not None else None,
    )


class _Builder:
    """Writes one split into a table; refuses what is wrong and counts what is merely empty."""

    def __init__(self, questions: Path, outputs: dict[str, str] | None, task: Task, hidden: bool) -> None:
        self.questions, self.outputs, self.task, self.hidden = questions, outputs, task, hidden
        self.empty_profiles: list[str] = []
        self.empty_texts: list[str] = []

    def _target(self, value: dict, id: str, where: str) -> str:
        if self.outputs is not None:
            return self.outputs.get(id, "")
        if self.hidden:
            return ""
        if "output" not in value:
            raise UserError(
                f"{where} has no output, and there is no {outputs_path(self.questions).name} beside the file: "
                "put it there, or give every question its 'output'"
            )
        return field(value, "output", where)

    def __call__(self, writer: TableWriter, advance: Callable[[int], None]) -> dict:
        seen: dict[str, None] = {}
        unknown: list[str] = []
        for row, value, offset in read_json(self.questions, "item"):
            where = f"{self.questions}, row {row}"
            id = field(value, "id", where)
            where = f"{where} (id {id})"
            if id in seen:
                raise UserError(f"{where} repeats an id; every id should occur once")
            seen[id] = None
            if self.outputs is not None and id not in self.outputs:
                unknown.append(id)
                continue
            self._write(writer, value, id, where)
            advance(offset)
        self._check_ids(seen, unknown)
        return {"empty_profiles": self.empty_profiles, "empty_texts": self.empty_texts}

    def _write(self, writer: TableWriter, value: dict, id: str, where: str) -> None:
        profile = value.get("profile")
        if not isinstance(profile, list):
            raise UserError(f"{where} has no list 'profile' (fields: {', '.join(value)})")
        items = [
            read_item(item, self.task.name, f"{where}, item {number} of the profile")
            for number, item in enumerate(profile, start=1)
        ]
        if not items:
            self.empty_profiles.append(id)
        for item in items:
            if not self.task.item_text(item).strip():
                self.empty_texts.append(f"{item.id} of {id}")
        prompt = field(value, "input", where)
        if not prompt.strip():
            raise UserError(f"{where} has an empty input; it should hold the question's text")
        person = field(value, "user_id", where) if "user_id" in value else id
        writer.sample(
            id=id,
            messages=(Message("user", prompt),),
            target=self._target(value, id, where),
            task=self.task.name,
            person=writer.person(person, items),
        )

    def _check_ids(self, seen: dict[str, None], unknown: list[str]) -> None:
        if not seen:
            raise UserError(f"{self.questions} holds no rows; it should be a list of questions")
        if self.outputs is None:
            return
        name = outputs_path(self.questions).name
        spare = [id for id in self.outputs if id not in seen]
        if unknown or spare:
            parts = []
            if unknown:
                parts.append(f"{len(unknown)} questions have no output (ids {first_few(unknown)})")
            if spare:
                parts.append(f"{len(spare)} outputs have no question (ids {first_few(spare)})")
            raise UserError(
                f"{self.questions} ({len(seen)} rows) and {name} ({len(self.outputs)} rows) do not belong together: "
                + "; ".join(parts)
            )


def outputs_path(questions: Path) -> Path:
    """Where the outputs of a questions file lie."""
    return questions.with_name(questions.name.replace("_questions.json", "_outputs.json"))


def _task_name(questions: Path, named: str | None, wanted: str | None, top: Path) -> str:
    stated = None if named is None else base.canonical(named)
    if stated and wanted and stated != wanted:
        raise UserError(
            f"{outputs_path(questions)} says its task is {stated}, but data.task or the train files say {wanted}"
        )
    name = wanted or stated or task_of_folder(questions.parent, top.parent)
    if name is None:
        raise UserError(f"which task {questions} belongs to cannot be told from the files; name it with data.task")
    name = base.canonical(name)
    if name not in FIELDS:
        raise UserError(f"{name} is not a task of LaMP's files; data.task should be one of {', '.join(FIELDS)}")
    return name


def read_split(folder: Path | str, split: str, cfg: DataConfig) -> Samples:
    """The samples of one split, through the cache. Raises UserError for anything wrong with the files.

    The split "test" may lack outputs (LaMP keeps them): its targets are then "".
    """
    folder = Path(folder)
    wanted = None if cfg.task is None else base.canonical(cfg.task)
    questions = find_questions(folder, split, wanted)
    if questions is None:
        raise UserError(f"there is no {split}_questions.json in {folder} or up to three folders below it")
    answers = outputs_path(questions)
    outputs = None
    named = None
    if answers.exists():
        named, outputs = read_outputs(answers)
    name = _task_name(questions, named, wanted, folder)
    open_file(questions).close()
    build = _Builder(questions, outputs, base.task(name), hidden=split == "test")
    sources = [questions, answers] if outputs is not None else [questions]
    table, facts = cached_table(Path(cfg.cache), sources, f"lamp {name} {split}", build)
    base.check_empty(questions, facts, cfg)
    return Samples(str(table), cfg.limit)


def load(cfg: DataConfig) -> People:
    """Read train and dev, and test where it is there, of one LaMP task. Raises UserError for bad input."""
    if cfg.path is None:
        raise UserError("data.path is not set; for data=lamp it should be the folder with LaMP's question files")
    folder = Path(cfg.path)
    train = read_split(folder, "train", cfg)
    # Files that do not state their task are of the train files' one.
    cfg = replace(cfg, task=train[0].task)
    dev = read_split(folder, "dev", cfg)
    test = () if find_questions(folder, "test", cfg.task) is None else read_split(folder, "test", cfg)
    name = train[0].task
    return People(f"lamp/{name}", {name: base.task(name, cfg.compat)}, train, dev, test)
