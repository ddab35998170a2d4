"""People, their history items and samples as Arrow files on disk, and lazy views over them.

Files of gigabytes never lie in memory: a reader writes rows through `TableWriter` as it meets them, and `Samples`
hands out `Sample`s whose `persona.history` is a `History`, a view that fetches items when they are asked for. Views
pickle as a path and numbers, so worker processes open the files for themselves.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import orjson
import pyarrow as pa
from filelock import FileLock

from persona.errors import UserError
from persona.files import atomic_folder
from persona.progress import Bar
from persona.types import HistoryItem, Message, Persona, Sample

FORMAT = 1  # part of every cache key: raise it whenever a schema or a reader changes what is written

ITEMS = pa.schema([("id", pa.large_string()), ("text", pa.large_string()), ("label", pa.large_string()),
                   ("date", pa.large_string())])  # fmt: skip
PEOPLE = pa.schema([("id", pa.large_string()), ("description", pa.large_string()),
                    ("statements", pa.list_(pa.string())),
                    ("attributes", pa.map_(pa.string(), pa.string())),
                    ("start", pa.int64()), ("stop", pa.int64())])  # fmt: skip
SAMPLES = pa.schema([("id", pa.large_string()), ("roles", pa.list_(pa.string())),
                     ("contents", pa.list_(pa.large_string())), ("target", pa.large_string()),
                     ("options", pa.list_(pa.string())), ("task", pa.string()), ("person", pa.int64()),
                     ("selection", pa.list_(pa.int64()))])  # fmt: skip
SCHEMAS = {"items": ITEMS, "people": PEOPLE, "samples": SAMPLES}
BATCH_ROWS = 10_000
BATCH_CHARACTERS = 16_000_000


class _Rows:
    """Rows of one Arrow file, written in batches bounded by rows and by characters of text."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.stream = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_file(self.stream, schema)
        self.rows: list[dict[str, Any]] = []
        self.characters = 0
        self.count = 0

    def append(self, row: dict[str, Any], characters: int) -> int:
        self.rows.append(row)
        self.characters += characters
        self.count += 1
        if len(self.rows) >= BATCH_ROWS or self.characters >= BATCH_CHARACTERS:
            self.flush()
        return self.count - 1

    def flush(self) -> None:
        if self.rows:
            self.writer.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows, self.characters = [], 0

    def close(self) -> None:
        self.flush()
        self.writer.close()
        self.stream.close()


class TableWriter:
    """Writes items.arrow, people.arrow and samples.arrow into `folder`. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._rows = {name: _Rows(folder / f"{name}.arrow", schema) for name, schema in SCHEMAS.items()}

    def person(
        self,
        id: str,
        history: Sequence[HistoryItem],
        description: str = "",
        statements: Sequence[str] = (),
        attributes: Mapping[str, str] | None = None,
    ) -> int:
        """Append a person with their items, in order; returns the person's row."""
        start = self._rows["items"].count
        for item in history:
            fields = {"id": item.id, "text": item.text, "label": item.label, "date": item.date}
            self._rows["items"].append(fields, len(item.text) + len(item.label or ""))
        row: dict[str, Any] = {
            "id": id,
            "description": description,
            "statements": list(statements),
            "attributes": list((attributes or {}).items()),
            "start": start,
            "stop": start + len(history),
        }
        return self._rows["people"].append(row, len(description) + sum(map(len, statements)))

    def sample(
        self,
        id: str,
        messages: Sequence[Message],
        target: str,
        task: str,
        person: int | None,
        selection: Sequence[int] | None = None,
        options: Sequence[str] | None = None,
    ) -> int:
        """Append a sample; `selection` picks items of the person by position (None: all). Returns the sample's row."""
        row = {
            "id": id,
            "roles": [message.role for message in messages],
            "contents": [message.content for message in messages],
            "target": target,
            "options": None if options is None else list(options),
            "task": task,
            "person": person,
            "selection": None if selection is None else list(selection),
        }
        return self._rows["samples"].append(row, sum(len(message.content) for message in messages) + len(target))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for rows in self._rows.values():
            rows.close()


