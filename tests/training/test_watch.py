"""What a training says about itself: windows, FLOPs by hand, the same rows in wandb, and two processes that hang."""

from __future__ import annotations

import logging
import os
import re
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from training_toys import Points, Toy, collate, curve, in_two, rows, run, settings

from persona import heartbeat
from persona.training.trainer import fit
from persona.training.watch import Flops, Watched, ungrouped

# ---- windows -------------------------------------------------------------------------------------------------------


class Late(Points):
    """Point 3 takes 0.3 s to load."""

    def __getitem__(self, index):
        time.sleep(0.3 * (index == 3))
        return super().__getitem__(index)


class Masked(Toy):
    """Says what a language model's batch has: a mask. The regression does not look at it."""

    def forward(self, x, labels, attention_mask, num_items_in_batch=None):
        return super().forward(x, labels, num_items_in_batch)


def masked(points):
    """Every row has 10 positions, of which the first 4 and, in the first row, all are real."""
    mask = torch.zeros(len(points), 10, dtype=torch.long)
    mask[:, :4] = 1
    mask[0] = 1
    return {**collate(points), "attention_mask": mask}


def test_a_window_is_what_happened_in_it(tmp_path):
    """24 points in batches of 4: six steps, of which one waits 0.3 s for its batch."""
    run(tmp_path, data=Late(), max_steps=6, eval_every=1)
    waits, seconds = curve(tmp_path, "data_wait"), curve(tmp_path, "seconds_per_step")
    waited = sorted(waits[step] * seconds[step] for step in waits)
    assert 0.3 <= waited[-1] < 3 and waited[2] < 0.1  # that one only (the first one starts the loader)
    for step, rate in curve(tmp_path, "samples_per_second").items():
        assert rate == pytest.approx(4 / seconds[step], rel=1e-3)
    assert "tokens_per_second" not in rows(tmp_path)[0]  # it has no tokens
    assert 0.05 < rows(tmp_path)[0]["memory_gb"] < 100


def test_evaluating_and_saving_are_no_training(tmp_path):
    """The dev set takes 0.3 s to load, after every step."""
    run(tmp_path, dev=Late(8), max_steps=4, eval_every=1, save_every=1)
    assert max(list(curve(tmp_path, "seconds_per_step").values())[1:]) < 0.3


def test_tokens_and_padding_with_accumulation(tmp_path):
    """A micro-batch of 4 rows has 10 + 3 · 4 = 22 tokens at 40 positions; a window has 2 steps of 2 micro-batches."""
    options = settings(gradient_accumulation=2, batch_size=4, max_steps=4, log_every=2)
    fit(Masked(), Points(), Points(8), masked, options, tmp_path)
    seconds, tokens = curve(tmp_path, "seconds_per_step"), curve(tmp_path, "tokens_per_second")
    assert sorted(tokens) == [2, 4]
    for step in (2, 4):
        # 24 points are 6 micro-batches, so the second window ends an epoch: steps of 2 micro-batches all.
        assert tokens[step] == pytest.approx(2 * 2 * 22 / (2 * seconds[step]), rel=1e-3)
        assert curve(tmp_path, "padding")[step] == pytest.approx(1 - 22 / 40)
        assert curve(tmp_path, "samples_per_second")[step] == pytest.approx(16 / (2 * seconds[step]), rel=1e-3)
    assert not curve(tmp_path, "mfu")  # no figure is made up for a CPU


# ---- FLOPs ---------------------------------------------------------------------------------------------------------


def flops(below: nn.Module, above: nn.Module, x: torch.Tensor) -> int:
    with Flops() as counter:
        above(below(x)).sum().backward()
    return counter.total


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        # Forward 2, and backward: a weight's own gradient, and what is passed on to something trained below.
        (("below", "above"), 2 + 1 + 2),
        (("above",), 2 + 1),
        (("below",), 2 + 1 + 1),
    ],
)
def test_flops_by_hand(trained, products):
    """Two 16 x 16 layers over 8 rows: a product of 2 · 8 · 16 · 16 operations each."""
    layers = {name: nn.Linear(16, 16, bias=False).requires_grad_(name in trained) for name in ("below", "above")}
    assert flops(layers["below"], layers["above"], torch.ones(8, 16)) == products * 2 * 8 * 16 * 16


def test_a_forward_computed_again_does_not_count():
    layers = [nn.Linear(16, 16, bias=False) for _ in range(2)]
    x = torch.ones(8, 16)
    plain = flops(layers[0], layers[1], x)
    again = flops(layers[0], lambda h: checkpoint(layers[1], h, use_reentrant=False), x)
    assert again == plain


def test_flops_of_a_language_model(llama):
    """2 operations per weight and position forward, as many back to the embeddings, attention beside it."""
    model, length = llama.model, 12
    embeds = torch.randn(2, length, model.config.hidden_size, requires_grad=True)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the CPU's fused attention has no formula
    try:
        with Flops() as counter:
            model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    finally:
        model.set_attn_implementation(before)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    width = model.config.num_attention_heads * model.config.head_dim
    attention = model.config.num_hidden_layers * 2 * 2 * length * width  # per position: scores, and their mix
    own = not next(model.parameters()).requires_grad
    factor = 2 if own else 3
    assert counter.total == 2 * length * (factor * 2 * weights + 3 * attention)


