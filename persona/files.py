"""Files appear whole or not at all: write beside the target, fsync, rename. Lines that are appended survive a kill.

A writer that was killed leaves its temporary file; the next process that writes in that folder removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from persona.errors import UserError


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Temporary files say whose they are, so that one of a process that is no more can be told from one being written.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(rf"\..+\.(\d+)-{_HOST}\.[^.]*\.tmp")
_swept: set[tuple[int, Path]] = set()


def _prefix(target: Path) -> str:
    """How the name of a temporary file or folder beside `target` begins.

    Once a process and folder, what killed processes of this machine left there is removed; others' may be alive.
    """
    folder = target.parent.absolute()
    if (os.getpid(), folder) not in _swept:
        _swept.add((os.getpid(), folder))
        for name in os.listdir(folder):
            if (match := _TEMPORARY.fullmatch(name)) and not psutil.pid_exists(int(match[1])):
                left = folder / name
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return f".{target.name}.{os.getpid()}-{_HOST}."


# safetensors reports a full disk as an error of its own.
_FAILURES = (OSError, SafetensorError)


def _explain(error: Exception, target: Path) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{target} could not be written: {reason} (what stood there before is unchanged)")


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed onto `path`.

    Raises UserError when the disk is full or the folder may not be written; `path` then keeps its old content.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".tmp", _prefix(path), path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_umask())  # mkstemp keeps others out; a result is an ordinary file
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except _FAILURES as error:
        raise _explain(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; on success its files are synced and it takes the name.

    An existing `folder` is replaced only after the new one is complete. Raises UserError as `atomic_write` does.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(".tmp", _prefix(folder), folder.parent))
        os.chmod(temporary, 0o755)
    except OSError as error:
        raise _explain(error, folder) from error
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors keeps others out as mkstemp does
                _sync(file)
        # A rename cannot replace a folder that holds files, so the old one steps aside first.
        old = folder.with_name(f".{folder.name}.old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            try:
                os.rename(temporary, folder)
            except OSError:
                os.rename(old, folder)
                raise
        else:
            os.rename(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)  # also that of a process that was killed just here
        _sync(folder.parent)
    except _FAILURES as error:
        raise _explain(error, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def inside(folder: Path | str, name: str) -> Path:
    """`folder / name`, for names that a file or a data set gives. Raises UserError for one that leads out of `folder`,
    by "..", as an absolute path or over a link."""
    folder = Path(folder)
    path = (folder / name).resolve()
    if path == folder.resolve() or not path.is_relative_to(folder.resolve()):
        raise UserError(f"{folder} holds no file {name!r}: that lies outside of it")
    return folder / name


def sha256(path: Path | str) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` to `path` whole or not at all. Raises UserError as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def write_lines(path: Path | str, rows: Iterable[Any]) -> None:
    """Write `rows`, one JSON value a line, whole or not at all. Raises UserError as `atomic_write` does."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON values of a file of lines, which need not exist; a torn last line (no newline: the writer was killed)
    is passed over. Raises UserError naming file and line for any other line that is not JSON."""
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is not valid JSON ({error}).") from error


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON object in a file that says what other files are made of. Raises UserError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is no UTF-8
        raise UserError(f"{path} is damaged, it is not valid JSON ({error}): restore or delete it") from error
    return value if isinstance(value, dict) else {}


class LineWriter:
    """Appends lines to a file: a written line survives the death of the process, a synced one the machine's.

    A torn last line of a writer that was killed is cut off first. Raises UserError where the disk does not take it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._drop_torn_line()
        except OSError as error:
            raise UserError(f"{path} cannot be opened for writing: {error.strerror}.") from error

    def _drop_torn_line(self) -> None:
        content = self._path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self._path, content.rfind(b"\n") + 1)

    def write(self, line: bytes) -> None:
        """Append one line, given with its newline."""
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            raise UserError(f"{self._path} could not be extended: {error.strerror}; its rows are kept.") from error

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
