"""The three kinds of file a store is made of, each safe against a killed writer and a flipped bit.

- Append-only files (vectors, texts, histories): what counts is the length the manifest states. A killed append leaves
  bytes behind that length, which readers never look at and the next writer cuts off. Digests are kept per block.
- Key indexes: sorted segments (128-bit key → 64-bit value), written once, merged when two are of similar size, so
  there are at most log2(n) of them. They are searched where they lie, as memory maps.
- The manifest: replaced in one rename. It is the commit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from persona.errors import UserError
from persona.files import atomic_write

FORMAT = 1
MANIFEST = "store.json"
BLOCK_BYTES = 32 << 20
MERGE_ROWS = 1 << 18
ENTRY_BYTES = 24
RESIDENT_ENTRIES = 1 << 20  # larger segments give their pages back after each look-up
COLUMN = np.dtype("<u8")


def digest_keys(contents: Iterable[bytes]) -> np.ndarray:
    """[n, 2] uint64: a 128-bit BLAKE2b of each content. Among 10⁷ contents a collision has odds of 10⁻²⁵."""
    digests = b"".join(hashlib.blake2b(content, digest_size=16).digest() for content in contents)
    return np.frombuffer(digests, dtype=COLUMN).reshape(-1, 2)


def _hex(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class FileState:
    """An append-only file: committed length in bytes, and (end, digest) of consecutive blocks of it."""

    size: int = 0
    blocks: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class SegmentState:
    """One sorted segment of a key index."""

    name: str
    entries: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What the store holds. `encoder` is the fingerprint of the encoder its vectors come from, None for none."""

    dim: int
    dtype: str
    encoder: dict[str, str | int | bool] | None
    identity: str
    generation: int = 0
    rows: int = 0
    histories: int = 0
    files: dict[str, FileState] = field(default_factory=dict)
    indexes: dict[str, tuple[SegmentState, ...]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        body = {"format": FORMAT, **asdict(self)}
        checksum = _hex(json.dumps(body, sort_keys=True).encode())
        with atomic_write(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps({**body, "checksum": checksum}, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """None where there is no store. Raises UserError when the file is damaged or of another format version."""
        path = folder / MANIFEST
        try:
            body = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{path} could not be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged: it is not valid JSON ({error})") from error
        if not isinstance(body, dict) or "format" not in body:
            raise UserError(f"{path} is not the manifest of a history store")
        if body["format"] != FORMAT:
            raise UserError(f"{path} has format version {body['format']}; this program reads version {FORMAT}")
        checksum = body.pop("checksum", None)
        if checksum != _hex(json.dumps(body, sort_keys=True).encode()):
            raise UserError(f"{path} is damaged: its content does not fit its checksum")
        del body["format"]
        body["files"] = {
            name: FileState(state["size"], tuple((end, digest) for end, digest in state["blocks"]))
            for name, state in body["files"].items()
        }
        body["indexes"] = {
            name: tuple(SegmentState(**segment) for segment in segments) for name, segments in body["indexes"].items()
        }
        return cls(**body)


# --- append-only files ----------------------------------------------------------------------------


def append(path: Path, state: FileState, chunks: Iterable[bytes | memoryview]) -> FileState:
    """Write `chunks` behind the committed part, cutting off what a killed writer left there; synced."""
    try:
        with open(path, "r+b" if path.exists() else "x+b") as stream:
            stream.truncate(state.size)
            stream.seek(state.size)
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
            # The last block may be short: it is taken up again, so that many small appends do not make many blocks.
            blocks = list(state.blocks)
            start = blocks[-1][0] if blocks else 0
            if blocks and start - (blocks[-2][0] if len(blocks) > 1 else 0) < BLOCK_BYTES:
                blocks.pop()
                start = blocks[-1][0] if blocks else 0
            for begin in range(start, size, BLOCK_BYTES):
                stream.seek(begin)
                data = stream.read(min(BLOCK_BYTES, size - begin))
                blocks.append((begin + len(data), _hex(data)))
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror} (the store is as it was before)") from error
    return FileState(size, tuple(blocks))


def open_committed(path: Path, state: FileState) -> BinaryIO:
    """Open for reading. Raises UserError when the file is missing or shorter than was committed."""
    try:
        stream = open(path, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path}, a part of the store, could not be opened: {error.strerror}") from error
    size = os.fstat(stream.fileno()).st_size
    if size < state.size:
        stream.close()
        raise UserError(f"{path} is cut short: it holds {size} bytes where {MANIFEST} states {state.size}")
    return stream


def check_blocks(path: Path, stream: BinaryIO, state: FileState, checked: FileState | None = None) -> None:
    """Compare the committed part with its digests, without the blocks that were found right when it was `checked`.

    Raises UserError naming the file and the damaged block.
    """
    start = 0
    known = () if checked is None else checked.blocks
    for number, (end, digest) in enumerate(state.blocks):
        if known[number : number + 1] != ((end, digest),) and _hex(pread(stream, start, end - start)) != digest:
            raise UserError(f"{path} is damaged: bytes {start} to {end} do not fit their digest in {MANIFEST}")
        start = end


def pread(stream: BinaryIO, offset: int, count: int) -> bytes:
    """Exactly `count` bytes at `offset`, without moving a file position (safe in forked workers)."""
    parts = []
    while count:
        part = os.pread(stream.fileno(), count, offset)
        if not part:
            raise UserError(f"{stream.name} is cut short: nothing to read at byte {offset}")
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def pread_into(stream: BinaryIO, offset: int, target: memoryview) -> None:
    """Fill `target` from `offset` on."""
    descriptor = stream.fileno()
    while target:
        done = os.preadv(descriptor, [target], offset)
        if not done:
            raise UserError(f"{stream.name} is cut short: nothing to read at byte {offset}")
        target = target[done:]
        offset += done


# --- key indexes ----------------------------------------------------------------------------------


class Segment:
    """One sorted segment, mapped into memory: three columns of n (high half of the key, low half, value)."""

    def __init__(self, folder: Path, state: SegmentState) -> None:
        self.state = state
        self.path = folder / state.name
        with open(self.path, "rb") as stream:
            size, expected = os.fstat(stream.fileno()).st_size, state.entries * ENTRY_BYTES
            if size != expected:
                raise UserError(f"{self.path} holds {size} bytes where {MANIFEST} states {expected}")
            self._map = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        columns = np.frombuffer(self._map, dtype=COLUMN).reshape(3, state.entries)
        self.high, self.low, self.value = columns
        self._checked = False

    def check(self, again: bool = False) -> None:
        """Raises UserError when the file's bytes do not fit their digest. Done once, at the first look-up."""
        if self._checked and not again:
            return
        digest = hashlib.blake2b(digest_size=16)
        with memoryview(self._map) as view:
            for start in range(0, len(view), BLOCK_BYTES):
                digest.update(view[start : start + BLOCK_BYTES])
                self.release()
        if digest.hexdigest() != self.state.digest:
            raise UserError(f"{self.path} is damaged: its bytes do not fit their digest in {MANIFEST}")
        self._checked = True

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[m, 2] → [m] int64 values, -1 where the key is not here."""
        self.check()
        found = np.full(len(keys), -1, dtype=np.int64)
        at = np.searchsorted(self.high, keys[:, 0])
        left = np.arange(len(keys))
        # Two keys may share their high half, so go on to the right until it changes.
        while left.size:
            left = left[at[left] < self.state.entries]
            same = self.high[at[left]] == keys[left, 0]
            hit = same & (self.low[at[left]] == keys[left, 1])
            found[left[hit]] = self.value[at[left[hit]]]
            left = left[same & ~hit]
            at[left] += 1
        if self.state.entries > RESIDENT_ENTRIES:
            self.release()
        return found

    def release(self) -> None:
        """Give the mapped pages back: they would count as this process's resident memory."""
        self._map.madvise(mmap.MADV_DONTNEED)


class KeyIndex:
    """128-bit key → value, over all segments of one index."""

    def __init__(self, folder: Path, states: Sequence[SegmentState], old: KeyIndex | None = None) -> None:
        known: dict[SegmentState, Segment] = {} if old is None else {s.state: s for s in old.segments}
        self.segments: list[Segment] = [known.get(state) or Segment(folder, state) for state in states]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[m, 2] uint64 → [m] int64, -1 for an unknown key."""
        found = np.full(len(keys), -1, dtype=np.int64)
        for segment in self.segments:
            missing = np.flatnonzero(found < 0)
            if not missing.size:
                break
            found[missing] = segment.find(keys[missing])
        return found


def _write_segment(folder: Path, name: str, parts: Iterator[np.ndarray], entries: int) -> SegmentState:
    """`parts`: [3, m] arrays in key order, together `entries` wide."""
    with atomic_write(folder / name) as temporary:
        with open(temporary, "r+b") as stream:
            done = 0
            for part in parts:
                for column in range(3):
                    stream.seek((column * entries + done) * COLUMN.itemsize)
                    stream.write(np.ascontiguousarray(part[column], dtype=COLUMN).data)
                done += part.shape[1]
        with open(temporary, "rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return SegmentState(name, entries, digest)


def _merged(a: Segment, b: Segment) -> Iterator[np.ndarray]:
    """The entries of both, in order, a bounded number at a time."""
    start_a = start_b = 0
    while start_a < a.state.entries or start_b < b.state.entries:
        end_a, end_b = a.state.entries, b.state.entries
        if start_a + MERGE_ROWS < end_a:
            # Everything up to and including this high half, in both, so that equal ones are sorted together.
            bound = a.high[start_a + MERGE_ROWS]
            end_a, end_b = (int(np.searchsorted(segment.high, bound, side="right")) for segment in (a, b))
        columns = np.stack(
            [
                np.concatenate([x[start_a:end_a], y[start_b:end_b]])
                for x, y in ((a.high, b.high), (a.low, b.low), (a.value, b.value))
            ]
        )
        yield columns[:, np.lexsort((columns[1], columns[0]))]
        start_a, start_b = end_a, end_b
        a.release()
        b.release()


def add_keys(folder: Path, index: KeyIndex, label: str, keys: np.ndarray, values: np.ndarray) -> list[SegmentState]:
    """Write a new segment of keys that the index does not have; merge while the last is half the one before or more.

    `label` makes the file names unique to this commit. Returns the states of the index with them; old files stay.
    """
    columns = np.stack([keys[:, 0], keys[:, 1], values.astype(COLUMN)])
    columns = columns[:, np.lexsort((columns[1], columns[0]))]
    segments = list(index.segments)
    state = _write_segment(folder, f"{label}-0.index", iter([columns]), len(keys))
    segments.append(Segment(folder, state))
    step = 0
    while len(segments) > 1 and segments[-2].state.entries < 2 * segments[-1].state.entries:
        step += 1
        b, a = segments.pop(), segments.pop()
        a.check()
        entries = a.state.entries + b.state.entries
        segments.append(Segment(folder, _write_segment(folder, f"{label}-{step}.index", _merged(a, b), entries)))
    return [segment.state for segment in segments]


# --- the writer's lock ----------------------------------------------------------------------------


class StoreBusy(UserError):
    """Another process is writing; readers go on undisturbed."""


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """One writer at a time; the kernel gives the lock back when its holder dies. Raises UserError when it is taken."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = [path.name for path in folder.iterdir() if path.name != "lock"]
        if strangers and not (folder / MANIFEST).exists() and not (folder / "lock").exists():
            raise UserError(f"{folder} is not a history store and holds {strangers[0]}; name another folder")
        stream = open(folder / "lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} could not be written to: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise StoreBusy(f"{folder} is being written by {holder}; wait until it is done or stop it") from error
        stream.seek(0)
        stream.truncate()
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def clean(folder: Path, manifest: Manifest | None) -> None:
    """Remove index segments and temporary files that no manifest names: a killed writer's. Only under the lock."""
    named = {segment.name for segments in manifest.indexes.values() for segment in segments} if manifest else set()
    for path in folder.iterdir():
        if path.suffix == ".tmp" and path.is_dir():
            shutil.rmtree(path)
        elif path.suffix == ".tmp" or (path.suffix == ".index" and path.name not in named):
            path.unlink()


def updated(manifest: Manifest, **changes: Any) -> Manifest:
    """The next generation."""
    return replace(manifest, generation=manifest.generation + 1, **changes)