def cached_table(
    cache: Path, sources: Sequence[Path], name: str, build: Callable[[TableWriter, Callable[[int], None]], dict]
) -> tuple[Path, dict]:
    """The folder of Arrow files made from `sources`, built by `build(writer, advance)` unless it is there already.

    The folder's name is a digest of the format, `name`, and path, size and modification time of every source, so a
    changed source is read anew. `build` reports the byte it has reached in the first source to `advance` and returns
    facts to keep, which are returned with the folder. Several processes may ask at once: one builds, the others wait.
    """
    state = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    digest = hashlib.sha256(orjson.dumps([FORMAT, name, state])).hexdigest()[:20]
    folder = cache / f"{name.replace(' ', '-')}-{digest}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f".{folder.name}.lock")
        with lock:
            if not (folder / "facts.json").exists():
                _build(folder, sources[0], build)
        return folder, orjson.loads((folder / "facts.json").read_bytes())
    except PermissionError as error:
        raise UserError(
            f"data.cache {cache} could not be used: {error.strerror}; it should be a folder that may be written"
        ) from error


def _build(folder: Path, source: Path, build: Callable[[TableWriter, Callable[[int], None]], dict]) -> None:
    size = source.stat().st_size
    with atomic_folder(folder) as temporary, Bar(f"reading {source.name} (bytes)", size) as bar:
        with TableWriter(temporary) as writer:
            facts = build(writer, bar.set)
        (temporary / "facts.json").write_bytes(orjson.dumps(facts))


@functools.lru_cache(maxsize=64)
def _open(path: str, inode: int) -> pa.Table:
    # The inode is part of the key, so that a folder that was replaced is opened anew.
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def _table(folder: str, name: str) -> pa.Table:
    path = os.path.join(folder, f"{name}.arrow")
    return _open(path, os.stat(path).st_ino)


class History(Sequence[HistoryItem]):
    """Items `start` .. `stop` of a folder's items.arrow, or a selection among them by position."""

    def __init__(self, folder: str, start: int, stop: int, selection: tuple[int, ...] | None = None) -> None:
        self._key = (folder, start, stop, selection)
        self._items = _table(folder, "items")

    def __len__(self) -> int:
        _, start, stop, selection = self._key
        return stop - start if selection is None else len(selection)

    def _rows(self, first: int, last: int) -> list[HistoryItem]:
        columns = self._items.slice(first, last - first).to_pydict()
        return [HistoryItem(*row) for row in zip(*(columns[name] for name in ITEMS.names), strict=True)]

    def __iter__(self) -> Iterator[HistoryItem]:
        _, start, stop, selection = self._key
        if selection is not None:
            return (self._rows(start + index, start + index + 1)[0] for index in selection)
        return iter(self._rows(start, stop))

    @overload
    def __getitem__(self, index: int) -> HistoryItem: ...
    @overload
    def __getitem__(self, index: slice) -> list[HistoryItem]: ...
    def __getitem__(self, index: int | slice) -> HistoryItem | list[HistoryItem]:
        _, start, _, selection = self._key
        positions = range(len(self))[index]
        if isinstance(positions, int):
            row = start + (positions if selection is None else selection[positions])
            return self._rows(row, row + 1)[0]
        if selection is None and positions.step == 1:
            return self._rows(start + positions.start, start + max(positions.start, positions.stop))
        return [self[position] for position in positions]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, History) and self._key == other._key:
            return True
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple:
        return History, self._key

    def __repr__(self) -> str:
        return f"History({len(self)} items of {self._key[0]})"


class Samples(Sequence[Sample]):
    """The samples of a folder written by `TableWriter`, the first `limit` of them (None: all)."""

    def __init__(self, folder: str, limit: int | None = None) -> None:
        self._key = (folder, limit)
        self._samples = _table(folder, "samples")
        self._people = _table(folder, "people")
        self._length = len(self._samples) if limit is None else min(limit, len(self._samples))

    def __len__(self) -> int:
        return self._length

    def _sample(self, index: int) -> Sample:
        row = self._samples.slice(index, 1).to_pylist()[0]
        return Sample(
            id=row["id"],
            messages=tuple(map(Message, row["roles"], row["contents"])),
            target=row["target"],
            persona=None if row["person"] is None else self._persona(row["person"], row["selection"]),
            options=None if row["options"] is None else tuple(row["options"]),
            task=row["task"],
        )

    def _persona(self, index: int, selection: list[int] | None) -> Persona:
        row = self._people.slice(index, 1).to_pylist()[0]
        chosen = None if selection is None else tuple(selection)
        return Persona(
            id=row["id"],
            description=row["description"],
            statements=tuple(row["statements"]),
            attributes=dict(row["attributes"]),
            history=History(self._key[0], row["start"], row["stop"], chosen),
        )

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        positions = range(self._length)[index]
        return self._sample(positions) if isinstance(positions, int) else [self._sample(row) for row in positions]

    def __iter__(self) -> Iterator[Sample]:
        return map(self._sample, range(self._length))

    def __reduce__(self) -> tuple:
        return Samples, self._key
