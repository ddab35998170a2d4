"""The history store against its size: filling it, drawing training batches from it, and the memory that takes.

    python benchmarks/history_store.py --sizes 1000 100000 10000000 --folder /tmp/stores

Synthetic items: random unit vectors (float16, 384 numbers as MiniLM's), in users of 128 items that lie together,
as `add` leaves new items, or scattered over the whole file, the worst case. Each size is read in a process of
its own; memory is that process's growth from after the imports, by resident set (RSS, in which mapped files count).
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import psutil

from persona.progress import Bar
from persona.store import HistoryStore

ITEMS_PER_USER = 128
BATCH = 64
CHUNK = 100_000


def fill(folder: Path, items: int, dim: int = 384, users: int = 2000, progress: bool = True) -> None:
    """A store of `items` synthetic vectors, named "item 0" …, and histories "together i" and "scattered i".

    Goes on where it stopped. Draws depend on the chunk's number alone.
    """
    store = HistoryStore(folder)
    with Bar(f"{items:,} items", items, progress) as bar:
        for start in range(0, items, CHUNK):
            count = min(CHUNK, items - start)
            if len(store) < start + count:
                vectors = np.random.default_rng(start).standard_normal((count, dim), dtype=np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                store.add_vectors([f"item {i}" for i in range(start, start + count)], vectors)
            bar.advance(count)
    rng = np.random.default_rng(1)
    n = min(ITEMS_PER_USER, items)
    firsts = rng.integers(items - n + 1, size=users)
    scattered = rng.integers(items, size=(users, n))
    histories = [(f"together {u}", [f"item {i}" for i in range(first, first + n)]) for u, first in enumerate(firsts)]
    histories += [(f"scattered {u}", [f"item {i}" for i in rows]) for u, rows in enumerate(scattered)]
    store.add(histories, progress=False)


def draw(folder: Path, users: int, batches: int, results: multiprocessing.Queue) -> None:
    """Rows a second and growth of memory over `batches` random batches of each kind of history."""
    process = psutil.Process()
    start = process.memory_info().rss
    store = HistoryStore(folder)
    for kind in ("together", "scattered"):
        rng = np.random.default_rng(2)
        peak = rows = 0
        began = time.perf_counter()
        for _ in range(batches):
            keys = [f"{kind} {u}" for u in rng.integers(users, size=BATCH)]
            vectors, mask = store.gather(keys)
            rows += int(mask.sum())
            peak = max(peak, process.memory_info().rss)
        seconds = time.perf_counter() - began
        batch = vectors.numpy().nbytes
        results.put((kind, rows / seconds, (peak - start) / 2**20, batch / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--folder", type=Path, required=True, help="where the stores are made; 800 bytes an item")
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--keep", action="store_true", help="leave the stores there")
    arguments = parser.parse_args()
    print("     items      fill s   on disk MB  histories       rows/s   RSS growth MB   of it one batch MB")
    for items in arguments.sizes:
        folder = arguments.folder / f"items-{items}"
        began = time.perf_counter()
        fill(folder, items, users=arguments.users)
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.rglob("*")) / 2**20
        spawn = multiprocessing.get_context("spawn")
        results: multiprocessing.Queue = spawn.Queue()
        reader = spawn.Process(target=draw, args=(folder, arguments.users, arguments.batches, results))
        reader.start()
        for _ in range(2):
            kind, rate, growth, batch = results.get()
            print(f"{items:10,} {seconds:11.1f} {size:12,.0f}  {kind:10} {rate:11,.0f} {growth:15.1f} {batch:20.1f}")
        reader.join()
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
