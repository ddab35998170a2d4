"""The stages: what moves and what does not, together as apart, two processes as one, stopped as uninterrupted."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fuse_toys import config, requests, sample, toy_people, trained_looking, trainer, vector
from safetensors.torch import load_file

import persona
from persona.data.base import People
from persona.data.situations import POLES, expert_vector_of
from persona.errors import UserError
from persona.methods import persona_fuse
from persona.methods.persona_fuse import training
from persona.methods.persona_fuse.config import JointConfig, WarmupConfig
from persona.methods.persona_fuse.data import Rounds, Row, Twos, rows_of, targets_of
from persona.methods.persona_fuse.experts import FOLDERS
from persona.methods.persona_fuse.pipeline import STAGES as ALL_STAGES
from persona.methods.persona_fuse.routing import collapse, report, trace
from persona.personalizer import LanguageModel

sys.path.append(str(Path(__file__).parents[2] / "training"))
from training_toys import process_of_two

STAGES = ALL_STAGES[1:]  # toy people are annotated: there is nothing to synthesize


def run(llama, out, people=None, stage=None, options=None, **changes):
    settings, options = config(llama, **changes), options or {}
    return persona_fuse.train(
        settings, LanguageModel(llama), people or toy_people(), trainer(**options), out, stage=stage
    )


def losses(out, stage):
    rows = [json.loads(line) for line in (out / "stages" / stage / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def weights(out, stage):
    """Everything that a stage left behind, by file."""
    files = sorted((out / "stages" / stage).rglob("*.safetensors"))
    return {f"{file.relative_to(out)}:{n}": t for file in files for n, t in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(llama, out)
    return out


# ---- data ----------------------------------------------------------------------------------------------------------


def rows(*vectors):
    return [Row(str(i), requests("x")[0], "y", [1], [2], tuple(v)) for i, v in enumerate(vectors)]


def test_targets_by_hand():
    vectors = [vector("O+", "N-"), vector()]
    assert targets_of(vectors, True).tolist() == [[*vector("O+", "N-"), 0.0], [*vector(), 1.0]]
    assert targets_of(vectors, False).tolist() == vectors


def test_every_item_has_a_row_of_each_pole():
    """25 rows on 10 poles: 3 items; a pole with one row repeats it; an expert's rows are the same alone."""
    data = rows(*[vector(pole) for pole in POLES], *[vector("O+")] * 9, *[vector("C-", "E+")] * 3)  # 25 in all
    found = Rounds(data, range(10), seed=0)
    assert len(found) == 3
    for item in (found[0], found[2]):
        assert [number for _, number in item] == list(range(10))
        assert all(row.vector[number] > 0 for row, number in item)
    assert {found[j][9][0].id for j in range(3)} == {"9"} and len({found[j][0][0].id for j in range(3)}) == 3
    alone = Rounds(data, [3], seed=0)
    assert [alone[j][0] for j in range(3)] == [found[j][3] for j in range(3)]


def test_two_rows_that_call_for_the_same():
    data = rows(*[vector("O+")] * 3, *[vector("A+", "N-")] * 2, vector(), vector("C+"))
    items = Twos(data, seed=0).items
    assert len(items) == 4 and sorted(len(item) for item in items) == [2] * 4
    alike = [a.vector == b.vector for a, b in items]
    assert sum(alike) >= 2  # the third O+, the neutral row and C+ are left over, and the first row fills up
    assert {row.id for item in items for row in item} == {row.id for row in data}


# ---- what training moves -------------------------------------------------------------------------------------------


