"""The loop: what ends it, what it writes, and that stopping it loses nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toys import Points, Toy, curve, in_two, rows, run
from transformers import TrainerCallback

from persona.errors import UserError
from persona.training.checkpoints import damage, newest
from persona.training.trainer import Stopped, fit

METHODS = Path(__file__).resolve().parents[1] / "methods"


# ---- errors --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    """The first epoch visits all points in 6 steps, and one of them has no finite target."""
    with pytest.raises(UserError, match=r"the loss became nan in step [1-6] \(learning rate") as caught:
        run(tmp_path, data=Points(poisoned=7), save_every=1)
    step = int(str(caught.value).split("in step ")[1].split()[0])
    assert sorted(curve(tmp_path)) == list(range(1, step))
    last = newest(tmp_path / "checkpoints")
    assert last is None if step == 1 else last.name == f"checkpoint-{step - 1}"


def test_an_infinite_loss_is_named_too(tmp_path):
    module = Toy()
    module.head.weight.data.fill_(1e30)
    with pytest.raises(UserError, match="the loss became inf in step 1"):
        run(tmp_path, module)


def test_a_dev_loss_that_is_not_finite_ends_the_run(tmp_path):
    """The last step alone can spoil the weights; no training loss would show it."""
    with pytest.raises(UserError, match=r"the dev loss is nan after step 2: lower trainer.learning_rate"):
        run(tmp_path, dev=Points(poisoned=0, n=4), max_steps=2, eval_every=2)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(UserError, match="the training split is empty"):
        run(tmp_path, data=Points(0))


def test_nothing_to_train(tmp_path):
    module = Toy().requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the method is trainable"):
        fit(module, Points(), None, None, None, tmp_path)


# ---- what is written -----------------------------------------------------------------------------------------------


def test_metrics_by_step(tmp_path):
    run(tmp_path)
    logged = rows(tmp_path)
    assert sorted(curve(tmp_path)) == list(range(1, 13)) and sorted(curve(tmp_path, "eval_loss")) == [4, 8, 12]
    assert all(math.isfinite(loss) for loss in curve(tmp_path).values())
    assert all(row["samples_per_second"] > 0 for row in logged if "loss" in row)
    assert [row["step"] for row in logged] == sorted(row["step"] for row in logged)
    rates = curve(tmp_path, "learning_rate")
    assert rates[1] == 0 and rates[2] == pytest.approx(0.01) and rates[12] == pytest.approx(0.01 / 11)


def test_shares_of_all_steps_and_no_dev_split(tmp_path):
    from training_toys import collate, settings

    fit(Toy(), Points(), None, collate, settings(save_every=0.5, eval_every=0.25), tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["checkpoint-12", "checkpoint-6"]
    assert not curve(tmp_path, "eval_loss")


def test_the_first_losses_by_hand(tmp_path):
    """One full batch without dropout: mean squared error, twice, as warm-up starts at rate zero."""
    module = Toy()
    module.dropout = nn.Identity()
    data = Points()
    with torch.no_grad():
        expected = float(module(data.x, data.y)["loss"])
    run(tmp_path, module, batch_size=24, max_steps=2)
    assert curve(tmp_path)[1] == pytest.approx(expected, rel=1e-5) == curve(tmp_path)[2]


def test_learning_rates_of_groups(tmp_path):
    """AdamW's first step moves each parameter by its group's learning rate, as m / sqrt(v) is then the gradient's
    sign; at step 1 of the warm-up the rate is zero, so both of the first two steps see the same weights."""
    module = Toy()
    module.dropout = nn.Identity()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run(tmp_path, module, max_steps=2, batch_size=24, weight_decay=0.0)
    moved = {name: (p.detach() - before[name]).abs() for name, p in module.named_parameters()}
    assert torch.equal(moved["frozen.weight"], torch.zeros(8, 5))
    assert moved["head.weight"].flatten().tolist() == pytest.approx([0.01] * 8, rel=1e-3)
    assert float(moved["slow"]) == pytest.approx(0.001, rel=1e-3)


class Seen(TrainerCallback):
    """The optimizer that the loop has."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.betas = {tuple(group["betas"]) for group in optimizer.param_groups}


def test_options_of_schedule_and_optimizer(tmp_path):
    """Half a cosine from 0.01 down to a tenth of it, over 11 steps after the first; AdamW's second beta."""
    seen = Seen()
    cosine = {"scheduler": "cosine_with_min_lr", "scheduler_options": {"min_lr_rate": 0.1}}
    run(tmp_path, callbacks=[seen], adam_beta2=0.98, **cosine)
    rates = curve(tmp_path, "learning_rate")
    expected = [0.01 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 11))) for step in range(11)]
    assert [rates[step] for step in range(2, 13)] == pytest.approx(expected)
    assert seen.betas == {(0.9, 0.98)}


