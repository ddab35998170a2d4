"""Commands as a user gives them, each in a process of its own that has everything imported: a second, not ten.

done = command("train.py", ["method=finetune_lora", ...], before)      # a function that runs first, in the process
assert done.code == 2 and done.sentence.startswith("error: ")
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FORK = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "persona.methods.finetune", "persona.benchmarks", "persona.players", "persona.data", "persona.config",
    "persona.training.trainer", "persona.evaluation.report", "persona.evaluation.plots", "openai", "deepspeed",
    "train", "evaluate",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines on stderr that are no progress and no warning."""
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip()]
        return [line for line in lines if line.startswith(("error: ", "[process ", "Traceback", "stopped", "ends, "))]

    @property
    def sentence(self) -> str:
        """The one line that says what went wrong. Fails the test when there are several, or a traceback."""
        assert self.code == 2, (self.code, self.out[-500:], self.err[-3000:])
        assert len(self.said) == 1 and "Traceback" not in self.err, self.err[-3000:]
        return self.said[0]


def command(
    script: str, arguments: Sequence[str], before: Callable[[], None] | None = None, timeout: float = 120
) -> Done:
    """Run `script` with these arguments; `before` runs first, in its process."""
    return _finished(script, arguments, [before], timeout)[0]


def two_processes(
    script: str, arguments: Sequence[str], before: Callable[[], None] | None = None, timeout: float = 120
) -> list[Done]:
    """The same in two processes that find each other as those of srun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    places = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return _finished(script, arguments, [partial(_in_place, place, before) for place in places], timeout)


def _in_place(place: dict[str, str], before: Callable[[], None] | None) -> None:
    os.environ.update(place)
    if before is not None:
        before()


def _finished(
    script: str, arguments: Sequence[str], befores: Sequence[Callable[[], None] | None], timeout: float
) -> list[Done]:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        said = [(Path(folder) / f"out{i}", Path(folder) / f"err{i}") for i in range(len(befores))]
        processes = [started(script, arguments, before, *files) for before, files in zip(befores, said, strict=True)]
        until = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.1, until - time.monotonic()))
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        texts = [[path.read_text(errors="replace") if path.exists() else "" for path in files] for files in said]
        assert not hung, f"{script} hung; it said: {[err[-2000:] for _, err in texts]}"
        return [Done(process.exitcode or 0, *text) for process, text in zip(processes, texts, strict=True)]


def import_for_all(names: Sequence[str] = _IMPORTED) -> None:
    """What the processes to come have imported; only the first call counts."""
    _FORK.set_forkserver_preload(list(names))
    forkserver.ensure_running()


def started(
    script: str, arguments: Sequence[str], before: Callable[[], None] | None, out: Path, err: Path
) -> BaseProcess:
    """A process that runs `script`; what it says is appended to `out` and `err`."""
    import_for_all()
    process = _FORK.Process(target=_play, args=(script, list(arguments), before, str(out), str(err)))
    process.start()
    return process


def _play(script: str, arguments: list[str], before: Callable[[], None] | None, out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    logging.lastResort = logging.StreamHandler(sys.stderr)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    gc.freeze()  # what is imported is no garbage, and took most of the time of a collection
    code = 0
    try:
        if before is not None:
            before()
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
