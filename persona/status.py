"""What runs below a folder are doing: `python -m persona.status outputs/` shows running, done and broken ones.

    run              what        state     progress                                last                seen
    seeds/seed_1     finetune    stopped   0.684 of 1 epochs                       loss 1.641          10 s ago
    seeds/seed_2     finetune    died      0.526 of 2 epochs                       loss 1.565          15 s ago
    town_character   character   running   dpo, 40 of 88, 1.5 s each, 1 min left   loss 0.1713         15 s ago

    seeds/seed_2: last seen at persona/training/… (inside torch/…, backward, 11 of 76 done)

A run that says it is running is looked for: its process on this machine, its job in Slurm's queue, and its heartbeat
(persona/heartbeat.py), which comes from every machine that shares the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from persona.errors import UserError
from persona.files import read_lines
from persona.heartbeat import SILENT, STALLED, Beat, duration, read_beats, standstill, where

COLOURS = {
    "running": "cyan",
    "done": "green",
    "stopped": "yellow",
    "stalled": "red",
    "waiting": "yellow",
    "died": "red",
    "failed": "red",
}
_STATE = "state.json"


@dataclass(frozen=True)
class Run:
    """One run. `progress`: steps while it runs, then epochs of a training or samples; `last`: its newest values;
    `at`: seconds since 1970 of its last sign of life; `message`: why it ended, or where it stands still."""

    name: str
    what: str
    state: str
    progress: str
    last: str
    at: float
    message: str


def runs(folder: Path | str) -> list[Run]:
    """All runs below `folder`, by name. Raises UserError when there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder with runs: give the one that train.py and evaluate.py write to (outputs)"
        )
    found = sorted(path.parent for path in folder.rglob(_STATE))
    queue = _Queue()
    return [_run(run, run.relative_to(folder).as_posix(), queue, time.time()) for run in found]


def _run(folder: Path, name: str, queue: _Queue, now: float) -> Run:
    state, beats = _json(folder / _STATE), read_beats(folder)
    config = _config(folder / "config.yaml")
    touched = [
        path.stat().st_mtime
        for path in (folder / _STATE, folder / "metrics.jsonl", *_samples(folder))
        if path.is_file()
    ]
    touched += [beat.at for beat in beats]
    shown, message = str(state.get("state", "unreadable")), str(state.get("message", ""))
    if shown == "running":
        shown = _lives(state, beats, queue, now)
        if shown == "running" and (message := standstill(beats, now, STALLED)):
            shown = "stalled"
        elif shown in ("died", "stalled") and beats:
            message = f"last seen {where(beats[0])}"
    evaluates = "benchmark" in config
    what = str((config.get("benchmark") or config.get("method") or {}).get("name", "?"))
    progress, last = _evaluated(folder) if evaluates else _trained(folder, config)
    if shown in ("running", "stalled"):
        progress = _going(beats) or progress
    return Run(name, what, shown, progress, last, max(touched), message)


# ---- how far -------------------------------------------------------------------------------------------------------


