"""What is in a checkpoint folder, and every way in which it can be wrong."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_toys import Points, Toy, curve, rows, run

from persona.errors import UserError
from persona.files import sha256
from persona.training.checkpoints import damage, newest, set_random_state, steps
from persona.training.states import optimizer_states, set_optimizer_states
from persona.training.watch import MEASURED

FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "rng.json",
    "rng.safetensors",
    "schedule.json",
    "trainer_state.json",
)
SAVED = [f"checkpoint-{n}" for n in (12, 9, 8, 6, 4, 3)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    run(out)
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def test_a_checkpoint_holds_these_files_and_no_pickle(finished):
    """Every third step's, and those of the dev losses at 4, 8 and 12, each of which is the best so far."""
    assert [path.name for path in steps(finished / "checkpoints")] == SAVED
    assert {path.name for path in (finished / "checkpoints").iterdir()} == set(SAVED)
    for folder in steps(finished / "checkpoints"):
        assert sorted(path.name for path in folder.iterdir()) == sorted(("checkpoint.json", *FILES))
    for path in finished.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".jsonl", ".safetensors"), path
            assert not path.read_bytes().startswith((b"PK", b"\x80")), f"{path} is a pickle or a zip of pickles"


def test_only_trainable_weights_are_saved(finished):
    saved = load_file(newest(finished / "checkpoints") / "model.safetensors")
    assert sorted(saved) == ["head.bias", "head.weight", "slow"]


def test_the_manifest_hashes_every_file(finished):
    for folder in steps(finished / "checkpoints"):
        manifest = json.loads((folder / "checkpoint.json").read_text())
        assert manifest["files"] == {name: sha256(folder / name) for name in FILES}
        assert manifest["step"] == int(folder.name.split("-")[1])
        assert damage(folder) is None


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_in_any_file_is_damage(out, name):
    path = out / "checkpoints" / "checkpoint-12" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert damage(path.parent) == f"{path} is not the file that was saved"
    assert newest(out / "checkpoints").name == "checkpoint-9"


@pytest.mark.parametrize("name", (*FILES, "checkpoint.json"))
def test_a_missing_file_is_damage(out, name):
    (out / "checkpoints" / "checkpoint-12" / name).unlink()
    assert name in damage(out / "checkpoints" / "checkpoint-12")
    assert newest(out / "checkpoints").name == "checkpoint-9"


