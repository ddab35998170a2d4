"""`HistoryStore`: which items each user has, and one vector for each different item, on disk.

Built once (`add`), then read by training and inference alike: the rounded numbers on disk are the truth for both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona.encoders import Encoder
from persona.errors import UserError
from persona.progress import Bar
from persona.store import disk, search
from persona.store.disk import FileState, KeyIndex, Manifest
from persona.store.writer import DTYPES, FILES, Added, Writer

INDEXES = ("items", "users")
PIECE_ROWS = 4096  # rows read together: bounds what reading needs beside its result
RECORD_HEAD = 64  # items read together with a history's length: most histories need one read


def history_key(persona_id: str, texts: Sequence[str]) -> str:
    """The key of one user's history: it changes when an item does, and when their order does."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(disk.digest_keys([text.encode("utf-8", "surrogatepass")]).tobytes())
    return f"{persona_id}:{digest.hexdigest()}"


def as_stored(vectors: np.ndarray, dtype: str = "float16") -> np.ndarray:
    """float32 [n, d] → float32 [n, d], rounded as the store rounds (float16: half a unit in 2¹¹ of each number)."""
    return vectors.astype(dtype).astype(np.float32)


class HistoryStore:
    """A store in `folder`, opened as it is now; without one there, it is new and the first `add` creates it.

    `encoder` makes the vectors of new texts; with one, a store made by another is refused. `dtype` ("float16" or
    "float32"; None: the store's own, float16 for a new one) is that of the vectors on disk. An opened store is a
    snapshot: what others append later shows after `refresh()`. It may be used in forked and in spawned workers.
    Raises UserError when the folder's store is damaged, or made with another encoder or dtype.
    """

    def __init__(self, folder: Path | str, encoder: Encoder | None = None, dtype: str | None = None) -> None:
        self.folder = Path(folder)
        self.encoder = encoder
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} of the store is not one of {', '.join(DTYPES)}")
        self._dtype = dtype
        self.manifest: Manifest | None = None
        self._streams: dict[str, Any] = {}
        self._indexes: dict[str, KeyIndex] = {}
        self._histories_checked: FileState | None = None
        self._ivf: tuple[Any, int] | None = None
        self.refresh()

    def __reduce__(self) -> tuple[type[HistoryStore], tuple[Path]]:
        # A worker process opens its own descriptors; it reads and has no need of the encoder.
        return HistoryStore, (self.folder,)

    # --- opening ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """See what is committed by now."""
        for _ in range(5):
            manifest = Manifest.load(self.folder)
            if manifest is None:
                return
            try:
                self._adopt(manifest)
                return
            except FileNotFoundError as error:
                # A writer may have merged index segments between our two looks; then the manifest is a newer one.
                missing = error.filename
        raise UserError(f"{missing}, which {self.folder / disk.MANIFEST} names, is missing from the store")

    def _adopt(self, manifest: Manifest) -> None:
        if self.encoder is not None:
            _same_encoder(self.folder, manifest.encoder, self.encoder.fingerprint)
        if self._dtype is not None and manifest.dtype != self._dtype:
            raise UserError(f"{self.folder} holds {manifest.dtype} vectors, not {self._dtype}")
        streams = {
            name: disk.open_committed(self.folder / f"{name}.bin", manifest.files[name])
            for name in FILES
            if name in manifest.files
        }
        indexes = {
            name: KeyIndex(self.folder, manifest.indexes[name], self._indexes.get(name))
            for name in INDEXES
            if name in manifest.indexes
        }
        for stream in self._streams.values():
            stream.close()
        self.manifest, self._streams, self._indexes = manifest, streams, indexes

    def _opened(self) -> Manifest:
        if self.manifest is None:
            raise UserError(f"there is no history store in {self.folder}")
        return self.manifest

    @property
    def dim(self) -> int:
        return self._opened().dim

    @property
    def identity(self) -> str:
        """Names this store and no other; an index built of it bears it too."""
        return self._opened().identity

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._opened().dtype)

    def __len__(self) -> int:
        """How many different items it holds."""
        return 0 if self.manifest is None else self.manifest.rows

    @property
    def n_histories(self) -> int:
        return 0 if self.manifest is None else self.manifest.histories

    # --- writing ----------------------------------------------------------------------------------

    def add(
        self, histories: Iterable[tuple[str, Sequence[str]]], *, progress: bool = True, chunk: int = 4096
    ) -> Added:
        """Record (key, texts) histories, encoding the texts that are new.

        Every `chunk` new texts are one commit, so a killed call loses at most those: call it again with the same
        histories and it goes on. Keys are any strings (`history_key`). Raises UserError when a key is there already
        with other texts, when new texts need an encoder and there is none, and when another process is writing.
        """
        total = len(histories) if isinstance(histories, Sized) else None
        with disk.write_lock(self.folder), Bar("histories", total, progress) as bar:
            return Writer(self, bar, chunk).add(histories)

    def add_vectors(self, texts: Sequence[str], vectors: np.ndarray) -> int:
        """Store `vectors` [n, d] as those of `texts` in one commit, without encoding; returns how many were new.

        For vectors made elsewhere and for synthetic ones; a text that is there already keeps its vector. Raises
        UserError on another number or width of vectors, and on numbers the dtype cannot hold.
        """
        with disk.write_lock(self.folder):
            return Writer(self, Bar("", None, False), chunk=1).add_vectors(texts, vectors)

    # --- reading ----------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        return "users" in self._indexes and self._positions([key])[0] >= 0

    def _positions(self, keys: Sequence[str]) -> np.ndarray:
        return self._indexes["users"].find(disk.digest_keys(key.encode("utf-8", "surrogatepass") for key in keys))

    def rows(self, key: str) -> np.ndarray:
        """int64 [n]: the rows of one history's items, in the order they were added. Raises UserError if unknown."""
        return self.rows_of([key])[0]

    def rows_of(self, keys: Sequence[str]) -> list[np.ndarray]:
        """`rows` for several keys at once."""
        manifest = self._opened()
        if "users" not in self._indexes:
            raise UserError(f"{self.folder} holds vectors but no history yet; add the histories first")
        stream, state = self._streams["histories"], manifest.files["histories"]
        if self._histories_checked != state:
            disk.check_blocks(self.folder / "histories.bin", stream, state, self._histories_checked)
            self._histories_checked = state
        result = []
        for key, position in zip(keys, self._positions(keys), strict=True):
            if position < 0:
                raise UserError(f"{self.folder} has no history under the key {key!r}; add it first")
            head = disk.pread(stream, int(position), min(8 * (RECORD_HEAD + 1), state.size - int(position)))
            count = int.from_bytes(head[:8], "little")
            if count > RECORD_HEAD:
                head += disk.pread(stream, int(position) + len(head), 8 * (count + 1) - len(head))
            result.append(np.frombuffer(head, dtype="<i8", offset=8, count=count))
        return result

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [n]: the row of each text, -1 where the store does not have it."""
        if "items" not in self._indexes:
            return np.full(len(texts), -1, dtype=np.int64)
        return self._indexes["items"].find(disk.digest_keys(text.encode("utf-8", "surrogatepass") for text in texts))

    def read(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """float32 [n, d]: the vectors of `rows`. They are read, not mapped: mapped pages would count as memory used.

        Neighbours are read in one call, and what is asked for twice among a few thousand rows is read once. Raises
        UserError on a row that is not there.
        """
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        self._read_into(np.asarray(rows, dtype=np.int64), out, np.arange(len(rows)))
        return out

    def _read_into(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """out[places[i]] = vector of rows[i], in pieces, so that only `out` grows with their number."""
        manifest = self._opened()
        wrong = rows[(rows < 0) | (rows >= manifest.rows)]
        if wrong.size:
            raise UserError(f"{self.folder} has no row {wrong[0]}; it has rows 0 to {manifest.rows - 1}")
        for start in range(0, len(rows), PIECE_ROWS):
            piece = slice(start, start + PIECE_ROWS)
            out[places[piece]] = self._read_piece(rows[piece])

    def _read_piece(self, rows: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(rows, return_inverse=True)
        buffer = np.empty((len(unique), self.dim), dtype=self.dtype)
        target, width = buffer.data.cast("B"), buffer.itemsize * self.dim
        starts = np.flatnonzero(np.diff(unique, prepend=unique[0] - 2) != 1)
        ends = np.append(starts[1:], len(unique))
        stream = self._streams["vectors"]
        for start, end, row in zip(starts.tolist(), ends.tolist(), unique[starts].tolist(), strict=True):
            disk.pread_into(stream, row * width, target[start * width : end * width])
        # torch widens float16 several times as fast as numpy does.
        return torch.from_numpy(buffer).float().numpy()[inverse]

    def text(self, row: int) -> str:
        """The text of one row."""
        if not 0 <= row < self._opened().rows:
            raise UserError(f"{self.folder} has no row {row}; it has rows 0 to {len(self) - 1}")
        first = max(row - 1, 0)
        ends = np.frombuffer(disk.pread(self._streams["text_ends"], 8 * first, 8 * (row - first + 1)), dtype="<i8")
        start = int(ends[0]) if row else 0
        return disk.pread(self._streams["texts"], start, int(ends[-1]) - start).decode("utf-8", "surrogatepass")

    def gather(
        self, keys: Sequence[str], limit: int = 512, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Vectors [B, N, d] float32 and mask [B, N] bool of B histories, padded with zeros to the longest of them.

        Of a history longer than `limit` the last items are kept, as the reference does, or with `rng` a random
        choice in their order. An empty history has an all-False mask; N is at least 1.
        """
        chosen = []
        for rows in self.rows_of(keys):
            if len(rows) > limit:
                rows = rows[-limit:] if rng is None else rows[np.sort(rng.permutation(len(rows))[:limit])]
            chosen.append(rows)
        return self.gather_rows(chosen)

    def gather_rows(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """`gather` for histories given as row numbers, for callers that draw or reorder items themselves."""
        lengths = np.array([len(r) for r in rows], dtype=np.int64)
        longest = max(1, int(lengths.max(initial=0)))
        mask = np.arange(longest) < lengths[:, None]
        vectors = np.zeros((len(rows), longest, self.dim), dtype=np.float32)
        if lengths.sum():
            self._read_into(np.concatenate(rows), vectors.reshape(-1, self.dim), np.flatnonzero(mask))
        return torch.from_numpy(vectors), torch.from_numpy(mask)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, d]: from the store where it has the text, else encoded now and rounded as the store would.

        Writes nothing: for requests of users nobody has seen. Raises UserError when an encoder is needed and missing.
        """
        rows = self.find(texts)
        known, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0).tolist()
        if new and self.encoder is None:
            raise UserError(f"{texts[new[0]]!r:.80} is not in {self.folder}, and no encoder was given to encode it")
        dim = self.manifest.dim if self.manifest is not None else self.encoder.dim if self.encoder else 0
        out = np.empty((len(texts), dim), dtype=np.float32)
        if known.size:
            out[known] = self.read(rows[known])
        if new and self.encoder is not None:
            dtype = self.manifest.dtype if self.manifest is not None else self._dtype or DTYPES[0]
            out[new] = as_stored(self.encoder.encode([texts[i] for i in new]), dtype)
        return out

    def verify(self, *, progress: bool = True) -> None:
        """Read everything and compare it with its digests. Raises UserError naming the first damaged file."""
        manifest = self._opened()
        with Bar("verifying", len(self._streams) + len(self._indexes), progress) as bar:
            for name, stream in self._streams.items():
                disk.check_blocks(self.folder / f"{name}.bin", stream, manifest.files[name])
                bar.advance()
            for index in self._indexes.values():
                for segment in index.segments:
                    segment.check(again=True)
                bar.advance()
        search.verify(self)

    # --- searching --------------------------------------------------------------------------------

    def search_history(self, keys: Sequence[str], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items of history i nearest to query i by dot product, exactly.

        [Q] keys, [Q, d] → scores [Q, k] float32 and positions in that history [Q, k] int64, best first, ties in the
        history's order; -inf and -1 where a history has fewer than k items.
        """
        scores = np.full((len(keys), k), -np.inf, dtype=np.float32)
        positions = np.full((len(keys), k), -1, dtype=np.int64)
        for i, rows in enumerate(self.rows_of(keys)):
            found = self.read(rows) @ np.asarray(queries[i], dtype=np.float32)
            best = np.argsort(-found, kind="stable")[:k]
            scores[i, : len(best)], positions[i, : len(best)] = found[best], best
        return scores, positions

    def search(
        self, queries: np.ndarray, k: int, *, approximate: bool = False, probes: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k items of all users nearest to each query by dot product: one pass over all vectors, through faiss.

        [Q, d] → scores [Q, k] float32 and rows [Q, k] int64, best first; -inf and -1 where there are fewer.
        `approximate` looks only into `probes` lists of the index that `build_index` made (None: 1 in 32, at least 8),
        and at all items added since. Raises UserError without faiss, and when the index is missing or damaged.
        """
        self._opened()
        if not approximate:
            return search.exact(self, queries, k)
        if self._ivf is None:
            self._ivf = search.open_index(self)
        return search.approximate(self, *self._ivf, queries, k, probes)

    def build_index(self, *, lists: int | None = None, seed: int = 0, progress: bool = True) -> None:
        """Build the inverted-file index for approximate search over all items (`lists` None: √n of them).

        Memory stays bounded: it is trained on a sample, filled in blocks, and its lists stay in a file. Training runs
        on a GPU when there is one and faiss is the GPU build. Raises UserError without faiss or without vectors.
        """
        self._opened()
        with disk.write_lock(self.folder):
            search.build(self, lists=lists, seed=seed, progress=progress)
        self._ivf = None


def _same_encoder(
    folder: Path, stored: dict[str, str | int | bool] | None, given: dict[str, str | int | bool] | None
) -> None:
    if stored is None or given is None:
        if stored is not given:
            raise UserError(
                f"{folder} was filled with {'ready-made vectors' if stored is None else stored['name']}, which cannot "
                f"be mixed with {'ready-made vectors' if given is None else given['name']}; use another folder"
            )
        return
    differing = [name for name in given if name not in ("name", "revision") and stored.get(name) != given[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} was made with the encoder {stored['name']} ({name} {stored.get(name)!r}); "
            f"this is {given['name']} ({name} {given[name]!r}): use that encoder or another folder"
        )
