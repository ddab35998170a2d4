"""A method of three small stages for the tests of the runner, which tell on standard output when they really run."""

from __future__ import annotations

import time
from pathlib import Path

from persona.files import LineWriter, atomic_folder, atomic_write, read_lines
from persona.training.stages import Stage, run_stages


class Toy:
    """numbers.txt → squares.jsonl → sums/ → total.txt; `ran` lists the stages that ran."""

    def __init__(self, n: int = 5, factor: int = 1, offset: int = 0, pause: float = 0.0) -> None:
        self.n, self.factor, self.offset, self.pause = n, factor, offset, pause
        self.ran: list[str] = []

    def square(self, folder: Path) -> None:
        """Row by row, going on where an earlier start was stopped."""
        self.ran.append("square")
        rows = folder / "work" / "square" / "rows.jsonl"
        done = len(list(read_lines(rows)))
        print(f"square goes on at {done}", flush=True)
        writer = LineWriter(rows)
        for number in range(done, self.n):
            time.sleep(self.pause)
            writer.write(f"{self.factor * number**2}\n".encode())
        writer.close()
        with atomic_write(folder / "squares.jsonl") as temporary:
            temporary.write_bytes(rows.read_bytes())

    def add(self, folder: Path) -> None:
        self.ran.append("add")
        with atomic_folder(folder / "sums") as temporary:
            for number, value in enumerate(read_lines(folder / "squares.jsonl")):
                time.sleep(self.pause)
                (temporary / f"{number}.txt").write_text(str(value + self.offset))

    def total(self, folder: Path) -> None:
        self.ran.append("total")
        with atomic_write(folder / "total.txt") as temporary:
            temporary.write_text(str(sum(int(file.read_text()) for file in (folder / "sums").iterdir())))

    def stages(self) -> list[Stage]:
        return [
            Stage("square", self.square, (), ("squares.jsonl",), {"n": self.n, "factor": self.factor}),
            Stage("add", self.add, ("squares.jsonl",), ("sums",), {"offset": self.offset}),
            Stage("total", self.total, ("sums",), ("total.txt",), {}),
        ]

    def run(self, folder: Path, **more) -> list[str]:
        self.ran = []
        run_stages(self.stages(), folder, **more)
        return self.ran