def _going(beats: Sequence[Beat]) -> str:
    """What the first process is at, how fast, and how long the slowest one has left."""
    if not beats or not beats[0].total:
        return beats[0].stage if beats else ""
    first, parts = beats[0], []
    if first.stage:
        parts.append(first.stage)
    parts.append(f"{first.done:g} of {first.total:g}")
    if rates := [beat.rate for beat in beats if beat.rate > 0]:
        parts.append(f"{rates[0]:.2g}/s" if rates[0] >= 1 else f"{1 / rates[0]:.2g} s each")
        left = max((beat.total - beat.done) / beat.rate for beat in beats if beat.rate > 0)
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def _trained(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Of the newest metrics, also of a stage: epochs done, and the losses."""
    files = [folder / "metrics.jsonl", *folder.glob("stages/work/*/metrics.jsonl")]
    files = sorted((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime)
    rows = [row for file in files[-1:] for row in read_lines(file)]
    if not rows:
        done = [
            path.stem for path in sorted(folder.glob("stages/records/*.json"), key=lambda path: path.stat().st_mtime)
        ]
        return (f"after {done[-1]}" if done else ""), ""
    values = {key: value for row in rows for key, value in row.items()}
    last = [
        f"{word} {values[key]:.4g}" for key, word in (("loss", "loss"), ("eval_loss", "dev loss")) if key in values
    ]
    return f"{values['epoch']:.3g} of {config.get('trainer', {}).get('epochs', 0):g} epochs", ", ".join(last)


def _samples(folder: Path) -> Iterator[Path]:
    return folder.glob("*/samples*.jsonl")


def _evaluated(folder: Path) -> tuple[str, str]:
    """Finished samples over all stacks, and the stacks whose summary is there."""
    count = 0
    for file in _samples(folder):
        with file.open("rb") as stream:
            count += sum(line.endswith(b"\n") for line in stream)
    summaries = sorted(path.parent.name for path in folder.glob("*/summary.json"))
    return f"{count} samples", ", ".join(summaries)


# ---- whether it lives ----------------------------------------------------------------------------------------------


def _lives(state: Mapping[str, Any], beats: Sequence[Beat], queue: _Queue, now: float) -> str:
    """What Slurm says of the job, else whether there is a process; from afar its last beat decides."""
    silent = bool(beats) and now - max(beat.at for beat in beats) > SILENT
    if "slurm_job" in state and (jobs := queue.jobs()) is not None:
        job = jobs.get(str(state["slurm_job"]), "")
        known = {"RUNNING": "running", "COMPLETING": "running", "PENDING": "waiting", "": "died"}
        found = known.get(job, job.lower())
    elif state.get("host") == platform.node():
        found = "running" if _began(int(state["pid"])) < (max(beat.at for beat in beats) if beats else now) else "died"
    elif beats:
        return "died" if silent else "running"
    else:
        return f"running on {state.get('host')}?"
    return "stalled" if found == "running" and silent else found


def _began(pid: int) -> float:
    """When this machine's process of that number began; never, if there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return math.inf


class _Queue:
    """Slurm's queue, asked once and only when a run of a job is met; None where there is none to be asked."""

    def __init__(self) -> None:
        self._asked = False
        self._jobs: dict[str, str] | None = None

    def jobs(self) -> dict[str, str] | None:
        if not self._asked:
            self._asked, self._jobs = True, _squeue()
        return self._jobs


def _squeue() -> dict[str, str] | None:
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", "--array", "--format=%A %T"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if answer.returncode:
        return None
    return dict(line.split() for line in answer.stdout.splitlines() if len(line.split()) == 2)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- what is shown -------------------------------------------------------------------------------------------------


def table(found: Sequence[Run], now: float) -> Table:
    """One row per run, and below one that needs a look why."""
    shown = Table(box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("run", "what", "state", "progress", "last", "seen"):
        shown.add_column(column, overflow="fold")
    for run in found:
        state = Text(run.state, style=COLOURS.get(run.state, ""))
        shown.add_row(run.name, run.what, state, run.progress, run.last, f"{duration(now - run.at)} ago")
    return shown


def messages(found: Sequence[Run]) -> Iterator[Text]:
    """Why a run failed or stopped, and where one stands still: a paragraph each, below the table."""
    for run in found:
        if run.message:
            yield Text.assemble((run.name, COLOURS.get(run.state, "")), f": {run.message}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="persona.status", description="What the runs below a folder are doing.")
    parser.add_argument("folder", nargs="?", default="outputs")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    arguments = parser.parse_args(argv)
    try:
        found = runs(arguments.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        for run in found:
            print(json.dumps(vars(run), sort_keys=True))
    elif found:
        Console().print(table(found, time.time()), *messages(found), sep="\n")
    else:
        print(f"no run below {arguments.folder} yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
