"""Signals at every moment of a run, whole saves in their budget, and one wandb run over interruptions."""

from __future__ import annotations

import json
import logging
import os
import signal
import time

import pytest
from test_checkpoints import without_times
from torch import nn
from training_toys import Points, Toy, curve, in_two, run
from transformers import TrainerCallback, TrainerState

from persona.config import run_state
from persona.errors import UserError
from persona.training.checkpoints import damage, manifest, newest, steps
from persona.training.signals import Signals, Stopped, expected_seconds


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


class Kills(Points):
    """Dev data that sends a signal when an evaluation reads item `at` for the `time`th time."""

    def __init__(self, n: int, at: int, time: int = 1, rank: int = 0):
        super().__init__(n)
        self.at, self.left, self.rank = at, time, rank

    def __getitem__(self, index: int):
        if index == self.at and os.environ.get("RANK", "0") == str(self.rank):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


@pytest.mark.parametrize("evaluation", (1, 3))
def test_an_evaluation_that_was_left_is_made_up_for(whole, tmp_path, evaluation):
    """The second of two batches: at step 4, and at the last step, 12. Losses, dropout and dev losses are the same."""
    step = 4 * evaluation
    with pytest.raises(Stopped, match="143") as stopped:
        run(tmp_path, dev=Kills(8, at=5, time=evaluation))
    assert stopped.value.message.startswith(f"stopped after step {step};")
    assert manifest(newest(tmp_path / "checkpoints"))["evaluated"] is False
    assert max(curve(tmp_path)) == step and step not in curve(tmp_path, "eval_loss")
    run(tmp_path)
    one, other = ({row["step"]: row for row in without_times(out) if "eval_loss" in row} for out in (tmp_path, whole))
    assert one == other and curve(tmp_path) == curve(whole)
    assert manifest(newest(tmp_path / "checkpoints"))["evaluated"] is True or step == 12
    for name in ("model", "optimizer", "rng"):
        ours, theirs = (newest(out / "checkpoints") / f"{name}.safetensors" for out in (tmp_path, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_made_up_evaluation_that_is_stopped_too(whole, tmp_path):
    for _ in range(2):
        with pytest.raises(Stopped, match="143"):
            run(tmp_path, dev=Kills(8, at=2))
        assert newest(tmp_path / "checkpoints").name == "checkpoint-4"
    run(tmp_path)
    assert curve(tmp_path, "eval_loss") == curve(whole, "eval_loss") and curve(tmp_path) == curve(whole)


class At(TrainerCallback):
    def __init__(self, event: str):
        setattr(self, event, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGUSR1))


def test_before_the_first_step(whole, tmp_path):
    with pytest.raises(Stopped, match="143"):
        run(tmp_path, callbacks=[At("on_train_begin")])
    assert not steps(tmp_path / "checkpoints")
    run(tmp_path)
    assert curve(tmp_path) == curve(whole)


def test_at_the_very_end_what_follows_is_left_to_the_next_start(whole, tmp_path):
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, callbacks=[At("on_train_end")])
    assert "after step 12" in stopped.value.message and newest(tmp_path / "checkpoints").name == "checkpoint-12"
    run(tmp_path)
    assert curve(tmp_path) == curve(whole)


def test_signals_while_it_saves_damage_nothing(whole, tmp_path, monkeypatch):
    save = TrainerState.save_to_json

    def signalled(state, path):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        save(state, path)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(TrainerState, "save_to_json", signalled)
        run(tmp_path)
    found = steps(tmp_path / "checkpoints")
    assert found and all(damage(folder) is None for folder in found)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {folder.name for folder in found}
    run(tmp_path)
    assert curve(tmp_path) == curve(whole)


def test_outside_the_loop_a_run_ends_at_once_and_says_so(tmp_path):
    """While data are prepared, say. The second signal finds it ending."""
    with pytest.raises(Stopped) as stopped, run_state(tmp_path):
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(30)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.message == f"stopped; the same command goes on from {tmp_path}"
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "stopped"
    with pytest.raises(Stopped), run_state(tmp_path):
        try:
            raise Stopped(3, tmp_path)  # as training does
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    assert "after step 3" in json.loads((tmp_path / "state.json").read_text())["message"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.multi_process
def test_one_of_two_processes_gets_the_signal_in_an_evaluation(whole, tmp_path):
    def toy() -> Toy:
        module = Toy()
        module.dropout = nn.Identity()
        return module

    run(tmp_path / "one", toy())
    out = tmp_path / "two"

    def stopped() -> None:
        with pytest.raises(Stopped):
            run(out, toy(), dev=Kills(8, at=7, rank=1), batch_size=2)

    assert in_two(stopped) == [0, 0]
    assert newest(out / "checkpoints").name == "checkpoint-4" and len(curve(out)) == 4
    run(out, toy(), batch_size=4)  # goes on alone
    for key in ("loss", "eval_loss"):
        assert curve(out, key) == pytest.approx(curve(tmp_path / "one", key), rel=1e-6)


# ---- the budget ----------------------------------------------------------------------------------------------------


def test_a_save_that_takes_too_long_is_announced_at_the_start(tmp_path, caplog):
    """Of a first start by a sample, of a resumed run by its last save; once, and before anything is saved."""

    def told() -> list[str]:
        words = [record.getMessage().split()[0] for record in caplog.records if "signals" in record.name]
        caplog.clear()
        return words

    with caplog.at_level(logging.INFO, logger="persona.training.signals"):
        run(tmp_path, max_steps=3)
        assert told() == ["checkpoint"]
        run(tmp_path, max_steps=6, grace_seconds=0.0)
        assert told() == ["a", "checkpoint"]
        run(tmp_path / "first", max_steps=3, grace_seconds=0.0)
        assert told() == ["a", "checkpoint"]
    assert 0 < manifest(newest(tmp_path / "checkpoints"))["seconds"] < 60


def test_how_long_a_save_should_take(tmp_path):
    """By the rate of a sample: twice as much takes about as many times as long, and nothing is left behind."""
    small, large = nn.Linear(10, 10), nn.Linear(4096, 4096)
    assert 0 < expected_seconds(small, tmp_path) < expected_seconds(large, tmp_path) < 60
    assert expected_seconds(large.requires_grad_(False), tmp_path) == 0 and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="there has no room for a checkpoint of 0.0 MB: No such file"):
        expected_seconds(small, tmp_path / "there")


def test_a_long_step_counts(tmp_path, caplog):
    signals = Signals(grace=0.05, seconds=0.0, folder=tmp_path)
    signals.on_step_begin(None, None, None)
    time.sleep(0.1)
    signals.on_step_end(None, None, None)
    signals.saved(0.0)
    assert "a step and a save take" in caplog.text


# ---- wandb ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def starts() -> set[str]:
        return {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}

    run(tmp_path, max_steps=3, wandb="offline")
    first = json.loads((tmp_path / "wandb.json").read_text())["id"]
    run(tmp_path, max_steps=6, wandb="offline")
    assert starts() == {first}
