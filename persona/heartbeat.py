"""What each process of a run is doing and since when it has not moved: a small file per process, and one sentence when
all stand still.

    with beating("outputs/x"):            # around a run (persona.config.run_state)
        with phase("loading data"):       # what is done now
            moved(12, 400)                # something has been finished; 12 of 400

    outputs/x/processes/rank-0.json       rewritten every few seconds, removed when the run ends: what is left of a
                                          killed run tells where it was
    outputs/x/processes/rank-0.stacks.txt only after a standstill: where every thread of that process was

A thread writes the file, also while the main thread waits in C code. Code that holds the interpreter's lock for good
stops that thread too: the stacks are then written by one of C, and the other processes say that this one is silent.
Work that is not told of here is no standstill: nothing is ended, only said.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import platform
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

INTERVAL = 15.0  # seconds between two beats; a shared folder shows them to other hosts up to a minute later
SILENT = 120.0  # seconds without a beat after which a process counts as gone or frozen
# A batch of long replies, a checkpoint on a slow disk or the loading of a large LM may take minutes; a collective that
# hangs takes for ever (start_processes lets processes wait for each other for a day).
STALLED = 600.0

FOLDER = "processes"
_PACKAGE = f"{Path(__file__).parent}{os.sep}"
_ROOT = f"{Path(__file__).parents[1]}{os.sep}"


# ---- what this process is doing -------------------------------------------------------------------------------------


@dataclass
class _Now:
    """Written by whoever works, read by the thread: single assignments, so no lock."""

    stage: str = ""
    phase: str = ""
    done: float = 0
    total: float = 0  # 0: not known
    tokens: int = 0  # that the base LM was given or has generated, padding aside
    positions: int = 0  # the same with padding
    asking: dict[str, int] = field(default_factory=dict)  # endpoint → requests without an answer yet
    busy: float = 0.0  # seconds in which a local model answered episodes
    at: float = field(default_factory=time.monotonic)  # of the last progress


now = _Now()
_clock_of = 0  # the process whose stacks' clock runs


def moved(done: float | None = None, total: float | None = None) -> None:
    """Something has been finished: `done` of `total` (0: not known) of what the run is at."""
    if done is not None:
        now.done = done
    if total is not None:
        now.total = total
    now.at = time.monotonic()


def counted(tokens: int, positions: int) -> None:
    """The base LM is about to read, or has written, so many tokens: `positions` with padding."""
    now.tokens += tokens
    now.positions += positions
    now.at = time.monotonic()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done inside; entering and leaving is progress."""
    before, now.phase = now.phase, name
    now.at = time.monotonic()
    try:
        yield
    finally:
        now.phase = before
        now.at = time.monotonic()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """The part of the run that is at work inside, with a count of its own; in another one, a part of that."""
    before = (now.stage, now.done, now.total)
    now.stage = f"{now.stage} / {name}" if now.stage else name
    now.done, now.total, now.at = 0, 0, time.monotonic()
    try:
        yield
    finally:
        (now.stage, now.done, now.total), now.at = before, time.monotonic()


@contextmanager
def asking(endpoint: str) -> Iterator[None]:
    """A request is out to `endpoint` inside; its answer is progress."""
    now.asking[endpoint] = now.asking.get(endpoint, 0) + 1
    try:
        yield
    finally:
        now.asking[endpoint] -= 1
        now.at = time.monotonic()


# ---- a beat ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beat:
    """One process as it last said it was. `at` and `progress` are seconds since 1970, of the beat and of the last
    progress; `place` is the innermost line of ours on the stack, `inside` the innermost of all where that is somebody
    else's; `waits` names the collective that it waits in; `rate` is `done` per second lately (0: not known)."""

    rank: int
    processes: int
    host: str
    pid: int
    at: float
    progress: float
    stage: str = ""
    phase: str = ""
    done: float = 0
    total: float = 0
    rate: float = 0
    place: str = ""
    inside: str = ""
    waits: str = ""
    asking: dict[str, int] = field(default_factory=dict)


