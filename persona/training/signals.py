"""SIGTERM and SIGUSR1: a run ends promptly, on every process at the same place, and the same command goes on."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from persona.errors import UserError

logger = logging.getLogger(__name__)
NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
_PROBE = 64 << 20  # bytes written to learn how fast the disk is


class Stopped(SystemExit):
    """A run was asked to stop, and what it had done is saved. Exit status 143, as for SIGTERM."""

    def __init__(self, step: int | None, folder: Path):
        super().__init__(143)
        after = "" if step is None else f" after step {step}"
        self.message = f"stopped{after}; the same command goes on from {folder}"


class Interrupted(Exception):
    """Leaves the loop on all processes at the same place: before its first step, or between two batches of an
    evaluation, which is then made up for after the resume."""


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` for SIGTERM and SIGUSR1, and the ones before it back afterwards. In another thread than the main one
    signals cannot be handled, and nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in NUMBERS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stoppable(folder: Path | str) -> Iterator[None]:
    """Raises Stopped at once when a signal comes, for work whose files are whole or absent at any moment.

    It is raised once: a job that is cancelled gets SIGTERM twice, and the second must not cut the end short. Training
    handles signals itself while its loop runs.
    """
    asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        if not asked and not isinstance(sys.exc_info()[1], Stopped):  # training has raised it already
            asked = True
            raise Stopped(None, Path(folder))

    with handling(stop):
        yield


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process; every process has to call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return bool(tensor)


class Signals(TrainerCallback):
    """While training: a signal ends the step (or the batch of an evaluation) that it finds, and the run saves and
    stops; all processes agree where. Says at the start, and with every save, when `grace` seconds are too few for it.

    `seconds` is what the last save took, None before the first.
    """

    def __init__(self, grace: float, seconds: float | None, folder: Path) -> None:
        self.asked = False
        self.grace, self.seconds, self.folder = grace, seconds, folder
        self._begun: float | None = None
        self._longest = 0.0
        self._warned = False

    def listening(self) -> Any:
        def ask(number: int, frame: Any) -> None:
            self.asked = True

        return handling(ask)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            if self.seconds is None:
                self.seconds = expected_seconds(model, self.folder)
            self._check()
        if any_process(self.asked):  # while the loop was being set up
            raise Interrupted

    def on_step_begin(self, args, state, control, **kwargs):
        self._begun = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self._longest = max(self._longest, time.monotonic() - (self._begun or time.monotonic()))
        if any_process(self.asked):
            self.asked = True
            control.should_save = control.should_training_stop = True
        return control

    def on_prediction_step(self, args, state, control, **kwargs):
        if any_process(self.asked):
            self.asked = True
            raise Interrupted

    def saved(self, seconds: float) -> None:
        """A checkpoint was saved in so many seconds."""
        logger.info("checkpoint saved in %.1f s", seconds)
        self.seconds = seconds
        self._check()

    def _check(self) -> None:
        needed = self._longest + (self.seconds or 0.0)
        if needed > self.grace and not self._warned:
            self._warned = True
            logger.warning(
                "a step and a save take %.0f s (%.0f + %.0f), more than the trainer.grace_seconds=%g between a signal "
                "and the end: a run that is stopped then goes on from the checkpoint before; ask the cluster for more "
                "(sbatch --signal=B:USR1@SECONDS) or lower trainer.gradient_accumulation",
                *(needed, self._longest, self.seconds or 0.0, self.grace),
            )


def expected_seconds(model: torch.nn.Module, folder: Path) -> float:
    """What a save should take: fp32 weights and Adam's two moments of what is trained, at the rate at which a sample
    of as many bytes (64 MiB at most) is written to `folder`, synced and hashed. Raises UserError where the disk does
    not take it."""
    size = 12 * sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    sample = max(1, min(size, _PROBE))
    begun = time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:  # without a name: a kill leaves nothing
            stream.write(bytes(sample))
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(0)
            hashlib.file_digest(stream, "sha256")
    except OSError as error:
        raise UserError(f"{folder} has no room for a checkpoint of {size / 1e6:.1f} MB: {error.strerror}") from error
    return (time.monotonic() - begun) * size / sample
