"""Stages of a method: each reads and writes named artefacts, and is skipped while nothing it depends on has changed.

    run_stages([Stage("expand", expand, (), ["prompts.jsonl"], {...}), Stage("distill", ...)], out / "stages")

    <folder>/<artefact>             a file or folder, written whole by the stage's function
    <folder>/records/<stage>.json   what it was made of and what it gave: settings, sha256 of both sides, seconds
    <folder>/work/<stage>/          what an unfinished stage has so far (checkpoints, say); begun on other settings or
                                    inputs it is removed, with a warning, and so it is when the stage ends

All processes call a stage's function; an artefact has to be written by rank zero only, or the same by all with
`persona.files.atomic_write`. To run a finished stage again, delete its record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from persona import heartbeat
from persona.errors import UserError
from persona.files import sha256, write_json

if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)
_PARTS = ("settings", "inputs", "outputs")


@dataclass(frozen=True)
class Stage:
    """`run` is called with the folder of all stages. `reads` and `writes` are paths below it (what no stage writes may
    also be absolute); `settings` are JSON values: everything else that `run` depends on."""

    name: str
    run: Callable[[Path], object]
    reads: Sequence[str]
    writes: Sequence[str]
    settings: Mapping[str, Any]


def run_stages(
    stages: Sequence[Stage], folder: Path, *, only: str | None = None, processes: PartialState | None = None
) -> None:
    """Run the stages that are not up to date, in their order, or `only` one of them.

    A stage is up to date when it has ended with these settings and these contents of what it reads, and what it wrote
    is still there unchanged. Raises UserError for an unknown `only` (naming the nearest), for `only` when a stage that
    it builds on is not up to date, for an input that does not exist; and whatever a stage raises, which then has not
    ended and runs again at the next start.
    """
    names = [stage.name for stage in stages]
    if only is not None and only not in names:
        near = get_close_matches(only, names, n=1, cutoff=0.0)[0]
        raise UserError(f"stage={only} is no stage; did you mean {near}? There are {', '.join(names)}")
    needed = names if only is None else _needed(stages, only)
    books = _Books(Path(folder))
    main = processes is None or processes.process_index == 0

    def wait() -> None:
        if processes:
            processes.wait_for_everyone()

    for stage in (stage for stage in stages if stage.name in needed):
        # Rank zero reads the disk and tells the others, so that all of them do the same.
        stale, missing = _told(books.state(stage) if main else None, processes)
        if stale and only not in (None, stage.name):
            raise UserError(f"stage={only} builds on stage {stage.name}, but {stale}: run stage={stage.name} first")
        if stale and missing:
            raise UserError(f"stage {stage.name} reads {books.folder / missing}, which does not exist")
        if not stale:
            if main:
                books.forget(stage)
                logger.info("stage %s: skipped, nothing has changed", stage.name)
            continue
        if main:
            books.begin(stage)
        wait()
        started, since = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        with heartbeat.stage(stage.name):
            stage.run(books.folder)
            wait()
        if main:
            seconds = time.monotonic() - since
            ran = {"started": started, "seconds": round(seconds, 3)}
            books.record(stage, {**ran, "processes": 1 if processes is None else processes.num_processes})
            logger.info("stage %s: done in %.0f s (%s)", stage.name, seconds, stale)
        wait()


def _told(state: tuple[str, str] | None, processes: PartialState | None) -> tuple[str, str]:
    told = [state]
    if processes is not None and processes.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(told)
    assert told[0] is not None
    return told[0]


def _needed(stages: Sequence[Stage], only: str) -> set[str]:
    """`only` and the stages before it that it builds on, directly or not."""
    needed = {only}
    for place in reversed(range(len(stages))):
        if stages[place].name in needed:
            needed |= {earlier.name for earlier in stages[:place] if _touch(stages[place].reads, earlier.writes)}
    return needed


def _touch(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a path of one side is a path of the other, or lies in it."""
    pairs = [(PurePath(one), PurePath(other)) for one in some for other in others]
    return any(one.is_relative_to(other) or other.is_relative_to(one) for one, other in pairs)


class _Books:
    """What is on disk: artefacts, whose files are read once for their hashes, and records."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._hashes = folder, dict[str, str | None]()

    def _hash(self, artefact: str) -> str | None:
        """sha256 of a file's content, or over names and contents in a folder; None where there is nothing."""
        if artefact not in self._hashes:
            path = self.folder / artefact
            self._hashes[artefact] = sha256(path) if path.is_file() else None
            if path.is_dir():
                files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
                listing = "".join(f"{sha256(file)} {name}\n" for name, file in files)
                self._hashes[artefact] = hashlib.sha256(listing.encode()).hexdigest()
        return self._hashes[artefact]

    def _made_of(self, stage: Stage) -> dict[str, Any]:
        settings = json.loads(json.dumps(dict(stage.settings)))
        return {"settings": settings, "inputs": {name: self._hash(name) for name in stage.reads}}

    def _record(self, stage: Stage) -> Path:
        return self.folder / "records" / f"{stage.name}.json"

    def _work(self, stage: Stage) -> tuple[Path, Path]:
        """The folder, and the note of what it was begun on."""
        return self.folder / "work" / stage.name, self.folder / "work" / f"{stage.name}.json"

    def state(self, stage: Stage) -> tuple[str, str]:
        """Why a stage is not up to date ("" when it is), and which input does not exist ("" for none)."""
        now, before = self._made_of(stage), _read(self._record(stage))
        missing = next((name for name, value in now["inputs"].items() if value is None), "")
        if not all(part in before for part in _PARTS):
            return "it has not run to its end", missing
        for kind, word in (("settings", "setting"), ("inputs", "input")):
            old, new = before[kind], now[kind]
            if changed := [key for key in {**old, **new} if old.get(key) != new.get(key)]:
                return f"its {word} {', '.join(changed)} has changed", missing
        for name in stage.writes:
            if before["outputs"].get(name, "") != self._hash(name):
                return f"{name} is not there as it was written", missing
        return "", missing

    def begin(self, stage: Stage) -> None:
        self._record(stage).unlink(missing_ok=True)
        (work, note), now = self._work(stage), self._made_of(stage)
        if work.exists() and _read(note) != now:
            logger.warning("stage %s: %s was begun on other settings or inputs and is removed", stage.name, work)
            shutil.rmtree(work)
        write_json(note, now)
        work.mkdir(exist_ok=True)

    def record(self, stage: Stage, ran: Mapping[str, Any]) -> None:
        made_of = self._made_of(stage)  # as it was when the stage began
        self._hashes = {name: value for name, value in self._hashes.items() if not _touch([name], stage.writes)}
        outputs = {name: self._hash(name) for name in stage.writes}
        if absent := [name for name, value in outputs.items() if value is None]:
            raise RuntimeError(f"stage {stage.name} ended without writing {', '.join(absent)}")
        write_json(self._record(stage), {"stage": stage.name, **made_of, "outputs": outputs, **ran})
        self.forget(stage)

    def forget(self, stage: Stage) -> None:
        work, note = self._work(stage)
        shutil.rmtree(work, ignore_errors=True)
        note.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a broken record is none
        return {}
    whole = isinstance(value, dict) and all(isinstance(value.get(key, {}), dict) for key in _PARTS)
    return value if whole else {}
