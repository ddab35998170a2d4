"""Progress of long work: done, rate and time left, on standard error, so that standard output stays a result."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from persona import heartbeat


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


class Bar:
    """One progress bar as a context manager; with `show` False it does nothing, so callers need no branches.

    `total` None means the amount is not known: then the rate is shown without a time left.
    """

    def __init__(self, description: str, total: int | None, show: bool = True) -> None:
        self._progress: Progress | None = None
        if show:
            # Without a terminal rich prints the last state only, which keeps log files short.
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=Console(file=sys.stderr), speed_estimate_period=120,
            )  # fmt: skip
            self._task = self._progress.add_task(description, total=total, note="")

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, amount: float = 1) -> None:
        heartbeat.moved()
        if self._progress is not None:
            self._progress.advance(self._task, amount)

    def set(self, completed: float, note: str | None = None) -> None:
        heartbeat.moved()
        if self._progress is not None:
            self._progress.update(self._task, completed=completed)
            if note is not None:
                self._progress.update(self._task, note=note)
