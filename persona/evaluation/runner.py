"""The runner: many episodes open at once, what they wait for answered in full batches, every finished one on disk.

An episode is written as if it had the model to itself; here the requests of all open episodes meet and are answered
together, whoever they are for. Benchmarks (`episodes`) and generated data (`generation`) are its two users.
"""

from __future__ import annotations

import asyncio
import glob
import inspect
import json
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from persona import heartbeat
from persona.evaluation.batching import AsyncModel
from persona.evaluation.judges.judging import Judge, ModelJudge
from persona.evaluation.roles import Cast, Roles
from persona.files import LineWriter, read_lines

T = TypeVar("T")

_OPEN_BATCHES = 8  # batches' worth of open episodes: enough to sort by length, few enough to finish steadily
_REPORT_SECONDS = 30.0
_USAGE_SECONDS = 5.0


class Processes(Protocol):
    """Several processes sharing one run; accelerate's PartialState is one."""

    process_index: int
    num_processes: int

    def wait_for_everyone(self) -> None: ...


def place(processes: Processes | None) -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (processes.process_index, processes.num_processes) if processes else (0, 1)


def part(path: Path, rank: int) -> Path:
    """Where process `rank` keeps its rows of `path` until all are joined."""
    return path.with_name(f"{path.stem}.part{rank}{path.suffix}")


def parts(path: Path) -> list[Path]:
    """`path` and what processes of this and earlier launches left beside it."""
    return [path, *sorted(path.parent.glob(f"{glob.escape(path.stem)}.part*{path.suffix}"))]


def run_episodes(
    items: Sequence[T],
    episode: Callable[[T, Roles], Awaitable[bytes]],
    cast: Cast,
    path: Path,
    *,
    who: str,
    needs: Sequence[str] = (),
    batch_size: int,
    title: str,
    total: int,
    show: bool,
) -> None:
    """Append the line that `episode` makes of each item to `path`, at once and in the order in which they finish.

    `total` counts what was finished before as well. A written line survives the death of the process, and lines are
    synced before each batch. What endpoints were asked meanwhile is noted beside `path` (`usage`), also when the run
    ends in an error. Raises whatever a model or an episode raises.
    """
    usage = _Usage(path, cast)
    with closing(LineWriter(path)) as writer, closing(usage), heartbeat.stage(title):
        heartbeat.moved(total - len(items), total)
        with _Bar(title, total, len(items), show and bool(items)) as bar:

            def finished(line: bytes) -> None:
                writer.write(line)
                usage.note()
                bar.advance()
                heartbeat.moved(heartbeat.now.done + 1)

            _run_loop(_run_all(items, episode, cast, needs, batch_size, finished, writer.sync, who))
        writer.sync()


async def _run_all(
    items: Sequence[T],
    episode: Callable[[T, Roles], Awaitable[bytes]],
    cast: Cast,
    needs: Sequence[str],
    batch_size: int,
    finished: Callable[[bytes], None],
    sync: Callable[[], None],
    who: str,
) -> None:
    asyncio.get_running_loop().set_exception_handler(_complaint)
    queue = iter(items)
    fronts: dict[int, AsyncModel] = {}

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="model") as executor:

        def speaker(player: Any, name: str) -> Any:
            if player is None or inspect.iscoroutinefunction(player.respond):
                return player
            return fronts.setdefault(id(player), AsyncModel(player, batch_size, executor, name))

        def judge(player: Any, number: int) -> Judge:
            return player if hasattr(player, "ask") else ModelJudge(speaker(player, f"judge {number}"))

        roles = Roles(
            model=speaker(cast.model, "model"),
            judges=[judge(player, number) for number, player in enumerate(cast.judges, start=1)],
            user_simulator=speaker(cast.user_simulator, "user_simulator"),
            reference=speaker(cast.reference, "reference"),
        )
        roles.check(who, needs)
        for player in cast.players().values():
            if items and hasattr(player, "check"):
                await player.check()  # an endpoint that does not answer is known before the first item

        async def worker() -> None:
            for item in queue:
                finished(await episode(item, roles))

        servers = [asyncio.create_task(front.serve(sync)) for front in fronts.values()]
        workers = [asyncio.create_task(worker()) for _ in range(min(len(items), batch_size * _OPEN_BATCHES))]
        try:
            # Whichever fails first ends the run: a model (a server never returns) or an episode.
            pending: set[asyncio.Task] = set(workers)
            while pending:
                ended, _ = await asyncio.wait({*servers, *pending}, return_when=asyncio.FIRST_COMPLETED)
                for task in (*servers, *workers):
                    if task in ended:
                        task.result()
                pending -= ended
        finally:
            for task in (*servers, *workers):
                task.cancel()
            await asyncio.gather(*servers, *workers, return_exceptions=True)


