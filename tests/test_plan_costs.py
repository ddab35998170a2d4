"""The plan's formulas by hand: memory, traffic, seconds, checkpoints, and which launch it names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from persona.config import CONFIGS
from persona.config.rates import CARDS, PlanRates
from persona.gpus import peak
from persona.plan.backends import BACKENDS, BUCKET, LIVE, SINGLE, Backend, Part, Traffic, memory, traffic
from persona.plan.costs import RNG, Load, cheapest, cost, costs, enough, generation_hours, quickest
from persona.plan.models import count_flops, lm_forward
from persona.plan.report import command

BY = {backend.launch: backend for backend in (SINGLE, *BACKENDS)}
PARTS = [Part("base LM", 1000, False, 2, largest=100), Part("embedder", 100, True, 4)]
RATES = PlanRates(gpu="H100", utilisation=0.5, intra=10.0, inter=5.0, disk=2.0)
LOAD = Load("t", PARTS, 7, 5, flops=1e15, tokens=30, samples=100, epochs=2, batch=2, accumulation=4, bf16=True)


def test_back_ends_are_those_of_the_launch_files() -> None:
    files = {path.stem for path in (CONFIGS / "launch").glob("*.yaml")}
    # What is in the CPU's memory is not planned for.
    assert set(BY) == {name for name in files if not name.endswith("_offload")}


def test_every_card_has_rates() -> None:
    assert all(peak(name, "bf16") and peak(name, "fp32") for name in CARDS)


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launch", "gpus", "weights", "gradients", "optimizer", "buffers"),
    [
        ("single", 1, 1000 * 2 + 100 * 4 + 100 * 2, 400, 800, 0),
        ("ddp", 4, 1000 * 2 + 100 * 4 + 100 * 2, 400, 800, 400),
        ("zero1", 4, 1000 * 2 + 100 * 4, 100, 300, 4 * BUCKET),
        ("zero2", 4, 1000 * 2 + 100 * 4, 100, 300, 4 * BUCKET),
        ("zero3", 4, 600, 100, 300, 2 * BUCKET + 2400),
        ("fsdp2", 4, (1000 * 2 + 100 * 4) // 4, 100, 200, 2 * 100 * 2),
    ],
)
def test_memory_by_hand(launch: str, gpus: int, weights: int, gradients: int, optimizer: int, buffers: int) -> None:
    made = memory(BY[launch], gpus, PARTS, bf16=True, accumulation=1, activations=7, logits=5)
    assert (made.weights, made.gradients, made.optimizer, made.buffers) == (weights, gradients, optimizer, buffers)
    assert made.total == weights + gradients + optimizer + buffers + 12


def test_accumulated_gradients_are_whole_where_they_are_divided_once_a_step() -> None:
    def held(launch: str) -> int:
        return memory(BY[launch], 4, PARTS, bf16=True, accumulation=3, activations=0, logits=0).gradients

    assert {name: held(name) for name in BY} == {
        "single": 400,
        "ddp": 400,
        "zero1": 400,
        "zero2": 100,
        "zero3": 100,
        "fsdp2": 400,
    }


def test_memory_in_float32_and_of_what_no_back_end_divides() -> None:
    parts = [Part("trained copy", 100, True, 4), Part("as it was", 100, False, 4, sharded=False)]
    plain = memory(SINGLE, 1, parts, bf16=False, accumulation=1, activations=0, logits=0)
    assert (plain.weights, plain.gradients, plain.optimizer) == (800, 400, 800)
    assert memory(BY["zero3"], 4, parts, bf16=False, accumulation=1, activations=0, logits=0).weights == 400 + 100
    assert memory(BY["fsdp2"], 4, parts, bf16=False, accumulation=1, activations=0, logits=0).weights == 400 + 100
    half = [Part("all", 100, True, 2)]
    assert memory(BY["ddp"], 4, half, bf16=True, accumulation=1, activations=0, logits=0).optimizer == 400
    assert (
        memory(BY["fsdp2"], 4, half, bf16=True, accumulation=1, activations=0, logits=0).optimizer == 200
    )  # float32, a quarter
    huge = [Part("base LM", 3 * LIVE, False, 2)]
    assert memory(BY["zero3"], 4, huge, bf16=True, accumulation=1, activations=0, logits=0).buffers == 2 * (
        BUCKET + LIVE
    )


# ---- traffic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        ("ddp", Traffic(reduced=400)),
        ("zero1", Traffic(reduced=200, gathered=400)),
        ("zero2", Traffic(reduced=3 * 200, gathered=400)),
        ("zero3", Traffic(gathered=2400, scattered=3 * 200)),  # as few weights stay to the end of the step
        ("fsdp2", Traffic(gathered=3 * 2 * 2200, scattered=200)),
    ],
)
def test_traffic_of_a_step_of_three_forwards_by_hand(launch: str, expected: Traffic) -> None:
    assert traffic(BY[launch], 4, PARTS, bf16=True, accumulation=3) == expected
    assert traffic(BY[launch], 1, PARTS, bf16=True, accumulation=3) == Traffic()


def test_zero3_gathers_what_it_lets_go_twice() -> None:
    huge = [Part("base LM", 3 * LIVE, False, 2)]
    assert traffic(BY["zero3"], 4, huge, bf16=True, accumulation=1).gathered == 2 * (2 * 3 * LIVE - LIVE)
    assert traffic(BY["zero3"], 4, huge, bf16=True, accumulation=2).gathered == 2 * (4 * 3 * LIVE - 3 * LIVE)
    assert traffic(BY["fsdp2"], 4, huge, bf16=True, accumulation=1).gathered == 2 * 2 * 3 * LIVE


def test_what_is_sent() -> None:
    # 4 ranks: each sends 3/4 of what is gathered or scattered, and twice that of what is reduced
    assert Traffic(reduced=400, gathered=80, scattered=40).sent(4) == 2 * 300 + 60 + 30
    assert Traffic(reduced=400).sent(1) == 0


# ---- seconds -------------------------------------------------------------------------------------------------------


def test_a_step_of_two_nodes_by_hand() -> None:
    parts = [Part("all", 10**9, True, 4)]
    made = cost(replace(LOAD, parts=parts), BY["ddp"], 2, 8, 4, RATES)
    assert made.compute == pytest.approx(1e15 * 2 * 4 / (989e12 * 0.5))
    assert (made.in_node, made.between) == (2 * 4e9 * 3 / 4, 2 * 4e9 / 2)
    assert made.communication == pytest.approx(6e9 / 10e9 + 4e9 / 5e9)
    assert (made.fastest, made.slowest) == (made.compute, made.compute + made.communication)
    # 100 samples in 7 batches of 2 on 8 GPUs, 4 of them a step
    assert (made.global_batch, made.steps_per_epoch, made.steps, made.tokens_per_step) == (64, 2, 4, 1920)
    assert made.gpu_hours == pytest.approx(8 * 4 * made.slowest / 3600)


def test_few_tokens_wait_for_the_weights() -> None:
    idle = Part("unread", 10**12, False, 2, used=False)
    tiny = replace(LOAD, parts=[Part("base LM", 10**9, False, 4), idle], flops=1.0)
    assert cost(tiny, SINGLE, 1, 1, 3, RATES).compute == pytest.approx(3 * 2 * 2e9 / 3350e9)


def test_the_links_are_the_cards_where_none_is_given() -> None:
    load = replace(LOAD, parts=[Part("all", 10**9, True, 4)])
    made = cost(load, BY["ddp"], 1, 2, 1, PlanRates(gpu="A100"))
    assert made.communication == pytest.approx(4e9 / 300e9)


def test_checkpoints_by_hand() -> None:
    assert LOAD.checkpoint == 100 * 4 + 100 * 8
    states = torch.get_rng_state().numel() + 8 * (624 + 625)
    assert states < RNG < states + 1500  # headers and the JSON beside them


def test_texts_by_hand() -> None:
    # read: 2 operations per parameter and token
    hours = generation_hours(10, 100, True, 10**9, 2 * 10**9, 4, True, RATES)
    assert hours == pytest.approx(10 * 100 * 2e9 / (989e12 * 0.5) / 3600)
    # written: 3 batches of 4, weights read for each of 100 tokens
    hours = generation_hours(10, 100, False, 10**9, 2 * 10**9, 4, True, RATES)
    assert hours == pytest.approx(3 * 100 * 2e9 / 3350e9 / 3600)


# ---- operations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True], ids=["frozen under a prefix", "trained"])
def test_operations_by_hand(trained: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    with torch.device("meta"):
        lm = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).requires_grad_(trained)
    forward = lm_forward(lm, 1, 5, 3, prefix=2)
    length = 5 + 3 + 2
    weights = 3 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) + 16 * 40
    attention = 3 * 2 * 2 * length**2 * 16  # scores and what they weigh
    once = 2 * weights * length + attention
    back = 2 * weights * length * (1 + trained) + 2 * attention
    assert count_flops(lambda: forward().logits) == once + back
    assert count_flops(lambda: forward().logits, recomputes=True) == 2 * once + back
    less = lm_forward(lm, 1, 5, 3, 2, logits=3)
    head = 16 * 40 * 2 * (length - 3)
    assert count_flops(lambda: less().logits) == once + back - head * (2 + trained)


# ---- what to launch ------------------------------------------------------------------------------------------------


def test_the_cheapest_that_fits_is_named() -> None:
    found = costs(LOAD, 1, 4, RATES)
    assert [one.backend.launch for one in found] == ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
    assert all(one.global_batch == 32 and one.fits for one in found)
    best, first = cheapest(found), quickest(found)
    assert best is found[0] and first is not None and first.gpus == 4
    assert command(LOAD, found[0]) == "python train.py launch=single trainer.gradient_accumulation=16"
    assert command(LOAD, found[1]) == "python train.py launch=ddp launch.num_processes=4"
    over = costs(LOAD, 2, 16, RATES)[3]
    assert command(LOAD, over).endswith("launch=zero2 launch.num_processes=16 launch.num_machines=2")


def test_what_fits_nowhere_is_looked_for_on_more_gpus() -> None:
    parts = [Part("base LM", 100 * 10**9, False, 2, largest=10**9)]  # 200 GB
    big = replace(LOAD, parts=parts)
    found = costs(big, 1, 2, RATES)
    assert cheapest(found) is None
    more = enough(big, 1, 2, RATES)
    assert more is not None and (more.nodes, more.gpus) == (1, 4) and more.backend.weights
    assert enough(replace(LOAD, activations=10**12), 1, 2, RATES) is None
    wide = enough(replace(LOAD, parts=[Part("base LM", 10**12, False, 2)]), 1, 6, RATES)
    assert wide is not None and (wide.nodes, wide.gpus) == (8, 48)


def test_a_backend_divides_what_it_says() -> None:
    own = Backend("x", optimizer=True)
    assert traffic(own, 2, PARTS, bf16=False, accumulation=1) == Traffic(reduced=400, gathered=400)