@pytest.mark.parametrize(
    "content", (b"", b"{", b"[]", b"null", b"{}", b'{"files": 3}', b'{"files": ["a"]}', b"\xff\xfe")
)
def test_a_broken_manifest_is_damage(out, content):
    path = out / "checkpoints" / "checkpoint-12" / "checkpoint.json"
    path.write_bytes(content)
    assert damage(path.parent).startswith(f"{path} cannot be read")


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    for name in ("checkpoint-x", "checkpoint-7.old", "other-3"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [] and newest(tmp_path) is None and newest(tmp_path / "absent") is None


def test_newest_is_by_number(tmp_path, finished):
    for n in (5, 40, 300):
        shutil.copytree(finished / "checkpoints" / "checkpoint-12", tmp_path / f"checkpoint-{n}")
    assert newest(tmp_path).name == "checkpoint-300"


class Opposite(Points):
    """What is learnt makes these worse."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, -20 * y


def test_only_so_many_are_kept_and_the_best_besides(tmp_path):
    run(tmp_path / "falling", keep_checkpoints=2)
    assert [path.name for path in steps(tmp_path / "falling" / "checkpoints")] == ["checkpoint-12", "checkpoint-9"]
    out = tmp_path / "rising"
    options = {"learning_rate": 0.3, "keep_checkpoints": 1, "max_steps": 9, "dev": Opposite(8)}
    module = Toy()
    nn.init.zeros_(module.head.weight)
    run(out, module, **options)
    losses = curve(out, "eval_loss")
    assert losses[4] < losses[8], "the toy no longer does what the test is about"
    assert [path.name for path in steps(out / "checkpoints")] == ["checkpoint-9", "checkpoint-4"]
    run(out, **{**options, "max_steps": 12})  # which one is the best is not forgotten by a resume
    assert [path.name for path in steps(out / "checkpoints")] == ["checkpoint-12", "checkpoint-4"]
    saved = {path.name: load_file(path / "model.safetensors") for path in steps(out / "checkpoints")}
    for which, name in (("last", "checkpoint-12"), ("best", "checkpoint-4")):
        module = run(out, **{**options, "max_steps": 12, "weights": which})
        assert torch.equal(module.head.weight, saved[name]["head.weight"]), which


def test_the_best_without_a_dev_loss_is_the_last(tmp_path, caplog):
    module = run(tmp_path, dev=Points(0), weights="best")
    saved = load_file(newest(tmp_path / "checkpoints") / "model.safetensors")
    assert torch.equal(module.head.weight, saved["head.weight"]) and "there was no dev loss" in caplog.text


def test_states_are_by_name_and_survive_the_file(tmp_path):
    """Two groups in an order that is not the module's, and a parameter that has not had a gradient."""
    module = Toy(extra=True)
    listed = [{"params": [module.extra, module.slow], "lr": 0.1}, {"params": module.head.parameters()}]
    optimizer = torch.optim.AdamW(listed, lr=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.ones(2, 5), torch.zeros(2))["loss"].backward()
        optimizer.step()
    found = optimizer_states(module, optimizer, keep=True)
    parts = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(found) == sorted(f"{name}.{key}" for name in ("head.bias", "head.weight", "slow") for key in parts)
    assert optimizer_states(module, optimizer, keep=False) == {}
    save_file(found, tmp_path / "saved.safetensors")

    other = Toy(extra=True)
    again = torch.optim.AdamW([{"params": other.head.parameters()}, {"params": [other.slow, other.extra]}], lr=0.3)
    set_optimizer_states(other, again, load_file(tmp_path / "saved.safetensors"))
    assert [group["lr"] for group in again.param_groups] == [0.3, 0.3]  # the schedule's business
    assert other.extra not in again.state and len(again.state) == 3
    for name in ("slow", "head.weight", "head.bias"):
        one, two = (o.state[m.get_parameter(name)] for o, m in ((optimizer, module), (again, other)))
        assert all(torch.equal(one[key], two[key]) for key in parts)


# ---- resuming ------------------------------------------------------------------------------------------------------


def without_times(out):
    dropped = (*MEASURED, "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{k: v for k, v in row.items() if k not in dropped} for row in rows(out) if "train_runtime" not in row]


@pytest.mark.parametrize("last", (3, 6, 9))
def test_resumed_equals_uninterrupted(finished, out, last):
    """Losses, schedule, dropout, order of the data and final weights, from a checkpoint within and between epochs."""
    for folder in steps(out / "checkpoints"):
        if int(folder.name.split("-")[1]) > last:
            shutil.rmtree(folder)
    module = run(out)
    assert without_times(out) == without_times(finished)
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        one, other = (folder / "checkpoints" / "checkpoint-12" / name for folder in (finished, out))
        assert one.read_bytes() == other.read_bytes(), name
    assert torch.equal(module.frozen.weight, Toy().frozen.weight)


def test_as_many_samples_a_step_in_other_parts(tmp_path):
    """4 at once or twice 2: the same samples in the same steps. Another number of them is not the same run."""

    def toy():
        module = Toy()
        module.dropout = nn.Identity()
        return module

    run(tmp_path / "whole", toy())
    shutil.copytree(tmp_path / "whole", out := tmp_path / "out")
    for folder in steps(out / "checkpoints"):
        if int(folder.name.split("-")[1]) > 4:
            shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"saved with 4 x 1 x 1 = 4 samples a step .* this run has 4 x 1 x 2 = 8"):
        run(out, toy(), gradient_accumulation=2)
    run(out, toy(), batch_size=2, gradient_accumulation=2)
    assert curve(out) == pytest.approx(curve(tmp_path / "whole"), rel=1e-6)


def test_a_process_that_was_not_there_has_a_random_state_of_its_own(finished):
    folder = newest(finished / "checkpoints")
    set_random_state(folder, 0, [0, 12])
    first = torch.rand(3)
    drawn = []
    for rank in (1, 1, 2):
        set_random_state(folder, rank, [0, 12])
        drawn.append((*torch.rand(3).tolist(), *np.random.rand(2), random.random()))
    set_random_state(folder, 0, [0, 12])
    assert torch.equal(torch.rand(3), first)
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][:3] != tuple(first.tolist())