@pytest.mark.parametrize("steps", (8, 12))
def test_a_run_that_was_killed_behind_its_last_step_takes_no_more(tmp_path, steps):
    """In the middle of an epoch (there are six steps in one) and at its end; what was left to do is what follows."""
    first = run(tmp_path, max_steps=steps)
    whole = curve(tmp_path)
    again = run(tmp_path, max_steps=steps)
    assert curve(tmp_path) == whole and sorted(whole) == list(range(1, steps + 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert len([row for row in rows(tmp_path) if "train_runtime" in row]) == 1
    assert [row["step"] for row in rows(tmp_path) if "eval_loss" in row] == list(range(4, steps + 1, 4))


def test_epochs_end_it(tmp_path):
    run(tmp_path, max_steps=-1, epochs=1.5)
    assert sorted(curve(tmp_path)) == list(range(1, 10))


# ---- signals -------------------------------------------------------------------------------------------------------


class Slow(Toy):
    """A step takes 50 ms, so that a signal finds the run in its middle."""

    def forward(self, *args, **kwargs):
        time.sleep(0.05)
        return super().forward(*args, **kwargs)


def started(out: Path) -> int:
    """A process that trains in `out`: its exit status is what Stopped says."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run(out, Slow(), save_every=100)
        status = 0
    except Stopped as stopped:
        (out / "message").write_text(stopped.message)
        status = stopped.code
    finally:
        os._exit(status)


def wait_for(condition, seconds: float = 300) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "what was waited for did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1))
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, number):
    run(tmp_path / "whole")
    out = tmp_path / "stopped"
    child = started(out)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and len(rows(out)) >= 4)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143
    at = int(newest(out / "checkpoints").name.split("-")[1])
    assert 4 <= at < 12 and f"stopped after step {at}" in (out / "message").read_text()
    run(out)
    assert curve(out) == curve(tmp_path / "whole") and list(curve(out)) == list(range(1, 13))
    assert len([row for row in rows(out) if "train_runtime" in row]) == 1
    one, other = (newest(o / "checkpoints") / "model.safetensors" for o in (out, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    run(tmp_path, max_steps=1)
    with pytest.raises(UserError):
        run(tmp_path / "nan", data=Points(poisoned=0, n=4), max_steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


# ---- Persona-Plug in processes of their own ------------------------------------------------------------------------


def read_losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in lines if "loss" in row}


def train_here(llama, encoder: Path, out: Path, **changes) -> None:
    sys.path.insert(0, str(METHODS))
    try:
        from plug_toys import config, toy_people, trainer
    finally:
        sys.path.remove(str(METHODS))
    from persona.methods import persona_plug
    from persona.personalizer import LanguageModel

    frozen = changes.pop("frozen_encoder", False)
    settings = config(encoder, out.parent, train_query_encoder=not frozen)
    options = trainer(**{"max_steps": 8, "save_every": 100, **changes})
    persona_plug.train(settings, LanguageModel(llama), toy_people(), options, out)


@pytest.fixture(scope="module")
def uninterrupted(llama, encoder_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    train_here(llama, encoder_folder, out)
    return out


def test_persona_plug_resumed_equals_uninterrupted(uninterrupted, llama, encoder_folder, tmp_path):
    """Real dropout in the query encoder, augmented data, checkpoints in mid-epoch; the directory is the same, too."""
    out = tmp_path / "out"
    train_here(llama, encoder_folder, out, save_every=3)
    for n in (8, 6):
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{n}")
    shutil.rmtree(out / "personalizer")
    train_here(llama, encoder_folder, out, save_every=3)
    assert read_losses(out) == read_losses(uninterrupted)
    one, other = (o / "personalizer" / "embedder.safetensors" for o in (out, uninterrupted))
    assert one.read_bytes() == other.read_bytes()


def test_workers_change_nothing(uninterrupted, llama, encoder_folder, tmp_path):
    train_here(llama, encoder_folder, tmp_path / "out", workers=1)
    assert read_losses(tmp_path / "out") == read_losses(uninterrupted)


def test_persona_plug_stopped_by_sigterm(uninterrupted, llama, encoder_folder, tmp_path):
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            slow = llama.model.register_forward_pre_hook(lambda *args: time.sleep(0.1))
            train_here(llama, encoder_folder, out)
            slow.remove()
            status = 0
        except Stopped as stopped:
            status = stopped.code
        finally:
            os._exit(status)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and len(read_losses(out)) >= 3)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143 and not (out / "personalizer").exists()
    train_here(llama, encoder_folder, out)
    assert read_losses(out) == read_losses(uninterrupted)
    one, other = (o / "personalizer" / "embedder.safetensors" for o in (out, uninterrupted))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.multi_process
def test_two_processes_give_the_losses_of_one(llama, encoder_folder, tmp_path):
    """gloo, 2 x 3 samples against 1 x 6 of the same order; the query encoder is frozen, as its dropout is drawn per
    process."""
    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    train_here(llama, encoder_folder, one, frozen_encoder=True)
    options = {"frozen_encoder": True, "batch_size": 3, "save_every": 4}
    assert in_two(lambda: train_here(llama, encoder_folder, two, **options)) == [0, 0]
    losses = [read_losses(out) for out in (one, two)]
    assert sorted(losses[0]) == sorted(losses[1]) == list(range(1, 9))
    assert [losses[1][step] for step in range(1, 9)] == pytest.approx(
        [losses[0][step] for step in range(1, 9)], abs=2e-4
    )
    weights = [load_file(out / "personalizer" / "embedder.safetensors") for out in (one, two)]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-4), name
    folder = newest(two / "checkpoints")
    assert {path.name for path in folder.iterdir()} >= {"rng.safetensors", "rng.json"}
    assert damage(folder) is None
