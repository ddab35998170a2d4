"""What a standstill's sentence says, by cases; and a process that is stuck in C code, killed, or alone."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from persona import heartbeat
from persona.heartbeat import Beat, beating, moved, phase, read_beats, stage, standstill
from persona.progress import Bar

ROOT = Path(__file__).resolve().parents[1]
NOW = 1_000_000.0
SAD = Beat(0, 1, "node1", 7, at=NOW - 5, progress=NOW - 700, phase="forward", place="persona/a.py:3 f")


def four(*beats: Beat) -> str:
    return standstill([replace(beat, rank=rank, processes=4) for rank, beat in enumerate(beats)], NOW, 600)


def test_alone():
    assert standstill([SAD], NOW, 600) == "no progress for 12 min: at persona/a.py:3 f (forward)"
    busy = replace(SAD, stage="dpo", done=6, total=12, inside="torch/x.py:1 g", asking={"judge-7b": 3, "other": 0})
    assert standstill([busy], NOW, 600).endswith(
        "f (inside torch/x.py:1 g, stage dpo, forward, 6 of 12 done, 3 requests to judge-7b unanswered)"
    )
    assert standstill([replace(SAD, progress=NOW - 599)], NOW, 600) == "" == standstill([], NOW, 600)


def test_several():
    waits = replace(SAD, waits="all_reduce", place="persona/b.py:9 step", phase="")
    wait = "in all_reduce (at persona/b.py:9 step)"
    assert four(waits, SAD, waits, waits) == (
        f"no progress for 12 min: process 1 is at persona/a.py:3 f (forward); processes 0, 2 and 3 wait for it {wait}"
    )
    # One that moves is no standstill, whoever waits for it: an evaluation may have hours left on one process.
    assert four(waits, replace(SAD, progress=NOW - 20), waits, waits) == ""
    # A process that is gone does not move any more, whatever it did last.
    gone = replace(SAD, at=NOW - 650, progress=NOW - 650, host="node2", pid=8)
    assert four(waits, gone, waits, waits) == (
        "no progress for 11 min: process 1 has been silent for 11 min (pid 8 on node2): at persona/a.py:3 f "
        f"(forward); processes 0, 2 and 3 wait for it {wait}"
    )
    assert four(waits, waits, waits).endswith(
        f"process 3 is not there (ended, or never began); processes 0, 1 and 2 wait for it {wait}"
    )
    assert four(waits, waits, waits, waits).endswith(f"processes 0, 1, 2 and 3 wait {wait}")
    # Who is behind comes first.
    ahead, behind = (replace(SAD, done=done, total=9) for done in (5, 4))
    assert re.search("process 2 is .* 4 of 9 done.*; processes 0, 1 and 3 are", four(ahead, ahead, behind, ahead))


@pytest.fixture
def quick(monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "STALLED", 0.5)
    caplog.set_level(logging.WARNING, "persona.heartbeat")
    return caplog


def test_a_run_alone_that_stands_still_says_so_once(quick, tmp_path):
    with beating(tmp_path):
        with stage("encode"), Bar("", 3, show=False) as bar:
            moved(1, 3)
            bar.advance()
            time.sleep(1.3)
            (beat,) = read_beats(tmp_path)
            assert (beat.stage, beat.done, beat.total, beat.pid) == ("encode", 1, 3, os.getpid())
            bar.advance()
            time.sleep(0.2)
    said = [record.getMessage() for record in quick.records]
    assert len(said) == 2, said
    # Nothing of the package is on this stack but the test itself.
    assert re.match(r"no progress for \d s: outside of our code \(inside tests/test_heartbeat.py:\d+ ", said[0])
    assert "stage encode, 1 of 3 done)" in said[0] and "progress again" in said[1]
    assert [path.name for path in (tmp_path / "processes").iterdir()] == ["rank-0.stacks.txt"]
    assert "test_heartbeat.py" in (tmp_path / "processes" / "rank-0.stacks.txt").read_text()


def test_nothing_is_left_of_a_run_that_moved(quick, tmp_path):
    before = threading.active_count()
    with beating(tmp_path):
        for _ in range(8):
            with phase("forward"):
                time.sleep(0.1)
        assert read_beats(tmp_path)[0].phase in ("forward", "")
    assert not quick.records and not list(tmp_path.iterdir()) and threading.active_count() == before


def test_a_folder_that_cannot_be_written_does_not_end_the_run(quick, tmp_path):
    (tmp_path / "processes").write_text("")
    with beating(tmp_path):
        pass
    assert "cannot be written" in quick.text


def test_an_error_goes_through(tmp_path):
    with pytest.raises(ValueError), beating(tmp_path):
        raise ValueError
    assert not list(tmp_path.iterdir())


# The pattern's backtracking takes ages, without ever giving the interpreter's lock away.
HANGS = """
import re, sys
from persona import heartbeat
heartbeat.INTERVAL, heartbeat.STALLED = 0.05, 0.5
with heartbeat.beating(sys.argv[1]):
    import time; time.sleep(0.2)
    re.match(r"(a+)+$", "a" * 60 + "b")
"""


def test_c_code_that_keeps_the_lock_and_a_kill(tmp_path):
    """No Python thread runs then: C's clock writes the stacks. What a killed process last said stays."""
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)], cwd=ROOT)
    stacks = tmp_path / "processes" / "rank-0.stacks.txt"
    try:
        end = time.time() + 60
        while not (stacks.is_file() and "re" in stacks.read_text()):
            assert time.time() < end
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (beat,) = read_beats(tmp_path)
    assert beat.pid == process.pid and time.time() - beat.at > 0.3