def test_stages_leave_what_they_say(llama, whole):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())
    assert not any(p.requires_grad for p in llama.model.parameters())
    stages = whole / "stages"
    assert {path.name for path in (stages / "warmup").iterdir()} == {*FOLDERS, "metrics.jsonl", "dropped.jsonl"}
    warm, joint = weights(whole, "warmup"), weights(whole, "joint")
    ups = [name for name in warm if "lora_B" in name]
    assert ups and all(bool(warm[name].any()) for name in ups), "an expert was not trained"
    assert all(not torch.equal(warm[n], joint[n.replace("warmup", "joint/experts")]) for n in ups)
    one, other = (load_file(stages / stage / "router.safetensors") for stage in ("router", "joint"))
    assert all(not torch.equal(one[name], other[name]) for name in one if one[name].ndim > 1)
    traces = [json.loads(line) for line in (stages / "joint" / "traces.jsonl").read_text().splitlines()]
    assert [row["id"] for row in traces] == [one.id for one in toy_people().dev]
    assert set(traces[0]) == {"id", "g", "topk", "p_norm", "entropy"} and len(traces[0]["g"]) == 11
    logged = json.loads((stages / "joint" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"nll", "router/contrastive", "router/entropy", "gate/O+", "gate/null"} <= set(logged)
    assert sum(logged[f"gate/{name}"] for name in (*POLES, "null")) == pytest.approx(1, abs=1e-4)
    made = persona.load(llama, [whole / "personalizer"]).personalizers[0]
    assert made.gate(["the fox ?"]).shape == (1, 11)


def test_the_router_learns_and_the_experts_do_too(llama, tmp_path):
    """Each pole has a word of its own: routing is right nearly always, and the reply's word becomes likely."""
    changes = {"joint": JointConfig(learning_rate=5e-3, epochs=6, batch_size=12), "router": {"temperature": 0.1}}
    base = config(llama)
    changes["warmup"] = replace(base.warmup, epochs=6, learning_rate=2e-2)
    changes["routing"] = replace(base.routing, epochs=15)
    fuse = persona.load(llama, [run(llama, tmp_path, **changes)])
    found = json.loads((tmp_path / "stages" / "joint" / "routing.json").read_text())["dev"]
    assert found["accuracy"] > 0.8 and found["mass"] > 0.5
    neutral = [one.messages[0].content for one in toy_people().dev if not any(expert_vector_of(one))]
    null = fuse.personalizers[0].gate(neutral)[:, -1]
    assert (null > 1 / 11).all(), "the null expert keeps neutral queries in the joint stage (without gate KL: .0002)"
    samples = [one for one in toy_people().dev]
    asked, replies = [requests(one.messages[0].content)[0] for one in samples], [one.target for one in samples]
    before, after = (sum(a for a, _ in m.loglikelihood(asked, replies)) for m in (LanguageModel(llama), fuse))
    assert after > before + 10
    assert sum(losses(tmp_path, "warmup").values()) > 0


def test_the_experts_are_frozen_while_the_router_learns(llama, tmp_path):
    made = trained_looking(llama)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    under = LanguageModel(llama)
    data = rows_of(under, toy_people(2).train, 128)
    training.train_router(under, made, data, [], config(llama), trainer(max_steps=3), tmp_path)
    moved = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in moved} == {"router"}
    assert any("encoder" in name for name in moved) and any("head" in name for name in moved)


def test_a_frozen_encoder_stays(llama, tmp_path):
    run(llama, tmp_path, router={"train_encoder": False}, options={"max_steps": 2})
    state = load_file(tmp_path / "personalizer" / "router.safetensors")
    assert state and not any(name.startswith("encoder") for name in state)


@pytest.mark.parametrize("stage", STAGES)
def test_ablations_leave_a_stage_out(llama, tmp_path, stage):
    run(llama, tmp_path, skip=[stage], options={"max_steps": 2})
    assert sorted(path.name for path in (tmp_path / "stages" / "records").iterdir()) == sorted(
        f"{name}.json" for name in STAGES if name != stage
    )
    assert (tmp_path / "personalizer" / "personalizer.json").is_file()


@pytest.mark.parametrize("granularity", ("layer", "token"))
@pytest.mark.parametrize("top_k", (None, 2))
def test_other_gates_train(llama, tmp_path, granularity, top_k):
    run(llama, tmp_path, router={"granularity": granularity, "top_k": top_k}, options={"max_steps": 2})
    state = load_file(tmp_path / "personalizer" / "router.safetensors")
    if granularity == "token":
        assert state["token"].any() and len(state["token"]) == 2
        assert not load_file(tmp_path / "stages" / "router" / "router.safetensors")["token"].any()
    else:
        assert state["head.2.weight"].shape[0] == 2 * 8


# ---- together as apart ---------------------------------------------------------------------------------------------


