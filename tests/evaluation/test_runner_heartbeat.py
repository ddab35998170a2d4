"""An evaluation that stands still says what it waits for: an endpoint, or a model in its own thread."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from evaluation_toys import ToyModel
from fault_server import Answer, FaultServer
from test_runner import Graded, endpoint

from persona import heartbeat
from persona.evaluation.batching import AsyncModel
from persona.evaluation.episodes import run_benchmark
from persona.evaluation.roles import Cast


class Sleepy(ToyModel):
    """Its third batch takes 2 s."""

    calls = 0

    def respond(self, requests):
        self.calls += 1
        if self.calls == 3:
            time.sleep(2)
        return super().respond(requests)


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "STALLED", 0.8)
    caplog.set_level(logging.WARNING, "persona.heartbeat")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "persona.heartbeat"]


def measured(tmp_path, cast):
    with heartbeat.beating(tmp_path):
        run_benchmark(Graded(12), cast, tmp_path / "toy", stack="toy", settings={}, batch_size=4, progress=False)


def test_an_endpoint_that_does_not_answer(tmp_path, said):
    late = threading.Event()

    def plan(seen):
        if "s11" in seen.text and not late.is_set():
            late.set()
            return Answer(seconds=2)
        return Answer()

    with FaultServer(plan) as server:
        measured(tmp_path, Cast(ToyModel(), judges=[endpoint(server)]))
    lines = said()  # a machine that is busy may stand still more often
    at = next(i for i, line in enumerate(lines) if "toy, 11 of 12 done, 1 request to judge-7b unanswered)" in line)
    # The run may end before another beat.
    assert all(line.startswith("there is progress again after ") for line in lines[at + 1 : at + 2])


def test_a_model_that_takes_its_time(tmp_path, said):
    """The main thread waits for all that is open; where the model is, is in the thread beside it."""
    measured(tmp_path, Cast(Sleepy()))
    first = next(line for line in said() if "8 of 12" in line)
    assert f"at persona/evaluation/batching.py:{line_of_respond()} _answers (inside tests/evaluation/" in first
    assert "_heartbeat.py" in first and "stage graded · toy, 8 of 12 done)" in first


def line_of_respond() -> int:
    import inspect

    lines, start = inspect.getsourcelines(AsyncModel._answers)
    return start + next(i for i, line in enumerate(lines) if "self._model.respond" in line)
