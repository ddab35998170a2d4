"""What is in a checkpoint folder, and every way in which it can be wrong."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil

import pytest
import torch
from training_toys import Toy, curve, rows, run

from persona.errors import UserError
from persona.files import sha256
from persona.training.checkpoints import damage, flatten_optimizer, newest, steps, unflatten_optimizer
from persona.training.watch import MEASURED

FILES = (
    "model.safetensors",
    "optimizer.json",
    "optimizer.safetensors",
    "rng-0.json",
    "rng-0.safetensors",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    run(out)
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def test_a_checkpoint_holds_these_files_and_no_pickle(finished):
    assert [path.name for path in steps(finished / "checkpoints")] == [f"checkpoint-{n}" for n in (12, 9, 6, 3)]
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {f"checkpoint-{n}" for n in (12, 9, 6, 3)}
    for folder in steps(finished / "checkpoints"):
        assert sorted(path.name for path in folder.iterdir()) == sorted(("checkpoint.json", *FILES))
    for path in finished.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".jsonl", ".safetensors"), path
            assert not path.read_bytes().startswith((b"PK", b"\x80")), f"{path} is a pickle or a zip of pickles"


def test_only_trainable_weights_are_saved(finished):
    from safetensors.torch import load_file

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


def test_only_so_many_are_kept(tmp_path):
    run(tmp_path, keep_checkpoints=2)
    assert [path.name for path in steps(tmp_path / "checkpoints")] == ["checkpoint-12", "checkpoint-9"]


def test_an_optimizers_state_survives_the_flattening():
    module = Toy()
    optimizer = torch.optim.AdamW([{"params": module.head.parameters()}, {"params": [module.slow], "lr": 0.1}], lr=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.ones(2, 5), torch.zeros(2))["loss"].backward()
        optimizer.step()
    tensors, plain = flatten_optimizer(optimizer.state_dict())
    again = torch.optim.AdamW([{"params": module.head.parameters()}, {"params": [module.slow]}], lr=0.3)
    again.load_state_dict(unflatten_optimizer(tensors, json.loads(json.dumps(plain))))
    one, other = optimizer.state_dict(), again.state_dict()
    assert [g["lr"] for g in other["param_groups"]] == [0.2, 0.1]
    assert one["state"].keys() == other["state"].keys() == {0, 1, 2}
    for index, entry in one["state"].items():
        assert entry.keys() == other["state"][index].keys()
        assert all(torch.equal(entry[key], other["state"][index][key]) for key in entry)


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
    for name in ("model.safetensors", "optimizer.safetensors", "rng-0.safetensors"):
        one, other = (folder / "checkpoints" / "checkpoint-12" / name for folder in (finished, out))
        assert one.read_bytes() == other.read_bytes(), name
    assert torch.equal(module.frozen.weight, Toy().frozen.weight)


def test_a_finished_run_started_again_changes_nothing(finished, out):
    module = run(out)
    assert without_times(out) == without_times(finished)
    from safetensors.torch import load_file

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
    assert [folder.name for folder in steps(out / "checkpoints")] == ["checkpoint-6", "checkpoint-3"]


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