def test_all_experts_in_one_pass_are_each_alone(llama, tmp_path):
    """Also where gradients are cut: each expert has a norm of its own. Rows of the poles differ in number."""
    people = toy_people(2)
    more = tuple(sample(f"more/{n}", f"the fox {'of ' * n}", "i like long walks", "O+", "N-") for n in range(4))
    people = People("toy", {}, (*people.train, *more), ())
    for together in (True, False):
        warm = WarmupConfig(learning_rate=1e-2, epochs=1, batch_size=1, together=together)
        out = tmp_path / str(together)
        run(llama, out, people, "warmup", {"max_grad_norm": 0.5, "gradient_accumulation": 2}, warmup=warm)
    one, other = (weights(tmp_path / str(together), "warmup") for together in (True, False))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=2e-5), name
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 0.01


def test_clipping_by_hand():
    """Two experts with gradients of norm 5 and .5: the first is cut to 1, the second stays."""
    from persona.methods.persona_fuse.experts import Experts

    experts = Experts(["a"], [torch.zeros(2, 1, 2)], [torch.zeros(2, 1, 1)], 1.0)
    experts.down[0].grad = torch.tensor([[[3.0, 0.0]], [[0.3, 0.0]]])
    experts.up[0].grad = torch.tensor([[[4.0]], [[0.4]]])
    training.ClipEach(experts, 1.0).on_pre_optimizer_step(None, None, None)
    assert experts.down[0].grad.flatten().tolist() == pytest.approx([0.6, 0, 0.3, 0], rel=1e-4)
    assert experts.up[0].grad.flatten().tolist() == pytest.approx([0.8, 0.4], rel=1e-4)


# ---- stopped, and spread over processes ----------------------------------------------------------------------------


def test_resumed_is_uninterrupted(llama, whole, tmp_path, monkeypatch):
    """Every stage is killed half-way and goes on from its last checkpoint."""
    kept = training.fit

    def killed(module, train, dev, collate, *args):
        batches = iter(range(half))

        def some(items):
            if next(batches, None) is None:
                raise KeyboardInterrupt
            return collate(items)

        kept(module, train, dev, some, *args)

    for stage in STAGES:
        half = len(losses(whole, stage)) // 2 + 1
        monkeypatch.setattr(training, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path, stage=stage, options={"save_every": 1})
        assert list((tmp_path / "stages" / "work" / stage / "checkpoints").glob("checkpoint-*"))
        monkeypatch.setattr(training, "fit", kept)
        run(llama, tmp_path, stage=stage, options={"save_every": 1})
        assert losses(tmp_path, stage) == losses(whole, stage)
        one, other = weights(whole, stage), weights(tmp_path, stage)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), stage


def in_two(act):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [process_of_two(rank, port, lambda rank=rank: act(rank)) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


@pytest.mark.multi_process
def test_two_processes_are_one(llama, whole, tmp_path):
    """Half the rows in each: every loss of every stage, and what is left behind."""
    base = config(llama)
    half = {
        name: replace(getattr(base, name), batch_size=getattr(base, name).batch_size // 2)
        for name in ("warmup", "routing", "joint")
    }
    in_two(lambda rank: run(llama, tmp_path, **half))
    for stage in STAGES:
        one, two = losses(whole, stage), losses(tmp_path, stage)
        assert sorted(one) == sorted(two) and len(one) > 3
        assert [two[step] for step in sorted(one)] == pytest.approx([one[step] for step in sorted(one)], abs=2e-3)
        first, second = weights(whole, stage), weights(tmp_path, stage)
        assert all(torch.allclose(first[name], second[name], atol=5e-4) for name in first), stage


@pytest.mark.multi_process
@pytest.mark.parametrize("first", [2, 3, 4])
def test_gathered_losses_and_gradients(tmp_path, first):
    """Contrastive and consistency loss of four rows on two processes, of which the `first` are the first one's: value
    and gradients of one process with all."""
    from persona.methods.persona_fuse.losses import contrastive_loss, load_balance, trait_consistency

    generator = torch.Generator().manual_seed(0)
    p, vectors = torch.randn(4, 3, generator=generator), torch.randn(5, 3, generator=generator)
    targets = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 1, 0]])

    def total(p, vectors, targets):
        gates = (p @ vectors.T).softmax(-1)
        return contrastive_loss(p, vectors, targets, 0.3) + trait_consistency(p, targets) + load_balance(gates)

    def act(rank):
        rows = slice(0, first) if rank == 0 else slice(first, 4)
        mine, own = p[rows].clone().requires_grad_(), vectors.clone().requires_grad_()
        every, called = training.gathered(mine, targets[rows])
        loss = total(every, own, called)
        (loss / 2).backward()  # each process counts in the measure of its rows
        torch.distributed.all_reduce(own.grad)
        torch.save({"loss": loss.detach(), "p": mine.grad, "vectors": own.grad}, tmp_path / f"{rank}.pt")

    in_two(act)
    whole_p, whole_vectors = p.clone().requires_grad_(), vectors.clone().requires_grad_()
    expected = total(whole_p, whole_vectors, targets)
    expected.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.allclose(torch.cat([part["p"] for part in parts]), whole_p.grad, atol=1e-6)
    for part in parts:
        assert torch.allclose(part["loss"], expected) and torch.allclose(
            part["vectors"], whole_vectors.grad, atol=1e-6
        )


