"""Filling a `HistoryStore`: which texts are new, their vectors, one commit a chunk. Runs under the writer's lock."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from persona.errors import UserError
from persona.progress import Bar
from persona.store import disk
from persona.store.disk import FileState, KeyIndex, Manifest

if TYPE_CHECKING:
    from persona.store.history import HistoryStore

DTYPES = ("float16", "float32")
FILES = ("vectors", "texts", "text_ends", "histories")
# References of histories that wait for one commit, at most, when few of their texts are new.
MAX_WAITING = 1 << 18


@dataclass(frozen=True, slots=True)
class Added:
    """What one call of `add` did: histories and texts that were new, and those that the store had already."""

    histories: int
    texts: int
    known_histories: int
    known_texts: int


def _utf8(text: str, where: str) -> bytes:
    if not isinstance(text, str):
        raise UserError(f"{where} is {type(text).__name__} {text!r:.60}; it has to be a string")
    return text.encode("utf-8", "surrogatepass")


class Writer:
    """One call of `add` or `add_vectors`. `chunk`: new texts a commit."""

    def __init__(self, store: HistoryStore, bar: Bar, chunk: int) -> None:
        self.store = store
        self.bar = bar
        self.chunk = chunk
        store.refresh()
        disk.clean(store.folder, store.manifest)
        # What waits for the next commit: new texts by key, and histories as keys of their texts.
        self.texts: dict[bytes, bytes] = {}
        self.histories: dict[bytes, tuple[str, list[bytes]]] = {}
        self.waiting = 0
        self.seen = self.n_histories = self.n_texts = self.known_histories = self.known_texts = 0

    def add(self, histories: Iterable[tuple[str, Sequence[str]]]) -> Added:
        window: list[tuple[str, list[bytes], list[bytes]]] = []
        size = 0
        for key, texts in histories:
            if isinstance(texts, str):
                raise UserError(f"history {key!r} is one string; it has to be a list of texts")
            contents = [_utf8(text, f"item {place} of history {key!r}") for place, text in enumerate(texts)]
            digests = disk.digest_keys(contents).tobytes()
            window.append((key, contents, [digests[i : i + 16] for i in range(0, len(digests), 16)]))
            size += len(contents) + 1
            if size >= self.chunk:
                self._take(window)
                window, size = [], 0
        self._take(window)
        self._commit()
        return Added(self.n_histories, self.n_texts, self.known_histories, self.known_texts)

    def _take(self, window: list[tuple[str, list[bytes], list[bytes]]]) -> None:
        """Sort what was read into known and new; commit when enough waits."""
        store = self.store
        digests = list(dict.fromkeys(digest for _, _, keys in window for digest in keys))
        rows = dict(zip(digests, self._find("items", digests).tolist(), strict=True))
        users = [disk.digest_keys([_utf8(key, "a history's key")]).tobytes() for key, _, _ in window]
        positions = self._find("users", users)
        for (key, contents, keys), user, position in zip(window, users, positions.tolist(), strict=True):
            if position >= 0 or user in self.histories:
                if position >= 0:
                    same = store.rows(key).tolist() == [rows[digest] for digest in keys]
                else:
                    same = self.histories[user][1] == keys
                if not same:
                    raise UserError(f"{store.folder} already has another history under the key {key!r}; use a new key")
                self.known_histories += 1
                self.seen += 1
                continue
            for content, digest in zip(contents, keys, strict=True):
                if rows[digest] < 0 and digest not in self.texts:
                    self.texts[digest] = content
                else:
                    self.known_texts += 1
            self.histories[user] = (key, keys)
            self.waiting += len(keys)
            # A history longer than a chunk waits for more of its texts than one commit takes.
            if len(self.texts) >= self.chunk or self.waiting >= MAX_WAITING:
                self._commit()
                rows.update(zip(digests, self._find("items", digests).tolist(), strict=True))
        self.bar.set(self.seen)

    def _find(self, index: str, keys: Sequence[bytes]) -> np.ndarray:
        if index not in self.store._indexes or not keys:
            return np.full(len(keys), -1, dtype=np.int64)
        return self.store._indexes[index].find(np.frombuffer(b"".join(keys), dtype=disk.COLUMN).reshape(-1, 2))

    def _commit(self) -> None:
        """Encode the new texts, `chunk` at a time, then record the histories that waited for them."""
        items = list(self.texts.items())
        for start in range(0, len(items), self.chunk):
            part = items[start : start + self.chunk]
            vectors = self._encode([content for _, content in part], start, len(items))
            last = start + self.chunk >= len(items)
            self._append([digest for digest, _ in part], [content for _, content in part], vectors, last)
        if not items and self.histories:
            self._append([], [], None, True)
        self.n_texts += len(items)
        self.n_histories += len(self.histories)
        self.seen += len(self.histories)
        self.texts, self.histories, self.waiting = {}, {}, 0
        self.bar.set(self.seen, f"{self.n_texts:,} new texts")

    def _encode(self, contents: list[bytes], done: int, total: int) -> np.ndarray:
        encoder = self.store.encoder
        texts = [content.decode("utf-8", "surrogatepass") for content in contents]
        if encoder is None:
            raise UserError(f"{texts[0]!r:.80} is not in {self.store.folder}, and no encoder was given to encode it")

        def on_batch(n: int) -> None:
            share = (done + n) / total
            self.bar.set(self.seen + share * len(self.histories), f"{self.n_texts + done + n:,} new texts")

        return encoder.encode(texts, on_batch=on_batch)

    def add_vectors(self, texts: Sequence[str], vectors: np.ndarray) -> int:
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise UserError(f"{len(texts)} texts need vectors of shape [{len(texts)}, d], not {list(vectors.shape)}")
        manifest, encoder = self.store.manifest, self.store.encoder
        if manifest is not None and manifest.encoder is not None and encoder is None:
            name = manifest.encoder["name"]
            raise UserError(f"{self.store.folder} was made with the encoder {name}, needed to add ready-made vectors")
        contents = [_utf8(text, f"text {place}") for place, text in enumerate(texts)]
        digests = disk.digest_keys(contents).tobytes()
        first: dict[bytes, int] = {}
        for place in range(len(contents)):
            first.setdefault(digests[16 * place : 16 * place + 16], place)
        keys = list(first)
        new = [keys[i] for i in np.flatnonzero(self._find("items", keys) < 0)]
        if new:
            places = [first[key] for key in new]
            self._append(new, [contents[place] for place in places], vectors[places], False)
        return len(new)

    def _append(self, keys: list[bytes], contents: list[bytes], vectors: np.ndarray | None, histories: bool) -> None:
        """One commit: everything is on disk before the manifest that names it replaces the old one."""
        store, folder = self.store, self.store.folder
        manifest = store.manifest or self._new(vectors)
        files = dict(manifest.files)
        indexes = dict(manifest.indexes)
        label = f"{manifest.generation + 1:08d}"

        def append(name: str, *parts: bytes | memoryview) -> None:
            files[name] = disk.append(folder / f"{name}.bin", files.get(name, FileState()), parts)

        def index(name: str, new_keys: Sequence[bytes], values: np.ndarray) -> None:
            array = np.frombuffer(b"".join(new_keys), dtype=disk.COLUMN).reshape(-1, 2)
            old = store._indexes.get(name) or KeyIndex(folder, ())
            indexes[name] = tuple(disk.add_keys(folder, old, f"{name}-{label}", array, values))

        if vectors is not None:
            rounded = self._rounded(manifest, vectors, contents)
            start = files.get("texts", FileState()).size
            ends = start + np.cumsum([len(content) for content in contents], dtype="<i8")
            append("vectors", rounded.data.cast("B"))
            append("texts", b"".join(contents))
            append("text_ends", ends.tobytes())
            index("items", keys, manifest.rows + np.arange(len(keys)))
        n_histories = manifest.histories
        if histories and self.histories:
            positions, records = [], []
            position = files.get("histories", FileState()).size
            digests = list(dict.fromkeys(digest for _, digests in self.histories.values() for digest in digests))
            rows = dict(zip(digests, self._find("items", digests).tolist(), strict=True))
            rows |= {key: manifest.rows + i for i, key in enumerate(keys)}
            for _, texts in self.histories.values():
                record = np.array([len(texts), *(rows[digest] for digest in texts)], dtype="<i8").tobytes()
                positions.append(position)
                records.append(record)
                position += len(record)
            append("histories", *records)
            index("users", list(self.histories), np.array(positions, dtype=np.int64))
            n_histories += len(positions)
        after = disk.updated(
            manifest, rows=manifest.rows + len(keys), histories=n_histories, files=files, indexes=indexes
        )
        after.save(folder)
        store._adopt(after)
        disk.clean(folder, after)

    def _new(self, vectors: np.ndarray | None) -> Manifest:
        encoder = self.store.encoder
        if encoder is not None:
            dim = encoder.dim
        elif vectors is not None:
            dim = vectors.shape[1]
        else:
            raise UserError(f"{self.store.folder} is new and no encoder was given, so its vectors' width is not known")
        return Manifest(
            dim=dim,
            dtype=self.store._dtype or DTYPES[0],
            encoder=None if encoder is None else encoder.fingerprint,
            identity=uuid.uuid4().hex,
        )

    def _rounded(self, manifest: Manifest, vectors: np.ndarray, contents: list[bytes]) -> np.ndarray:
        if vectors.shape[1] != manifest.dim:
            raise UserError(f"{self.store.folder} holds vectors of width {manifest.dim}, not {vectors.shape[1]}")
        with np.errstate(over="ignore"):
            rounded = np.ascontiguousarray(vectors, dtype=manifest.dtype)
        wrong = np.flatnonzero(~np.isfinite(rounded).all(axis=1))
        if wrong.size:
            text = contents[wrong[0]].decode("utf-8", "replace")
            raise UserError(f"the vector of {text!r:.80} is not finite in {manifest.dtype}")
        return rounded
