"""Rows of JSON files, one at a time, with exact complaints: which file, which row, which byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import orjson

from persona.errors import UserError

CHUNK = 1 << 16  # bytes


def check_folder(folder: Path, key: str, should: str) -> None:
    """Raise UserError when `folder`, given as the config's `key`, is no folder or may not be read."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UserError(f"{key} {folder} could not be read: {error.strerror}; it should be {should}") from error


def open_file(path: Path) -> BinaryIO:
    """Open for reading; raises UserError when the file is missing, a folder, or may not be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}") from error


def _reason(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return text.strip().split("\n")[0].strip()


def _locate(path: Path, prefix: str, chunk_start: int) -> UserError:
    """Parse a file known to be broken in the chunk at `chunk_start` again, byte by byte there, for the exact place."""
    rows = ijson.sendable_list()
    parser = ijson.items_coro(rows, prefix, use_float=True)
    seen, offset = 0, 0
    with open_file(path) as stream:
        try:
            while block := stream.read(CHUNK if offset < chunk_start else 1):
                parser.send(block)
                offset += len(block)
                seen += len(rows)
                rows.clear()
            parser.close()
        except ijson.JSONError as error:
            where = f"in row {seen + 1} (counted from 1), at byte {offset}"
            if not stream.read(1) and "EOF" in _reason(error):
                return UserError(f"{path} is cut off {where}: the file ends before its JSON does")
            return UserError(f"{path} holds broken JSON {where}: {_reason(error)}")
    raise AssertionError(f"{path} changed while it was read")


def read_json(path: Path, prefix: str) -> Iterator[tuple[int, Any, int]]:
    """Values at `prefix` (ijson's notation; "item" are the elements of a list at the top) of a JSON file of any size.

    Yields (row counted from 1, value, bytes read so far). Raises UserError with file, row and byte offset where the
    JSON is broken or cut off, or when the file cannot be read.
    """
    rows = ijson.sendable_list()
    parser = ijson.items_coro(rows, prefix, use_float=True)
    count, offset = 0, 0
    with open_file(path) as stream:
        while True:
            block = stream.read(CHUNK)
            try:
                if block:
                    parser.send(block)
                else:
                    parser.close()
            except ijson.JSONError as error:
                raise _locate(path, prefix, offset) from error
            offset += len(block)
            for value in rows:
                count += 1
                yield count, value, offset
            rows.clear()
            if not block:
                return


def read_jsonl(path: Path, loads: Callable[[bytes], Any] = orjson.loads) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Objects of a file with one JSON object per line; blank lines are skipped. `loads=json.loads` also reads NaN.

    Yields (line counted from 1, object, bytes read so far). Raises UserError with file, line and column.
    """
    offset = 0
    with open_file(path) as stream:
        for number, line in enumerate(stream, start=1):
            offset += len(line)
            if not line.strip():
                continue
            try:
                value = loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path} holds broken JSON in line {number}, column {error.colno}: {error.msg}"
                ) from error
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number} is {value!r:.60}, where a JSON object should be")
            yield number, value, offset


def field(row: Any, name: str, where: str) -> str:
    """The field `name` of a row as a string (numbers are written out); raises UserError naming `where` if missing."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is {row!r:.60}, where a JSON object should be")
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        found = f"has {value!r:.60} as" if name in row else "has no"
        raise UserError(f"{where} {found} field {name!r}, which should be a string (fields: {', '.join(row)})")
    return str(value)


def first_few(values: Sequence[str], number: int = 3) -> str:
    """`values` for a sentence: the first few, and how many more there are."""
    more = f" and {len(values) - number} more" if len(values) > number else ""
    return ", ".join(values[:number]) + more
