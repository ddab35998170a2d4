"""The table of runs: what each state is read from."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from persona.config import load_config, run_state, save_run_files
from persona.errors import UserError
from persona.heartbeat import Beat
from persona.status import Run, main, runs, table
from persona.training.trainer import Stopped


def one(folder: Path):
    (run,) = runs(folder)
    return run


def test_a_run_says_where_it_is_and_how_it_ended(tmp_path):
    out = tmp_path / "a" / "b"
    save_run_files(out, load_config("train", ["trainer.epochs=3"]))
    with run_state(out):
        (out / "metrics.jsonl").write_text(
            '{"step": 4, "epoch": 1.5, "loss": 2.25}\n{"step": 4, "epoch": 1.5, "eval_loss": 3}\n'
        )
        run = one(tmp_path)
        assert (run.name, run.what, run.state) == ("a/b", "persona_plug", "running")
        assert (run.progress, run.last) == ("1.5 of 3 epochs", "loss 2.25, dev loss 3")
    assert one(tmp_path).state == "done"
    with pytest.raises(Stopped), run_state(out):
        raise Stopped(7, out)
    assert one(tmp_path).state == "stopped" and "step 7" in one(tmp_path).message
    with pytest.raises(ValueError), run_state(out):
        raise ValueError("no such thing\nmore")
    assert (one(tmp_path).state, one(tmp_path).message) == ("failed", "ValueError: no such thing")
    with pytest.raises(UserError), run_state(out):
        raise UserError("the file is missing")
    assert one(tmp_path).message == "the file is missing"


def test_a_killed_run_is_told_from_one_that_runs(tmp_path):
    child = os.fork()
    if not child:
        try:
            with run_state(tmp_path / "x"):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert one(tmp_path).state == "died"
    state = {"state": "running", "at": "", "host": platform.node(), "pid": os.getpid(), "message": ""}
    (tmp_path / "x" / "state.json").write_text(json.dumps(state))
    assert one(tmp_path).state == "running"
    (tmp_path / "x" / "state.json").write_text(json.dumps({**state, "pid": 2**30}))
    assert one(tmp_path).state == "died" and one(tmp_path).message.startswith("last seen ")
    (tmp_path / "x" / "state.json").write_text("{")
    assert one(tmp_path).state == "unreadable"


def said(folder: Path, *beats: Beat, host: str = "elsewhere") -> Run:
    """The run in `folder` on another machine whose processes last said this."""
    (folder / "processes").mkdir(exist_ok=True)
    state = {"state": "running", "at": "", "host": host, "pid": os.getpid(), "message": ""}
    (folder / "state.json").write_text(json.dumps(state))
    for beat in beats:
        (folder / "processes" / f"rank-{beat.rank}.json").write_text(json.dumps(asdict(beat)))
    return one(folder)


def test_from_afar_the_heartbeat_decides(tmp_path):
    assert said(tmp_path).state == "running on elsewhere?"
    now = time.time()
    beats = [Beat(rank, 2, "elsewhere", 7, now - 9, now - 20, "dpo", "forward", 100, 400, 2.0) for rank in (0, 1)]
    assert said(tmp_path, *beats).state == "running"
    # The slowest process decides what is left.
    run = said(tmp_path, replace(beats[1], rate=0.5))
    assert run.progress == "dpo, 100 of 400, 2/s, 10 min left"
    run = said(tmp_path, *(replace(beat, progress=now - 780, place="persona/a.py:1 f") for beat in beats))
    assert run.state == "stalled"
    assert run.message.startswith(
        "no progress for 13 min: processes 0 and 1 are at persona/a.py:1 f (stage dpo, forward"
    )
    run = said(tmp_path, *(replace(beat, at=now - 400, place="persona/a.py:1 f") for beat in beats))
    assert run.state == "died"
    assert run.message == "last seen at persona/a.py:1 f (stage dpo, forward, 100 of 400 done)"


def test_where_slurm_cannot_be_asked_the_heartbeat_of_a_job_decides(tmp_path, monkeypatch):
    (tmp_path / "slurm.conf").touch()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    now = time.time()
    beat = Beat(0, 1, "elsewhere", 7, now - 9, now - 20)
    said(tmp_path, beat)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "slurm_job": "12"}))
    assert one(tmp_path).state == "running"
    (tmp_path / "processes" / "rank-0.json").write_text(json.dumps(asdict(replace(beat, at=now - 400))))
    assert one(tmp_path).state == "died"


def test_a_frozen_process_is_no_dead_one(tmp_path, monkeypatch):
    """It is there, but even its heart does not beat; unless the number is another process's by now."""
    monkeypatch.setattr("persona.status.SILENT", 0.5)
    began, now = psutil.Process().create_time(), time.time()
    frozen = Beat(0, 1, platform.node(), os.getpid(), now - 1, now - 1, place="persona/a.py:1 f")
    assert said(tmp_path, frozen, host=platform.node()).state == "stalled"
    assert said(tmp_path, replace(frozen, at=began - 1000), host=platform.node()).state == "died"


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run_state(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_an_evaluation_and_a_run_of_stages(tmp_path):
    save_run_files(tmp_path / "e", load_config("evaluate", ["benchmark=town"]))
    with run_state(tmp_path / "e"):
        stack = tmp_path / "e" / "untouched"
        stack.mkdir()
        (stack / "samples.part0.jsonl").write_text('{"id": 1}\n{"id": 2}\n{"id"')
    save_run_files(tmp_path / "s", load_config("train", ["experiment=town_character"]))
    with run_state(tmp_path / "s"):
        (tmp_path / "s" / "stages" / "records").mkdir(parents=True)
        (tmp_path / "s" / "stages" / "records" / "expand.json").write_text("{}")
    evaluation, stages = runs(tmp_path)
    assert (evaluation.what, evaluation.progress, evaluation.last) == ("town", "2 samples", "")
    assert (stages.what, stages.progress) == ("character", "after expand")


def test_the_command(tmp_path, capsys):
    with run_state(tmp_path / "x"):
        pass
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "done"
    console = Console(record=True, width=120)
    console.print(table(runs(tmp_path), now=runs(tmp_path)[0].at + 7200))
    assert "2 h ago" in console.export_text()
    assert main([str(tmp_path / "nothing")]) == 2
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 0
