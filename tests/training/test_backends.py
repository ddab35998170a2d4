"""A run goes on under another back end, and on another number of processes, as if nothing had been.

The processes are real, over gloo; what is saved and loaded is the toy's: a weight of 7 does not part into two.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toys import Points, Toy, collate, curve, in_two, run
from transformers import TrainerCallback

from persona.config import load_config
from persona.config.launch import environment
from persona.training.checkpoints import newest, steps
from persona.training.states import optimizer_states, set_optimizer_states, set_weights, weights

DEEPSPEED = Path(__file__).resolve().parents[2] / "configs" / "launch" / "deepspeed"
ZERO = ("zero1", "zero2", "zero3")
BACKENDS = ("single", "ddp", *ZERO)


def train(out: Path, backend: str, rows: int = 24, accumulated: int = 1, **changes) -> None:
    """12 steps of 4 samples; without dropout, whose draws are a process's own."""

    def go(size: int) -> None:
        module = Toy(width=7)
        module.dropout = nn.Identity()
        size //= accumulated
        run(out, module, Points(rows), batch_size=size, gradient_accumulation=accumulated, **changes)

    def go_fsdp2() -> None:
        os.environ.update(environment(load_config("train", ["launch=fsdp2"]).launch))
        go(2)

    def go_deepspeed() -> None:
        settings = json.loads((DEEPSPEED / f"{backend}.json").read_text())
        if backend == "zero3":  # by its default it would leave tensors as small as these whole
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = out.with_name(f"{backend}-{os.environ['RANK']}.json")
        path.write_text(json.dumps(settings))
        os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for two minutes
        import deepspeed

        deepspeed.init_distributed("gloo")
        go(2)

    if backend == "single":
        go(4)
    else:
        act = go_deepspeed if backend in ZERO else go_fsdp2 if backend == "fsdp2" else lambda: go(2)
        assert in_two(act) == [0, 0]


def resumed(saved: Path, out: Path, backend: str) -> Path:
    """A copy of a run, taken back to step 6 and gone on with under `backend`."""
    shutil.copytree(saved, out)
    for folder in steps(out / "checkpoints"):
        if int(folder.name.split("-")[1]) > 6:
            shutil.rmtree(folder)
    train(out, backend)
    return out


def same(one: Path, other: Path) -> None:
    for key in ("loss", "eval_loss", "learning_rate"):
        ours, theirs = curve(one, key), curve(other, key)
        assert list(ours) == list(theirs) and ours == pytest.approx(theirs, rel=1e-6), key
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(newest(out / "checkpoints") / f"{name}.safetensors") for out in (one, other))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.allclose(ours[key], tensor, rtol=1e-5, atol=1e-6), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    train(out, "single")
    return out


@pytest.mark.multi_process
def test_from_one_process_to_zero_on_two_and_back(whole, tmp_path):
    """Single → ZeRO-3 → single: what DeepSpeed gathers is what it was given, and so is what it trained."""
    pytest.importorskip("deepspeed")
    two = resumed(whole, tmp_path / "two", "zero3")
    same(two, whole)
    same(resumed(two, tmp_path / "one", "single"), whole)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_goes_on_from_every_other(whole, tmp_path, backend):
    pytest.importorskip("deepspeed")
    train(tmp_path / "saved", backend)
    same(tmp_path / "saved", whole)
    for other in BACKENDS:
        same(resumed(tmp_path / "saved", tmp_path / other, other), whole)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("backend", [*BACKENDS[1:], "fsdp2"])
@pytest.mark.parametrize("rows", [21, 22, 23])
def test_accumulated_forwards_are_one_batch_and_what_is_left_over_counts_once(backend, rows, tmp_path):
    """Of 21 rows the epoch's last step has one: one process has none, and there is no second forward."""
    pytest.importorskip("deepspeed")
    train(tmp_path / "one", "single", rows)
    train(tmp_path / "two", backend, rows, accumulated=2)
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.multi_process
def test_under_fsdp2_nobody_holds_the_weights_that_were_divided(tmp_path):
    """Each process has its part alone: a list of parameters from before would keep all of them alive, whole."""

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gc.collect()
            assert [name for name, first in firsts.items() if first() is not None] == []

    firsts = {}

    def act() -> None:
        os.environ.update(environment(load_config("train", ["launch=fsdp2"]).launch))
        module = Toy(width=7)
        firsts.update({name: weakref.ref(p) for name, p in module.named_parameters() if p.requires_grad})
        assert len(firsts) > 2
        run(tmp_path / "out", module, Points(8), max_steps=2, callbacks=[Look()])

    assert in_two(act) == [0, 0]


@pytest.mark.multi_process
def test_fsdp2_states_are_whole_by_name_and_come_back(tmp_path):
    """Sharded by torch itself, as accelerate has FSDP on GPUs only: two steps as one process takes them, and a state
    that was gathered goes back into other shards."""

    def steps_of(module: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
        batch = collate([Points()[index] for index in range(4)])
        for _ in range(2):
            optimizer.zero_grad()
            module(**batch)["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            module(**batch)  # an evaluation: FSDP2 leaves the outermost module whole behind it
        return optimizer

    def toy() -> Toy:
        module = Toy(width=7)
        module.dropout = nn.Identity()
        return module

    plain = toy()
    expected = optimizer_states(plain, steps_of(plain), keep=True), weights(plain, keep=True)

    def act() -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh, main = init_device_mesh("cpu", (2,)), torch.distributed.get_rank() == 0
        sharded = fully_shard(toy(), mesh=mesh)
        optimizer = steps_of(sharded)
        found = optimizer_states(sharded, optimizer, keep=main), weights(sharded, keep=main)
        assert main or found == ({}, {})
        for ours, theirs in zip(found, expected, strict=True) if main else ():
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs)
        fresh = fully_shard(toy(), mesh=mesh)
        again = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=0.3)
        set_weights(fresh, expected[1], "there")
        set_optimizer_states(fresh, again, expected[0])
        back = optimizer_states(fresh, again, keep=True), weights(fresh, keep=True)
        for ours, theirs in zip(back, expected, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    assert in_two(act) == [0, 0]