def _complaint(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # A run that is stopped in the middle of an `asyncio.gather` leaves questions that nobody waits for any more.
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _run_loop(main: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(main)
        return
    # A notebook has a running loop in this thread, and loops do not nest: take another thread.
    failure: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(main)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def usage_files(path: Path) -> list[Path]:
    """Where the processes of all launches noted what they asked of endpoints for the rows of `path`."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.usage*.jsonl"))


def usage(path: Path) -> dict[str, dict[str, float]]:
    """Requests, tokens and cost of each role that counts them, of all processes and over all starts of a run."""
    total: dict[str, dict[str, float]] = {}
    for line in (line for file in usage_files(path) for line in read_lines(file)):
        for role, counts in line.items():
            mine = total.setdefault(role, {})
            for key, value in counts.items():
                mine[key] = round(mine.get(key, 0) + value, 9)
    return total


class _Usage:
    """Notes how the account of each role has grown, every few seconds: a kill loses those at most."""

    def __init__(self, path: Path, cast: Cast) -> None:
        whole, mark, rank = path.stem.rpartition(".part")
        self._path = path.with_name(f"{whole}.usage{rank}.jsonl" if mark else f"{path.stem}.usage.jsonl")
        self._cast, self._before = cast, cast.usage()  # endpoints live on from run to run and count on
        self._noted = time.monotonic()

    def note(self) -> None:
        if self._before and time.monotonic() - self._noted > _USAGE_SECONDS:
            self.close()

    def close(self) -> None:
        now, self._noted = self._cast.usage(), time.monotonic()
        grown = {
            role: {key: round(value - self._before[role].get(key, 0), 9) for key, value in counts.items()}
            for role, counts in now.items()
        }
        if any(value for counts in grown.values() for value in counts.values()):
            with closing(LineWriter(self._path)) as writer:
                writer.write(json.dumps(grown).encode() + b"\n")
        self._before = now


class _Bar:
    """Progress with rates and time left: a bar on a terminal, a line now and then in a log file.

    Tokens are those that local models were given (a shared beginning as often as it is asked) or wrote. Where
    endpoints are asked, `waited` is the share of time in which no local model was at work.
    """

    def __init__(self, title: str, total: int, left: int, shown: bool) -> None:
        self._title, self._total, self._left, self._done = title, total, left, 0
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._shown, self._started = shown, time.monotonic()
        self._before = replace(heartbeat.now)
        self._spoke = self._started
        if shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, completed=total - left, rate="")

    def __enter__(self) -> _Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        rate = self._done / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, rate=f"{rate:.1f}/s{self._rates(now)}")
        elif self._shown and (now - self._spoke > _REPORT_SECONDS or self._done == self._left):
            self._spoke = now
            minutes = (self._left - self._done) / rate / 60
            done = self._total - self._left + self._done
            self._console.print(
                f"{self._title}: {done}/{self._total}, {rate:.1f}/s{self._rates(now)}, {minutes:.1f} min left"
            )

    def _rates(self, now: float) -> str:
        seconds, at, before = max(now - self._started, 1e-9), heartbeat.now, self._before
        tokens, positions = at.tokens - before.tokens, at.positions - before.positions
        said = f", {tokens / seconds:,.0f} tokens/s, padding {1 - tokens / positions:.0%}" if positions else ""
        waited = 1 - min(1.0, (at.busy - before.busy) / seconds)
        return f"{said}, waited {waited:.0%}" if at.asking else said
