"""Persona-Plug training: samples per second and memory against history length and store size, in one run.

    python benchmarks/persona_plug_throughput.py                        # lengths 1 … 512, stores of 10³ … 10⁶ items
    python benchmarks/persona_plug_throughput.py --sizes 10000000       # 7.7 GB of vectors in a temporary folder

Every row stands beside a baseline that pads each history to 512 items and projects the padding too, as the published
code does; `ratio` is ours over the baseline in the same run. Vectors are synthetic (random unit vectors of 384), the
LM and its prompts are the town's. `store MB` is what drawing batches adds to resident memory before any model exists.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from persona import lm
from persona.encoders import Encoder
from persona.lm import Row, assemble
from persona.lm.batch import forward_logits, nll_sum
from persona.methods.persona_plug import PersonaPlugConfig, UserEmbedder, attention_weights
from persona.progress import Bar
from persona.store import HistoryStore
from persona.types import Message, Request

DIM, PADDED, MB = 384, 512, 2**20


class Peak:
    """Highest resident memory above where it started, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.process = psutil.Process()
        self.start = self.highest = self.process.memory_info().rss
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def megabytes(self) -> float:
        return (self.highest - self.start) / MB


class PaddedEmbedder(UserEmbedder):
    """The baseline: every history has 512 places, and the projector runs over all of them."""

    def forward(self, history: Tensor, mask: Tensor, query: dict[str, Tensor] | None) -> Tensor:
        short = PADDED - history.shape[1]
        history = torch.nn.functional.pad(history, (0, 0, 0, short))
        mask = torch.nn.functional.pad(mask, (0, short))
        weights = attention_weights(history, mask, self.encode_query(query, history), **self.options())
        user = torch.einsum("bn,bnd->bd", weights, self.project(history))[:, None] * self.scale
        instruction = self.project_instruction(self.instruction).expand(len(history), 1, -1) * self.scale
        return torch.cat([instruction, user], dim=1)


def fill(folder: Path, size: int) -> HistoryStore:
    """A store of `size` synthetic items, written in blocks."""
    store = HistoryStore(folder)
    rng = np.random.default_rng(0)
    block = min(size, 100_000)
    with Bar(f"store of {size:,}", size) as bar:
        for start in range(0, size, block):
            count = min(block, size - start)
            vectors = rng.standard_normal((count, DIM), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            store.add_vectors([f"item {i}" for i in range(start, start + count)], vectors)
            bar.advance(count)
    return HistoryStore(folder)


def draw(store: HistoryStore, rng: np.random.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
    rows = [np.sort(rng.integers(0, len(store), length)) for _ in range(batch)]
    return store.gather_rows(rows)


def time_steps(base, embedder, store, batch: int, length: int, seconds: float) -> tuple[float, float]:
    """(samples/s, peak MB) of full training steps: draw, embed, LM forward and backward, AdamW."""
    rng = np.random.default_rng(1)
    requests = [Request((Message("user", "how was the market today ?"),))] * batch
    prompts = [base.render(request.messages) for request in requests]
    replies = [base.render_reply(request.messages, "the market was lovely today .") for request in requests]
    optimizer = torch.optim.AdamW([p for p in embedder.parameters() if p.requires_grad], lr=1e-4)
    query = embedder.query_encoder.tokenize(["how was the market today ?"] * batch)

    def step() -> None:
        history, mask = draw(store, rng, batch, length)
        front = embedder(history, mask, query)
        rows = [Row(*row) for row in zip(prompts, front, requests, strict=True)]
        loss = nll_sum(*forward_logits(base, assemble(base, rows, replies)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    done, start = 0, time.perf_counter()
    with Peak() as peak:
        while time.perf_counter() - start < seconds or done < 2:
            step()
            done += 1
    return done * batch / (time.perf_counter() - start), peak.megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to make the stores (default: a temporary one)"
    )
    arguments = parser.parse_args()
    console = Console()
    temporary = tempfile.TemporaryDirectory()
    root = arguments.folder or Path(temporary.name)

    stores, resident = {}, {}
    for size in arguments.sizes:
        fill(root / str(size), size)
        gc.collect()
        with Peak() as peak:  # opened anew: what building left behind does not count
            stores[size] = HistoryStore(root / str(size))
            rng, until = np.random.default_rng(2), time.perf_counter() + arguments.seconds
            drawn = 0
            while time.perf_counter() < until:
                draw(stores[size], rng, arguments.batch, 100)
                drawn += arguments.batch * 100
        resident[size] = (peak.megabytes, drawn / arguments.seconds)

    base = lm.load(lm.ModelConfig(device="cpu"))
    encoder = Encoder()
    config = PersonaPlugConfig()
    table = Table(title="training steps", caption=f"batch {arguments.batch}, {torch.get_num_threads()} threads")
    for name in ("store items", "history", "samples/s", "padded to 512", "ratio", "peak MB", "padded peak MB"):
        table.add_column(name, justify="right")
    largest = stores[max(stores)]
    cases = [(len(largest), length, largest) for length in arguments.lengths]
    cases += [(size, 100, store) for size, store in stores.items()]
    for size, length, store in cases:
        speed, memory = [], []
        for kind in (UserEmbedder, PaddedEmbedder):
            embedder = kind(config, encoder, base.hidden_size, 1.0)
            per_second, peak_mb = time_steps(base, embedder, store, arguments.batch, length, arguments.seconds)
            speed.append(per_second)
            memory.append(peak_mb)
        cells = [f"{speed[0]:.1f}", f"{speed[1]:.1f}", f"{speed[0] / speed[1]:.2f}", *(f"{mb:.0f}" for mb in memory)]
        table.add_row(f"{size:,}", str(length), *cells)
    console.print(table)

    table = Table(title="drawing batches from the store alone")
    for name in ("store items", "on disk MB", "store MB in memory", "rows/s"):
        table.add_column(name, justify="right")
    for size in arguments.sizes:
        disk = sum(file.stat().st_size for file in (root / str(size)).rglob("*") if file.is_file()) / MB
        table.add_row(f"{size:,}", f"{disk:,.0f}", f"{resident[size][0]:.1f}", f"{resident[size][1]:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
