"""What goes wrong for a command: a full disk, no rights, and trouble within a run.

done = command("train.py", ["method=finetune_lora", ...], no_privileges)
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from persona.errors import UserError
from persona.methods import PERSONALIZERS
from persona.personalizer import Personalizer


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