def test_another_format_is_refused_not_skipped(out):
    """The first format had no number; its optimizer's states went by position."""
    path = out / "checkpoints" / "checkpoint-12" / "checkpoint.json"
    told = json.loads(path.read_text())
    for form in (None, 3):
        path.write_text(
            json.dumps({**{k: v for k, v in told.items() if k != "format"}, **({"format": form} if form else {})})
        )
        with pytest.raises(UserError, match=f"checkpoint-12 is in checkpoint format {form or 1}, .* reads format 2"):
            run(out)
    run(out, resume=False)


def test_how_often_is_what_the_command_says_not_the_checkpoint(out):
    for folder in steps(out / "checkpoints"):
        if int(folder.name.split("-")[1]) > 4:
            shutil.rmtree(folder)
    run(out, eval_every=5, log_every=2)
    assert sorted(curve(out, "eval_loss")) == [4, 5, 10, 12] and sorted(curve(out)) == [1, 2, 3, 4, 6, 8, 10, 12]


def test_a_finished_run_started_again_changes_nothing(finished, out):
    module = run(out)
    assert without_times(out) == without_times(finished)
    saved = load_file(finished / "checkpoints" / "checkpoint-12" / "model.safetensors")
    assert torch.equal(module.head.weight, saved["head.weight"])


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(finished, out, caplog):
    path = out / "checkpoints" / "checkpoint-12" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        run(out)
    assert f"checkpoint skipped: {path} is not the file that was saved" in caplog.text
    assert "going on from" in caplog.text and "checkpoint-9" in caplog.text
    assert without_times(out) == without_times(finished)
    assert damage(out / "checkpoints" / "checkpoint-12") is None, "the damaged one was not replaced"


def test_without_resume_a_run_starts_afresh_and_the_old_one_does_not_come_back(finished, out):
    run(out, resume=False, keep_checkpoints=1)
    assert without_times(out) == without_times(finished)
    run(out, resume=False, max_steps=6, keep_checkpoints=2)
    assert [folder.name for folder in steps(out / "checkpoints")] == ["checkpoint-6", "checkpoint-4"]


def test_each_step_is_in_the_metrics_once_after_a_resume(out):
    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    with open(out / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 11, "loss": 0.1}\n{"step": 12, "lo')  # the process died while it wrote
    run(out)
    for key in ("loss", "eval_loss", "train_runtime"):
        found = [row["step"] for row in rows(out) if key in row]
        assert len(found) == len(set(found)), key
    assert sorted(curve(out)) == list(range(1, 13)) and sorted(curve(out, "eval_loss")) == [4, 8, 12]


def test_a_checkpoint_of_another_configuration(out):
    with pytest.raises(UserError, match="made by another model or configuration: it differs in extra"):
        run(out, Toy(extra=True))
    with pytest.raises(UserError, match="made by another model or configuration: it differs in head.weight"):
        run(out, Toy(width=9))


def test_a_full_disk_leaves_the_checkpoints_before_it(tmp_path):
    """In a process of its own under a real limit on file size that the third checkpoint meets."""
    run(tmp_path, max_steps=3)
    whole = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = "nothing"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            run(tmp_path, max_steps=12)
        except UserError as error:
            told = str(error)
        except BaseException as error:
            told = f"crashed: {error!r}"
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    with open(read) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    assert told.startswith("the checkpoint of step 6 could not be saved") and "are unchanged" in told
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == whole
    assert newest(tmp_path / "checkpoints").name == "checkpoint-3"
