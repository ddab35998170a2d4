"""The items of all users nearest to a query, through faiss: exact, or approximate with an inverted-file index.

Both keep memory bounded: the exact search passes over the vectors in blocks, and the index's lists stay in a file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from persona.errors import UserError
from persona.files import atomic_folder, sha256
from persona.progress import Bar
from persona.store import disk

if TYPE_CHECKING:
    from persona.store.history import HistoryStore

FOLDER = "ivf"
BLOCK_ROWS = 1 << 16
# Vectors a centroid is trained on: faiss takes 39 for the least that is sound and uses no more than 256.
TRAIN_PER_LIST = 64


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "searching all histories needs faiss: install persona[faiss-cpu], or persona[faiss-gpu] on a GPU machine"
        ) from error
    return faiss


def _gpus(faiss: Any) -> int:
    # The CPU build has neither this function nor the GPU ones.
    return faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0


def _merge_best(
    scores: np.ndarray, rows: np.ndarray, more_scores: np.ndarray, more_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of both, where k is the width of the first; on equal scores the first stays in front."""
    k = scores.shape[1]
    scores, rows = np.concatenate([scores, more_scores], axis=1), np.concatenate([rows, more_rows], axis=1)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)


def exact(store: HistoryStore, queries: np.ndarray, k: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """[Q, d] → scores [Q, k] float32 and rows [Q, k] int64 of the largest dot products among rows from `start` on."""
    faiss = _faiss()
    queries = _checked_queries(store, queries)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    resources = faiss.StandardGpuResources() if _gpus(faiss) else None
    for begin in range(start, len(store), BLOCK_ROWS):
        block = store.read(np.arange(begin, min(begin + BLOCK_ROWS, len(store))))
        arguments = (queries, block, min(k, len(block)))
        if resources is None:
            found, at = faiss.knn(*arguments, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            found, at = faiss.knn_gpu(resources, *arguments, metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = _merge_best(scores, rows, found, at + begin)
    return scores, rows


def _checked_queries(store: HistoryStore, queries: np.ndarray) -> np.ndarray:
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != store.dim:
        raise UserError(f"queries have shape {list(queries.shape)}; {store.folder} takes [Q, {store.dim}]")
    return queries


@dataclass(frozen=True)
class _About:
    """Beside the index: of which store, how much of it, and the files' digests."""

    identity: str
    rows: int
    lists: int
    seed: int
    files: dict[str, list[int | str]]


def build(store: HistoryStore, *, lists: int | None, seed: int, progress: bool) -> None:
    """Train on a seeded sample, add in blocks, keep the lists in a file; the index appears whole or not at all."""
    faiss = _faiss()
    from faiss.contrib.ondisk import merge_ondisk

    n = len(store)
    if n == 0:
        raise UserError(f"{store.folder} holds no vectors, so there is nothing to build an index of")
    lists = max(1, int(np.sqrt(n))) if lists is None else lists
    disk.clean(store.folder, store.manifest)
    flat = faiss.IndexFlatIP(store.dim)
    if store.dtype == np.float16:
        # Vectors rounded to float16 lose nothing more here, and take half the room.
        index = faiss.IndexIVFScalarQuantizer(
            flat, store.dim, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
    else:
        index = faiss.IndexIVFFlat(flat, store.dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.min_points_per_centroid = 1
    on_gpu = None
    if _gpus(faiss):
        resources = faiss.StandardGpuResources()
        on_gpu = faiss.index_cpu_to_gpu(resources, 0, faiss.IndexFlatIP(store.dim))
        index.clustering_index = on_gpu
    sample = np.random.default_rng(seed).choice(n, size=min(n, TRAIN_PER_LIST * lists), replace=False)
    index.train(store.read(np.sort(sample)))
    index.clustering_index = None
    with (
        Bar("building the index", n, progress) as bar,
        atomic_folder(store.folder / FOLDER) as folder,
        TemporaryDirectory(dir=store.folder, prefix=".blocks.", suffix=".tmp") as blocks,
    ):
        names = []
        for start in range(0, n, BLOCK_ROWS):
            rows = np.arange(start, min(start + BLOCK_ROWS, n))
            index.reset()
            index.add_with_ids(store.read(rows), rows)
            names.append(str(Path(blocks, f"{start}.index")))
            faiss.write_index(index, names[-1])
            bar.advance(len(rows))
        index.reset()
        merge_ondisk(index, names, str(folder / "lists.bin"))
        faiss.write_index(index, str(folder / "ivf.index"))
        files: dict[str, list[int | str]] = {
            name: [(folder / name).stat().st_size, sha256(folder / name)] for name in ("ivf.index", "lists.bin")
        }
        about = _About(store.identity, n, lists, seed, files)
        (folder / "about.json").write_text(json.dumps(asdict(about), indent=1), encoding="utf-8")


def open_index(store: HistoryStore) -> tuple[Any, int]:
    """The index, lists left in their file, and how many rows of the store it covers.

    Raises UserError when there is none, when it belongs to another store, and when its files are damaged (the lists'
    content is compared with its digest by `verify` only).
    """
    faiss = _faiss()
    about = _about(store)
    return faiss.read_index(str(store.folder / FOLDER / "ivf.index"), faiss.IO_FLAG_ONDISK_SAME_DIR), about.rows


def _about(store: HistoryStore, everything: bool = False) -> _About:
    path = store.folder / FOLDER / "about.json"
    try:
        about = _About(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{store.folder} has no index for approximate search; call build_index first") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged; build the index again") from error
    if about.identity != store.identity or about.rows > len(store):
        raise UserError(f"{path.parent} is the index of another store; build it again")
    for name, (size, digest) in about.files.items():
        file = path.parent / name
        if not file.exists() or file.stat().st_size != size:
            raise UserError(f"{file} is missing or does not have {size} bytes; build the index again")
        if (everything or name == "ivf.index") and sha256(file) != digest:
            raise UserError(f"{file} is damaged: it does not fit its digest; build the index again")
    return about


def verify(store: HistoryStore) -> None:
    """Raises UserError when there is an index and it is damaged."""
    if (store.folder / FOLDER).exists():
        _about(store, everything=True)


def approximate(
    store: HistoryStore, index: Any, covered: int, queries: np.ndarray, k: int, probes: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """As `exact`, from the `probes` lists nearest to each query; rows added after the index are searched exactly."""
    queries = _checked_queries(store, queries)
    index.nprobe = min(index.nlist, max(8, index.nlist // 32) if probes is None else probes)
    scores, rows = index.search(queries, k)
    scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
    if covered < len(store):
        scores, rows = _merge_best(scores, rows, *exact(store, queries, k, start=covered))
    return scores, rows
