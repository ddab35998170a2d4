"""A command that is killed, and started again until it ends: which stage it was in, what it left, and whether that is
what it leaves when nothing happens to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from commands import started
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
MARK = "PERSONA_CHAOS"  # in the environment of everything that a chain starts, and so a name for its processes
# Of all processes, of one of several, of the one alone that started them.
GROUP, TERM, RANK, LAUNCHER = "SIGKILL", "SIGTERM", "SIGKILL of one rank", "SIGKILL of the launcher"
# Before a run has said that it runs; between two stages; behind its last one.
START, BETWEEN, END = "start", "between", "end"
PATIENCE = 900.0  # seconds for a run to end by itself
BOUND = 120.0  # … once it was killed or told to stop


# ---- what is run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command of ours. `arguments` may hold {root} (the folder around its output) and {url} (of the server that
    plays teacher and judge)."""

    name: str
    program: str
    arguments: tuple[str, ...]
    processes: int = 1
    launched: bool = False  # by launch=, always; else the processes are started as srun starts them

    def given(self, out: Path, url: str) -> list[str]:
        places = {"root": str(out.parent), "url": url}
        return [*(argument.format(**places) for argument in self.arguments), f"output={out}"]


def place_of(case: Case, out: Path, since: float, records: int = 0) -> str:
    """The stage that a run is in which was started at `since`, as its folder shows.

    `records` is how many stages there are (of an evaluation: stacks), where that is known.
    """
    if case.program == "evaluate.py":
        folder = next(iter((out / "evaluation").glob("*/state.json")), None)
        if folder is None or folder.stat().st_mtime < since:
            return START
        stacks = sorted(folder.parent.glob("*/meta.json"), key=lambda path: path.stat().st_mtime)
        open_stacks = [path.parent for path in stacks if not (path.parent / "summary.json").exists()]
        if open_stacks:
            return open_stacks[-1].name
        return START if not stacks else END if len(stacks) >= max(1, records) else BETWEEN
    state = out / "state.json"
    if not state.exists() or state.stat().st_mtime < since:
        return START
    work = out / "stages" / "work"
    if (out / "stages").exists():
        done = len(list(work.parent.glob("records/*")))
        return next((path.stem for path in work.glob("*.json")), BETWEEN if done < max(1, records) else END)
    metrics = out / "metrics.jsonl"
    if (out / "personalizer").exists():
        return END
    return "training" if metrics.exists() and metrics.stat().st_mtime >= since else "loading"


# ---- one start -----------------------------------------------------------------------------------------------------


