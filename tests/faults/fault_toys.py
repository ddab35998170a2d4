"""Commands as a user gives them, each in a process of its own that has everything imported: a second, not ten.

done = command("train.py", ["method=finetune_lora", ...], no_privileges)      # a function arranges what goes wrong
assert done.code == 2 and done.sentence.startswith("error: ")
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from persona.errors import UserError
from persona.methods import PERSONALIZERS
from persona.personalizer import Personalizer

ROOT = Path(__file__).resolve().parents[2]
_FORK = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "persona.methods.finetune", "persona.benchmarks", "persona.players", "persona.data", "persona.config",
    "persona.training.trainer", "persona.evaluation.report", "persona.evaluation.plots", "openai", "train", "evaluate",
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


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def no_privileges() -> None:
    """Root may read and write whatever its mode: give that up, as everybody else has to."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
        sets = (ctypes.c_uint32 * 6)()  # twice (low and high half): effective, permitted, inheritable
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0


class Trouble(Personalizer):
    """Stands in a stack, and at call `call` of the first door in the process `rank` does `what`."""

    method = "trouble"

    def __init__(self, settings: dict[str, Any], weights: Any) -> None:
        self.settings, self.weights, self.calls = settings, weights, 0

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: Any) -> Trouble:
        return cls(config, base.model.model.norm.weight)

    def config(self) -> dict[str, Any]:
        return self.settings

    @property
    def now(self) -> bool:
        here = os.environ.get("RANK", "0") == str(self.settings["rank"])
        return here and self.calls >= self.settings["call"] and not Path(self.settings["over"]).exists()

    def prompt(self, requests: Sequence[Any]) -> list[Any]:
        self.calls += 1
        if self.now and self.settings["what"] == "error":
            raise UserError("row 3 of the data has no text")
        if self.now and self.settings["what"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.now and self.settings["what"] == "broken":
            self.weights.fill_(float("nan"))
        return list(requests)


def with_trouble() -> None:
    """Let a stack hold "trouble"."""
    PERSONALIZERS["trouble"] = "fault_toys:Trouble"


def trouble(what: str, call: int, over: Path, rank: int = 0) -> str:
    """The stack in which it happens, until the file `over` is there."""
    return f"personalizers=[{{trouble: {{what: {what}, call: {call}, rank: {rank}, over: {over}}}}}]"


def small_files(size: int) -> None:
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextmanager
def small_disk(folder: Path, kib: int = 4) -> Iterator[Callable[[str], None]]:
    """A file system of `kib` KiB at `folder`; what is yielded mounts it with other options ("size=80k", "ro").

    Skips the test where none can be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=777", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here: that takes root")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