def read_beats(output: Path) -> list[Beat]:
    """What the processes of the run in `output` last said, by rank. A file that cannot be read is none."""
    found = []
    for path in sorted((output / FOLDER).glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Beat(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda beat: beat.rank)


def standstill(beats: Sequence[Beat], at: float, after: float) -> str:
    """One sentence saying where the processes of a run are, when none of them has moved for `after` seconds; else "".

    First those that the others wait for. One without a beat for `SILENT` seconds is gone or frozen; one without a file
    has ended or never began.
    """
    quiet = [beat for beat in beats if at - beat.at > SILENT]
    alive = [beat for beat in beats if beat not in quiet]
    if not alive or any(at - beat.progress < after for beat in alive):
        return ""
    since = f"no progress for {duration(at - max(beat.progress for beat in beats))}"
    if max(beat.processes for beat in beats) == 1:
        return f"{since}: {where(alive[0])}"
    said = _grouped([beat for beat in alive if not beat.waits], "is", "are")
    said += [
        f"process {beat.rank} has been silent for {duration(at - beat.at)} (pid {beat.pid} on {beat.host}): "
        f"{where(beat)}"
        for beat in quiet
    ]
    if missing := sorted(set(range(max(beat.processes for beat in beats))) - {beat.rank for beat in beats}):
        said.append(f"{_ranks(missing)} {'is' if len(missing) == 1 else 'are'} not there (ended, or never began)")
    whom = " for it" if said else ""
    said += _grouped([beat for beat in alive if beat.waits], f"waits{whom}", f"wait{whom}")
    return f"{since}: {'; '.join(said)}"


def _grouped(beats: Sequence[Beat], one: str, several: str) -> list[str]:
    """Those at one place together, the ones that are behind first."""
    places: dict[str, list[int]] = {}
    for beat in sorted(beats, key=lambda beat: (beat.done, beat.rank)):
        places.setdefault(where(beat), []).append(beat.rank)
    return [f"{_ranks(ranks)} {several if len(ranks) > 1 else one} {where}" for where, ranks in places.items()]


def where(beat: Beat) -> str:
    """The place and, in brackets, what is done there: "at persona/lm/load.py:88 f (forward, 6 of 12 done)"."""
    parts = [
        f"in {beat.waits}" if beat.waits else "",
        f"at {beat.place}" if beat.place else "outside of our code",
        f"inside {beat.inside}" if beat.inside else "",
        f"stage {beat.stage}" if beat.stage else "",
        beat.phase,
        f"{beat.done:g} of {beat.total:g} done" if beat.total else "",
        *(
            f"{number} request{'s' if number > 1 else ''} to {name} unanswered"
            for name, number in beat.asking.items()
            if number
        ),
    ]
    place, *rest = [part for part in parts if part]
    return f"{place} ({', '.join(rest)})" if rest else place


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    shown = [str(rank) for rank in ranks[:8]] + ([f"{len(ranks) - 8} more"] if len(ranks) > 8 else [])
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"


def duration(seconds: float) -> str:
    """In the unit that fits: "40 s", "12 min", "3 h", "2 d"."""
    for size, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {word}"
    return f"{max(0, seconds):.0f} s"


# ---- where a process is ---------------------------------------------------------------------------------------------


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _spot(frame: FrameType) -> str:
    """As "persona/lm/load.py:88 load"; other files from their package on."""
    file = re.split(r"site-packages/|/python3\.\d+/", frame.f_code.co_filename.removeprefix(_ROOT))[-1]
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


def place(processes: int) -> tuple[str, str, str]:
    """(`place`, `inside`, `waits`) of a Beat for this process's main thread.

    A process waits for others in a function of torch.distributed, and in a backward pass: that is where DDP sums
    gradients, in C++. A GPU's own waiting is not seen: its process stands where the host next needs a result.
    """
    stacks = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = list(_frames(stacks.get(threading.main_thread().ident or 0)))
    if frames and frames[0].f_code.co_filename.endswith("selectors.py"):
        # The loop of an evaluation waits; what it waits for is a batch in the model's thread, or an endpoint.
        for other, top in stacks.items():
            if names.get(other, "").startswith("model") and any(map(_ours, busy := list(_frames(top)))):
                frames = busy
    ours = next((frame for frame in frames if _ours(frame)), None)
    waits = ""
    if processes > 1:
        for frame in frames:
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith("distributed/distributed_c10d.py") and not name.startswith("_"):
                waits = name
            elif file.endswith("nn/parallel/distributed.py"):
                waits = "the broadcast of DistributedDataParallel"
            elif frame is frames[0] and name == "_engine_run_backward":
                waits = "backward, where gradients are summed"
            if waits or frame is ours:
                break
    inside = _spot(frames[0]) if frames and frames[0] is not ours else ""
    return (_spot(ours) if ours else ""), inside, waits


def _ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return (file.startswith(_PACKAGE) and file != __file__) or file in (f"{_ROOT}train.py", f"{_ROOT}evaluate.py")


# ---- the thread that says so ----------------------------------------------------------------------------------------


class _Heart(threading.Thread):
    def __init__(self, output: Path, rank: int, processes: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.output, self.rank, self.processes = output, rank, processes
        self.path = output / FOLDER / f"rank-{rank}.json"
        self.stacks = output / FOLDER / f"rank-{rank}.stacks.txt"
        self._file: Any = None
        self._over = threading.Event()
        self._known: deque[tuple[float, str, float, float]] = deque(maxlen=20)  # (time, stage, total, done)
        self._armed = self._said = 0.0  # progress that the stacks' clock runs from; and since when all stand still
        self._complained = False

    def run(self) -> None:
        while not self._over.wait(INTERVAL):
            try:
                self.beat()
            except OSError as error:
                if not self._complained:  # a full disk is met, and said, by what the run itself writes
                    logger.warning("what process %d is doing cannot be written: %s", self.rank, error)
                self._complained = True

    def beat(self) -> None:
        # Clocks of hosts agree to seconds (Slurm itself needs that); what is compared is minutes.
        at, moment = time.time(), time.monotonic()
        beat = Beat(
            self.rank, self.processes, platform.node(), os.getpid(), at, at - (moment - now.at), now.stage, now.phase,
            now.done, now.total, self._rate(moment), *place(self.processes), dict(now.asking),
        )  # fmt: skip
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if self._armed != now.at:
            self._armed = now.at
            self._arm()
        if moment - now.at < STALLED:
            if self._said:
                logger.warning("there is progress again after %s", duration(moment - self._said))
            self._said = 0.0
        elif not self._said:
            beats = read_beats(self.output)
            first = next((other.rank for other in beats if at - other.at < SILENT), self.rank)
            sentence = standstill(beats, at, STALLED)
            if sentence and first == self.rank:
                logger.warning("%s; stacks are in %s", sentence, self.stacks.parent)
            if sentence:
                self._said = now.at

    def _rate(self, moment: float) -> float:
        what = (now.stage, now.total)
        if self._known and (self._known[-1][1:3] != what or self._known[-1][3] > now.done):
            self._known.clear()
        self._known.append((moment, *what, now.done))
        seconds, done = moment - self._known[0][0], now.done - self._known[0][3]
        return done / seconds if seconds else 0.0

    def _arm(self) -> None:
        """The clock of the stacks is C's own: it runs out also when no Python thread can."""
        global _clock_of
        if _clock_of not in (0, os.getpid()):  # a fork copies the clock without its thread: winding it would hang
            return
        if self._file is None:
            self._file = open(self.stacks, "w", encoding="utf-8")
        _clock_of = os.getpid()
        faulthandler.dump_traceback_later(STALLED, file=self._file)

    def end(self) -> None:
        global _clock_of
        self._over.set()
        self.join(timeout=5)
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            _clock_of = 0
            self._file.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            if self.stacks.is_file() and not self.stacks.stat().st_size:
                self.stacks.unlink()
            self.path.parent.rmdir()  # by the last one, and only when there are no stacks to keep


@contextmanager
def beating(output: Path | str) -> Iterator[None]:
    """While inside, this process says what it is doing in `output`; its place is what the launcher put into the
    environment. Nothing that goes wrong with it ends the run."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    heart = _Heart(Path(output), rank, processes)
    now.stage, now.phase, now.done, now.total, now.at = "", "", 0, 0, time.monotonic()
    try:
        heart.path.parent.mkdir(parents=True, exist_ok=True)
        if rank == 0:  # of a launch with more processes, that was killed
            for old in read_beats(Path(output)):
                if old.rank >= processes:
                    (heart.path.parent / f"rank-{old.rank}.json").unlink(missing_ok=True)
        heart.beat()  # from here on a kill leaves its place
        heart.start()
    except OSError as error:
        logger.warning("what process %d is doing cannot be written: %s", rank, error)
        yield
        return
    try:
        yield
    finally:
        heart.end()