# ---- routing -------------------------------------------------------------------------------------------------------


def test_report_by_hand():
    gates = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    targets = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    found = report(gates, targets, ("a", "b", "null"))
    assert found["accuracy"] == pytest.approx(2 / 3) and found["mass"] == pytest.approx((0.7 + 0.3 + 0.8) / 3)
    assert found["usage"] == pytest.approx({"a": 2 / 3, "b": 0, "null": 1 / 3})
    assert found["called"] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "null": 1 / 3})
    assert trace("q", gates[0], 2.5) == {"id": "q", "g": [0.7, 0.2, 0.1], "topk": [0, 1, 2], "p_norm": 2.5,
                                         "entropy": 0.801819}  # fmt: skip


def test_complete_by_hand():
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]])
    targets = torch.tensor([[1.0, 0.5, 0], [1.0, 1.0, 0], [1.0, 0, 0], [0, 0, 0]])
    found = report(gates, targets, ("a", "b", "c"))  # both; only one; not even the largest; neutral without null
    assert found["complete"] == pytest.approx(1 / 3) and found["accuracy"] == pytest.approx(2 / 3)


def test_a_collapse_is_named():
    even = torch.eye(3).repeat(4, 1)
    assert collapse(report(even, even, ("a", "b", "null"))) is None
    stuck = torch.tensor([[0.6, 0.2, 0.2]]).repeat(12, 1)
    said = collapse(report(stuck, even, ("a", "b", "null")))
    assert said == (
        "the router has collapsed: a takes 100% of 12 queries (33% call for it); b, null never have the largest gate"
    )


