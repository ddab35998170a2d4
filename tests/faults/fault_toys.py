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
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

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
        return [line for line in lines if line.startswith(("error: ", "[process ", "Traceback", "stopped"))]

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
    with _files() as (out, err):
        process = started(script, arguments, before, out, err)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"{script} hung; it said: {err.read_text()[-2000:]}")
        return Done(process.exitcode or 0, out.read_text(errors="replace"), err.read_text(errors="replace"))


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


@contextmanager
def _files() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder) / "out", Path(folder) / "err"


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