class Tasks:
    """The processes of a command, which have everything imported (tests/commands.py); with the face of a Popen.

    Several find each other by the variables that srun sets, and nobody stands between them and us.
    """

    def __init__(self, case: Case, given: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.ranks = []
        several: dict[str, str] = {}
        if case.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            several |= {"WORLD_SIZE": str(case.processes), "LOCAL_WORLD_SIZE": str(case.processes)}
        for rank in range(case.processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {}
            before = partial(begin, {**environment, **several, **place})
            self.ranks.append(started(case.program, given, before, log, log))

    def poll(self) -> int | None:
        """None while one is alive; then the first status that is not 0."""
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 0.0)
        for rank in self.ranks:
            rank.join(None if timeout is None else max(0.0, end - time.monotonic()))
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("tasks", timeout or 0.0)
        return code

    def terminate(self) -> None:
        for rank in self.ranks:
            rank.terminate()


def begin(environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as where Python was started by a user
    os.setsid()
    os.environ.update(environment)


@dataclass
class Run:
    """A started command; everything that comes of it carries `mark` in its environment."""

    case: Case
    out: Path
    log: Path
    url: str
    fork: bool = False
    records: int = 0
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    since: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()  # a process that is killed early never opens it
        given = self.case.given(self.out, self.url)
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment = {**threads, "WANDB_MODE": "disabled", MARK: self.mark}
        self.process: Tasks | subprocess.Popen
        if self.fork and not self.case.launched:
            self.process = Tasks(self.case, given, environment, self.log)
            return
        given += ["launch=ddp", f"launch.num_processes={self.case.processes}"] if self.case.processes > 1 else []
        with open(self.log, "wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, self.case.program, *given], cwd=ROOT, stdout=stream,
                env=os.environ | environment, stderr=stream, start_new_session=True,
            )  # fmt: skip

    @property
    def place(self) -> str:
        """The stage that it is in."""
        try:
            return place_of(self.case, self.out, self.since, self.records)
        except FileNotFoundError:  # gone between two looks
            return self.place

    def alive(self) -> list[psutil.Process]:
        """All processes that came of the command, whoever their parent is now."""
        sessions = {rank.pid for rank in self.process.ranks} if isinstance(self.process, Tasks) else set()
        found = []
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) in sessions or process.environ().get(MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes of several, in no order."""
        if isinstance(self.process, Tasks):
            pids = [rank.pid for rank in self.process.ranks if rank.exitcode is None]
            return [psutil.Process(pid) for pid in pids if pid and psutil.pid_exists(pid)]
        return [process for process in self.alive() if process.ppid() == self.process.pid]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.alive():  # where this program itself is stopped
            process.kill()

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Whether there was something to kill."""
        if self.process.poll() is not None:
            return False
        if kind == TERM:
            self.process.terminate()
        elif kind == LAUNCHER and isinstance(self.process, subprocess.Popen):
            self.process.kill()
        elif kind == GROUP:
            for process in self.alive():
                process.kill()
        else:
            ranks = self.ranks()
            if len(ranks) < 2:
                return False
            rng.choice(ranks).kill()
        return True

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status as a shell gives it. Raises TimeoutExpired, once everything has been killed."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for process in self.alive():
                process.kill()
            self.process.wait()
            raise
        return 128 - code if code < 0 else code

    def terminate_in(self, seconds: float) -> None:
        """SIGTERM and, as a process that waits for another does not see that, SIGKILL for whoever is left."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return
        self.process.terminate()
        for process in self.alive():
            process.kill()

    def orphans(self, seconds: float = 5.0) -> list[str]:
        """What is alive although the command has ended, `seconds` after; it is killed."""
        end = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < end:
            time.sleep(0.1)
        told = [" ".join(process.cmdline())[:200] for process in left]
        for process in left:
            process.kill()
        return told


# ---- the uninterrupted run -----------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What nothing happened to: its folder, and how long it was in each stage."""

    out: Path
    seconds: dict[str, float]  # in the order of the stages

    @property
    def records(self) -> int:
        return sum(len(list(self.out.glob(where))) for where in ("stages/records/*", "evaluation/*/*/summary.json"))


def uninterrupted(case: Case, root: Path, url: str, fork: bool = False) -> Reference:
    seconds: dict[str, float] = {}
    before = time.monotonic()
    with Run(case, root / "whole" / "out", root / "whole.log", url, fork) as run:
        while run.process.poll() is None:
            time.sleep(0.02)
            now, where = time.monotonic(), run.place
            seconds[where] = seconds.get(where, 0.0) + now - before
            before = now
        if code := run.wait():
            raise RuntimeError(f"{case.name} failed with status {code} before anything was killed: {tail(run.log)}")
    return Reference(run.out, seconds)


def tail(log: Path, size: int = 2000) -> str:
    return log.read_text(errors="replace")[-size:]


# ---- a chain -------------------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """What became of one run that was killed several times and then ended."""

    case: str
    kills: list[tuple[str, str]] = field(default_factory=list)  # kind, place
    starts: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds until all ranks had ended after one was killed


def chain(
    case: Case,
    reference: Reference,
    root: Path,
    url: str,
    kills: int,
    rng: random.Random,
    kinds: Sequence[str],
    hits: Counter[str],
    say: Callable[[str], None] = lambda text: None,
) -> Chain:
    """One run killed up to `kills` times, in those stages that `hits` counts least, and then left to end."""
    made, out = Chain(case.name), root / "out"
    order = [*(where for where in reference.seconds if where != END), END]
    wanted = list(targets(reference, kills, rng, hits))
    while True:
        made.starts += 1
        with Run(case, out, root / f"{made.starts}.log", url, fork=True, records=reference.records) as run:
            target = wanted.pop(0) if wanted else None
            where = watched(run, order, target, reference, rng) if target else ""
            kind = rng.choice(kinds)
            if not where or not run.kill(kind, rng):
                code = run.wait()
                made.orphans += run.orphans()
                if code:
                    made.wrong.append(f"start {made.starts} ended with status {code}: {last_line(run.log)}")
                    say(tail(run.log))
                    return made
                break
            at = time.monotonic()
            if kind == RANK and where == START:
                # Perhaps they have not found each other yet; srun (--kill-on-bad-exit) ends those that are left.
                run.terminate_in(10)
            try:
                code = run.wait(BOUND)
            except subprocess.TimeoutExpired:
                made.unclear.append(f"{kind} in {where}: it had not ended after {BOUND:.0f} s ({run.log})")
                code = None
            if kind == RANK:
                made.slowest = max(made.slowest, time.monotonic() - at)
            made.orphans += run.orphans()
            made.kills.append((kind, where))
            hits[where] += 1
            made.unclear += said(case, run, kind, where, code)
            say(f"{case.name}: {kind} in {where}, status {code}, {time.monotonic() - at:.1f} s until it ended")
    found = compare(reference.out, out)
    made.lost, made.doubled, made.wrong = found.lost, found.doubled, made.wrong + found.wrong
    return made


def targets(reference: Reference, kills: int, rng: random.Random, hits: Counter[str]) -> Iterator[str]:
    """Stages to be killed in, in their order; those come first that were hit least for the time that they take.

    One kill in ten falls into the start, and one in ten behind the last stage, where the personalizer is written.
    """
    planned = Counter(hits)
    chosen: list[str] = []
    stages = [where for where in reference.seconds if where not in (START, BETWEEN, END)]
    for _ in range(kills):
        if (drawn := rng.random()) < 0.2:
            chosen.append(START if drawn < 0.1 else END)
            continue
        fewest = min(planned[where] for where in stages)
        where = rng.choice([where for where in stages if planned[where] == fewest])
        planned[where] += 1
        chosen.append(where)
    order = [START, *stages, END]
    yield from sorted(chosen, key=order.index)


def watched(run: Run, order: Sequence[str], target: str, reference: Reference, rng: random.Random) -> str:
    """Wait for a random moment of the stage `target`, or the first one after it: where it is then; "" if it ended."""
    late = rng.random() * reference.seconds.get(target, 0.0)
    seen: float | None = None
    while run.process.poll() is None:
        where = run.place
        if where == target and seen is None:
            seen = time.monotonic()
        beyond = where in order and where != START and order.index(where) > order.index(target)
        if beyond or (seen is not None and time.monotonic() - seen >= late):
            return where
        time.sleep(0.01)
    return ""


def said(case: Case, run: Run, kind: str, where: str, code: int | None) -> list[str]:
    """What was wrong with how a run took its end: after SIGTERM one sentence and status 143, once it had begun."""
    if kind != TERM or code in (None, 0):  # it had just ended by itself
        return []
    text = run.log.read_text(errors="replace")
    wrong = []
    if case.processes == 1 and code != 143:
        wrong.append(f"status {code}")
    told = [line for line in text.splitlines() if "the same command goes on from" in line]
    if where != START and not 1 <= len(told) <= case.processes:
        wrong.append(f"{len(told)} sentences")
    if case.processes == 1 and "Traceback" in text:
        wrong.append("a traceback")
    return [f"SIGTERM in {where}: {', '.join(wrong)} ({run.log})"] if wrong else []


def last_line(log: Path) -> str:
    return next((line for line in reversed(tail(log).splitlines()) if line.strip()), "nothing was said")[:300]


# ---- what it left --------------------------------------------------------------------------------------------------

TOLERANCE = 0.0  # nothing is summed in another order because of a kill
# When, where and how fast something ran; and hashes of files that hold such values. wandb's and Hydra's own files.
VOLATILE = {
    *("started", "seconds", "at", "pid", "host", "usage", "inputs", "outputs", "git", "command"),
    # MEASURED of persona/training/watch.py, without its seconds of imports
    *("samples_per_second", "tokens_per_second", "seconds_per_step", "data_wait", "memory_gb", "memory_reserved_gb"),
    *("padding", "mfu", "slowest_process", "slowest_over_mean"),
    *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
    *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
}
SKIPPED = ("checkpoints", "wandb", ".hydra", "report.html", "store")


@dataclass
class Found:
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def files(out: Path) -> dict[str, Path]:
    found = (path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path for path in found}


def temporary(name: str) -> bool:
    parts = Path(name).parts
    return any(part.endswith((".tmp", ".old", ".staging")) or ".part" in part for part in parts)


def compare(whole: Path, out: Path) -> Found:
    """What of `out` is not as in `whole`: rows by file, and every other difference."""
    found = Found()
    ours, theirs = files(out), files(whole)
    found.wrong += [f"left over: {name}" for name in ours if temporary(name)]
    hidden = [path for path in out.rglob("*") if path.is_dir() and temporary(path.relative_to(out).as_posix())]
    found.wrong += [f"left over: {path.relative_to(out)}" for path in hidden]

    def counts(name: str) -> bool:
        return not temporary(name) and not any(part in SKIPPED for part in Path(name).parts) and "usage" not in name

    for name in sorted({*ours, *theirs}):
        if not counts(name):
            continue
        if name not in ours or name not in theirs:
            found.wrong.append(f"{name} is {'missing' if name not in ours else 'new'}")
        elif name.endswith(".jsonl"):
            rows(name, read(ours[name], out), read(theirs[name], whole), found)
        elif name.endswith(".safetensors"):
            found.wrong += tensors(name, ours[name], theirs[name])
        elif name.endswith(".json"):
            one, other = read(ours[name], out)[0], read(theirs[name], whole)[0]
            if difference := unlike(one, other, TOLERANCE):
                found.wrong.append(f"{name}: {difference}")
        elif (
            name.endswith((".txt", ".jinja", ".html", ".csv")) and ours[name].read_bytes() != theirs[name].read_bytes()
        ):
            found.wrong.append(f"{name} differs")
    return found


def read(path: Path, out: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8").replace(str(out.parent), "ROOT")
    return [plain(json.loads(line)) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if key not in VOLATILE}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def rows(name: str, ours: list[Any], theirs: list[Any], found: Found) -> None:
    """Rows go by their id, logged values by step and keys, everything else by content."""

    def key(row: dict[str, Any]) -> str:
        if "id" in row:
            return str(row["id"])
        return f"step {row['step']} {' '.join(sorted(row))[:60]}" if "step" in row else json.dumps(row, sort_keys=True)

    one, other = Counter(map(key, ours)), Counter(map(key, theirs))
    found.lost += [f"{name}: {row}" for row in (other - one).elements()]
    found.doubled += [f"{name}: {row}" for row in (one - other).elements()]
    if one == other:
        for mine, its in zip(ours, theirs, strict=True):
            if difference := unlike(mine, its, TOLERANCE):
                found.wrong.append(f"{name}, {key(mine)}: {difference}")


def unlike(one: Any, other: Any, tolerance: float, where: str = "") -> str:
    """The first place in which two JSON values differ; "" where there is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where} has other keys: {', '.join(sorted({*one} ^ {*other}))}"
        pairs = [(one[key], other[key], f"{where}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(a, b, f"{where}[{number}]") for number, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) and isinstance(other, (int, float)):
        return "" if abs(one - other) <= tolerance * max(1.0, abs(other)) else f"{where} is {one}, not {other}"
    else:
        return "" if one == other else f"{where} is {one!r:.80}, not {other!r:.80}"
    return next((found for a, b, place in pairs if (found := unlike(a, b, tolerance, place))), "")


def tensors(name: str, ours: Path, theirs: Path) -> list[str]:
    if ours.read_bytes() == theirs.read_bytes():
        return []
    with safe_open(ours, "pt") as one, safe_open(theirs, "pt") as other:
        if sorted(one.keys()) != sorted(other.keys()):
            return [f"{name} has other tensors"]
        pairs = [(one.get_tensor(key).double(), other.get_tensor(key).double()) for key in one.keys()]
    if any(a.shape != b.shape for a, b in pairs):
        return [f"{name} has other shapes"]
    far = max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)
    return [f"{name} differs by up to {far:.3g}"] if far > TOLERANCE else []