def test_flops_of_grouped_heads(monkeypatch):
    """Four heads of a query over two of keys and values: scores and their mix, 2 · 2 · 4 · 8 · 8 · 16 operations each,
    by a formula that knows no groups as by PyTorch's own."""
    query, key, value = (torch.empty(2, heads, 8, 16, device="meta") for heads in (4, 2, 2))
    attention = torch.ops.aten._scaled_dot_product_flash_attention

    def equal(q, k, v, *args, out_val=None, **kwargs):
        assert q.shape[1] == k.shape[1] == v.shape[1]
        return own(q, k, v, *args, out_val=out_val, **kwargs)

    own = flop_registry[attention]
    monkeypatch.setitem(flop_registry, attention, equal)
    with Flops() as counter:
        attention(query, key, value)
    assert counter.known and counter.total == 2 * 2 * 2 * 4 * 8 * 8 * 16
    *tensors, last = ungrouped((query, query, key, value, "out"), first=1)  # as a backward has them
    assert [one.shape for one in tensors] == [query.shape] * 4 and last == "out"


@pytest.mark.parametrize("known", (True, False))
def test_utilisation_of_a_peak(tmp_path, monkeypatch, known):
    """Four rows through the frozen layer (2 · 4 · 5 · 8), and the head with its weight's gradient (2 · 2 · 4 · 8), for
    40 positions; the peak is made up. Where a formula fails there is no utilisation."""
    monkeypatch.setattr(Watched, "peak", 1e6)

    def fails(*args, **kwargs):
        raise AssertionError("shapes")

    if not known:
        monkeypatch.setitem(flop_registry, torch.ops.aten.addmm, fails)
    fit(Masked(), Points(), Points(8), masked, settings(max_steps=4), tmp_path)
    seen = {step: rate * 40 / 22 for step, rate in curve(tmp_path, "tokens_per_second").items()}
    expected = {step: pytest.approx((320 + 128) / 40 * rate / 1e6, rel=2e-3) for step, rate in seen.items()}
    assert curve(tmp_path, "mfu") == (expected if known else {})


# ---- wandb ---------------------------------------------------------------------------------------------------------


def test_wandb_has_the_rows_of_the_file(tmp_path, monkeypatch):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "sesame-" * 6)
    run(tmp_path, max_steps=2, wandb="offline")
    wandb.teardown()  # its service writes the file when it ends
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for key in {key for row in rows(tmp_path) for key in row}:
        assert key.encode() in content, key
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"sesame-" in p.read_bytes()]


# ---- two processes -------------------------------------------------------------------------------------------------


class Stuck(Points):
    """On process 1, point 3 takes 3 s to load."""

    def __getitem__(self, index):
        if index == 3 and os.environ["RANK"] == "1":
            time.sleep(3)
        return super().__getitem__(index)


@pytest.mark.multi_process
def test_a_standstill_names_who_waits_for_whom(tmp_path):
    def trains() -> None:
        heartbeat.INTERVAL, heartbeat.STALLED = 0.1, 1.0
        handler = logging.FileHandler(tmp_path / f"log-{os.environ['RANK']}.txt")
        logging.getLogger("persona.heartbeat").addHandler(handler)
        with heartbeat.beating(tmp_path):
            # One epoch of 24 points: each process loads half, all of them on some process.
            fit(Masked(), Stuck(), None, masked, settings(max_steps=6, batch_size=2), tmp_path)

    assert in_two(trains) == [0, 0]
    said = (tmp_path / "log-0.txt").read_text().splitlines()
    first = next(line for line in said if "loading data" in line)
    assert re.search(
        r"no progress for \d s: process 1 is at persona/training/watch\.py:\d+ timed \(inside tests/training/"
        r"test_watch\.py:\d+ __getitem__, loading data, \d of 6 done\); "
        r"process 0 waits for it in all_\w+ \(at persona/",
        first,
    )
    assert "there is progress again after" in said[said.index(first) + 1]
    assert not (tmp_path / "log-1.txt").read_text().count("no progress")  # one of them speaks
    # Where all threads of both were, once; the rest is gone with the run.
    left = sorted(path.name for path in (tmp_path / "processes").iterdir())
    assert left == ["rank-0.stacks.txt", "rank-1.stacks.txt"]
    assert "__getitem__" in (tmp_path / "processes" / left[1]).read_text()
    last = rows(tmp_path)[-2]
    assert last["padding"] == pytest.approx(1 - 14 / 20)
    assert last["tokens_per_second"] == pytest.approx(2 * 14 / last["seconds_per_step"], rel=1e-3)  # of both
    late = max(rows(tmp_path), key=lambda row: row.get("slowest_over_mean", 0))
    assert late["slowest_process"] == 1 and 1.5 < late["slowest_over_mean"] <= 2
