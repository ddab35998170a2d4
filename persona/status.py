"""What runs below a folder are doing: `python -m persona.status outputs/` shows running, done and broken ones.

    run                          what                    state      progress   last              at
    town_persona_plug            persona_plug            done       2 of 2     loss 0.61         03:12
    seeds/trainer.seed=1         persona_plug            running    .7 of 2    loss 0.93         a minute ago
    seeds/trainer.seed=2         persona_plug            died       .1 of 2    loss 2.11         2 h ago

A run that says it is running is looked for: its process on this machine, its job in Slurm's queue on others.
"""

from __future__ import annotations

import argparse
import json
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
from rich.console import Console
from rich.table import Table

from persona.errors import UserError
from persona.files import read_lines

COLOURS = {
    "running": "cyan",
    "done": "green",
    "stopped": "yellow",
    "waiting": "yellow",
    "died": "red",
    "failed": "red",
}
_STATE = "state.json"


@dataclass(frozen=True)
class Run:
    """One run. `progress`: epochs of a training, samples of an evaluation; `last`: its newest values; `at`: seconds
    since 1970 of its last sign of life; `message`: why it failed or stopped."""

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
    return [_run(run, run.relative_to(folder).as_posix(), queue) for run in found]


def _run(folder: Path, name: str, queue: _Queue) -> Run:
    state = _json(folder / _STATE)
    config = _config(folder / "config.yaml")
    touched = [
        path.stat().st_mtime
        for path in (folder / _STATE, folder / "metrics.jsonl", *_samples(folder))
        if path.is_file()
    ]
    shown = str(state.get("state", "unreadable"))
    if shown == "running":
        shown = queue.state(state)
    evaluates = "benchmark" in config
    what = str((config.get("benchmark") or config.get("method") or {}).get("name", "?"))
    progress, last = _evaluated(folder) if evaluates else _trained(folder, config)
    return Run(name, what, shown, progress, last, max(touched), str(state.get("message", "")))


# ---- how far -------------------------------------------------------------------------------------------------------


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
    return f"{values['epoch']:g} of {config.get('trainer', {}).get('epochs', 0):g}", ", ".join(last)


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


class _Queue:
    """Slurm's queue, asked once and only when a run of another machine is in it."""

    def __init__(self) -> None:
        self._jobs: dict[str, str] | None = None

    def state(self, state: Mapping[str, Any]) -> str:
        if state.get("host") == platform.node() and "slurm_job" not in state:
            return "running" if psutil.pid_exists(int(state["pid"])) else "died"
        if "slurm_job" not in state:
            return f"running on {state.get('host')}?"
        if self._jobs is None:
            self._jobs = _squeue()
        job = self._jobs.get(str(state["slurm_job"]), "")
        return {"RUNNING": "running", "COMPLETING": "running", "PENDING": "waiting", "": "died"}.get(job, job.lower())


def _squeue() -> dict[str, str]:
    if not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%A %T"]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    return dict(line.split() for line in listing.splitlines() if len(line.split()) == 2)


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
    """One row per run, and under a failed one why."""
    shown = Table(title_justify="left")
    for column in ("run", "what", "state", "progress", "last", "seen"):
        shown.add_column(column, overflow="fold")
    for run in found:
        colour = COLOURS.get(run.state, "default")
        state = f"[{colour}]{run.state}[/]"
        shown.add_row(run.name, run.what, state, run.progress, run.last, _ago(now - run.at))
        if run.message and run.state in ("failed", "stopped"):
            shown.add_row("", "", "", "", f"[dim]{run.message}[/]", "")
    return shown


def _ago(seconds: float) -> str:
    for size, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {word} ago"
    return f"{max(0, seconds):.0f} s ago"


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
        Console().print(table(found, time.time()))
    else:
        print(f"no run below {arguments.folder} yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