def test_a_collapse_is_warned_about(llama, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(llama, tmp_path, stage="router", options={"max_steps": 1})
    assert any("the router has collapsed: " in record.message for record in caplog.records)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def bad(vector_):
    return People("toy", {}, (*toy_people().train, replace(sample("odd", "x", "y"), metadata={
        "expert_vector": json.dumps(vector_)})), ())  # fmt: skip


@pytest.mark.parametrize(
    ("people", "message"),
    [
        (toy_people(leave_out="N-"), "no training sample calls for N-: each of the ten poles needs some"),
        (bad([1.0] * 9), "sample odd has the expert vector .* which should be 10 numbers of 0 to 1"),
        (bad([1.5] * 10), "sample odd has the expert vector .* which should be 10 numbers of 0 to 1"),
        (People("toy", {}, (), ()), "the training split is empty"),
        (People("toy", {}, (replace(sample("bare", "x", "y"), metadata={}),), ()), "does not say which traits"),
        (People("toy", {}, (sample("mute", "x", ""),), ()), "sample mute has no response to learn from"),
    ],
)
def test_people_that_cannot_be_learned_from(llama, tmp_path, people, message):
    with pytest.raises(UserError, match=message) as caught:
        run(llama, tmp_path, people)
    assert "\n" not in str(caught.value)


def test_settings_that_make_no_sense(llama, t5, tmp_path):
    with pytest.raises(UserError, match="method.skip names warmdown, which is no stage"):
        run(llama, tmp_path, skip=["warmdown"])
    with pytest.raises(UserError, match="top_k=12 should be 1 to 11"):
        run(llama, tmp_path, stage="router", router={"top_k": 12})
    with pytest.raises(UserError, match="is an encoder-decoder LM"):
        run(t5, tmp_path)


def test_a_router_for_another_number_of_experts(llama, whole, tmp_path):
    shutil.copytree(whole / "personalizer", tmp_path / "p")
    manifest = json.loads((tmp_path / "p" / "personalizer.json").read_text())
    manifest["config"]["router"]["null_expert"] = False
    (tmp_path / "p" / "personalizer.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match="router.safetensors is a router over 11 experts, but there are 10 here"
    ) as caught:
        persona.load(llama, [tmp_path / "p"])
    assert "\n" not in str(caught.value)


def test_experts_that_differ(llama, whole, tmp_path):
    from persona.methods.persona_fuse.experts import read_experts

    shutil.copytree(whole / "personalizer" / "experts", tmp_path / "e")
    other = json.loads((tmp_path / "e" / "A_low" / "adapter_config.json").read_text())
    (tmp_path / "e" / "A_low" / "adapter_config.json").write_text(json.dumps({**other, "lora_alpha": 99}))
    with pytest.raises(UserError, match="A_low differs from O_high in its modules, rank or scaling"):
        read_experts(tmp_path / "e", llama)


# ---- by preference -------------------------------------------------------------------------------------------------


def test_every_stage_runs_with_wandb(llama, tmp_path, monkeypatch):
    """Its callback looks into the module that is trained."""
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "PROJECT": "persona", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run(llama, tmp_path / "a", options={"wandb": "offline", "max_steps": 1})
    assert list(tmp_path.glob("wandb/*/*.wandb"))


def test_preference_training(llama, tmp_path):
    """The first loss of DPO is ln 2, as fresh experts change nothing; then the response gains on what the LM says."""
    none = {"contrastive": 0.0, "kl": 0.0, "consistency": 0.0, "balance": 0.0}
    joint = JointConfig(5e-3, epochs=4, batch_size=12, objective="dpo", max_new_tokens=6, **none)
    run(llama, tmp_path, toy_people(2), skip=["warmup", "router"], joint=joint)
    logged = [json.loads(line) for line in (tmp_path / "stages" / "joint" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in logged if "dpo" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and steps[0]["dpo"] == pytest.approx(
        math.log(2), abs=1e-4
    )
    assert steps[-1]["dpo"] < 0.5 and steps[-1]["rewards/accuracies"] == 1
    said = [json.loads(line) for line in (tmp_path / "stages" / "joint" / "rejected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in said] == [one.id for one in toy_people(2).train]


@pytest.mark.parametrize("granularity", ("sequence", "token"))
def test_gradient_checkpointing_changes_no_loss(llama, tmp_path, granularity):
    """Blocks run once more in the backward pass, with the gates of their tokens."""
    calls, found, counts = [], [], []
    changes = {"router": {"granularity": granularity, "train_encoder": False}, "skip": ["warmup", "router"]}
    people = People("toy", {}, toy_people(1).train, ())
    handle = llama.model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        for on in (False, True):
            calls.clear()
            run(llama, tmp_path / str(on), people, options={"max_steps": 3, "gradient_checkpointing": on}, **changes)
            found.append(losses(tmp_path / str(on), "joint"))
            counts.append(len(calls))
    finally:
        handle.remove()
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert counts == [3, 6], "blocks were not recomputed in the backward pass"
    assert not any(getattr(module, "gradient_checkpointing", False) for module in llama.model.modules())


def test_an_encoder_that_is_another_one(llama, load_base, tmp_path):
    out = run(llama, tmp_path, toy_people(1), skip=["warmup", "joint"], router={"train_encoder": False},
              options={"max_steps": 1})  # fmt: skip
    manifest = json.loads((out / "personalizer.json").read_text())
    manifest["config"]["encoder_weights"] = "another"
    (out / "personalizer.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was trained with another encoder than the one that"):
        persona.load(llama, [out])
