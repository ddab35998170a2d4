from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from lm_toys import ALL, PROMPTS, no_edit, plain_greedy, plain_logps, row

from persona import lm
from persona.lm import BaseLM
from persona.types import Response

SETTINGS = {
    "greedy": {"max_new_tokens": 9},
    "sampled": {"max_new_tokens": 9, "temperature": 1.3},
    "nucleus": {"max_new_tokens": 9, "temperature": 0.8, "top_p": 0.7},
    "beams": {"max_new_tokens": 7, "num_beams": 3},
}


def same(one: Response, other: Response) -> None:
    assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def seeded_rows(base: BaseLM, **sampling):
    return [row(base, text, seed=100 + i, **sampling) for i, text in enumerate(PROMPTS)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("setting", SETTINGS)
def test_batched_equals_one_by_one(load_base, name, setting):
    base = load_base(name)
    rows = seeded_rows(base, **SETTINGS[setting])
    together = lm.respond(base, rows, no_edit, batch_size=8)
    alone = [lm.respond(base, [one], no_edit)[0] for one in rows]
    for a, b in zip(together, alone, strict=True):
        same(a, b)
    assert len({r.tokens for r in alone}) > 1, "all replies are the same: the test would not see a mix-up"


@pytest.mark.parametrize("name", ALL)
def test_greedy_is_the_argmax_of_plain_forwards(load_base, name):
    base = load_base(name)
    rows = seeded_rows(base, max_new_tokens=6)
    for one, response in zip(rows, lm.respond(base, rows, no_edit), strict=True):
        assert list(response.tokens) == plain_greedy(base, one.prompt, 6)


@pytest.mark.parametrize("name", ("llama", "gemma3", "t5"))
@pytest.mark.parametrize("setting", SETTINGS)
def test_logprobs_are_those_of_the_unwarped_model(load_base, name, setting):
    base = load_base(name)
    for one, response in zip(
        rows := seeded_rows(base, **SETTINGS[setting]), lm.respond(base, rows, no_edit), strict=True
    ):
        assert len(response.logprobs) == len(response.tokens) > 0
        expected = plain_logps(base, one.prompt, list(response.tokens))
        assert response.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_mixed_settings_keep_their_order(llama):
    rows = [row(llama, text, seed=i, **SETTINGS[s]) for i, text in enumerate(PROMPTS) for s in SETTINGS]
    together = lm.respond(llama, rows, no_edit, batch_size=3)
    for one, response in zip(rows, together, strict=True):
        same(response, lm.respond(llama, [one], no_edit)[0])


@pytest.mark.parametrize("name", ("llama", "t5"))
def test_stop_string_ends_one_row_and_leaves_the_others(load_base, name):
    base = load_base(name)
    free = lm.respond(base, seeded_rows(base, max_new_tokens=12), no_edit)
    # A stop that the first reply reaches in its middle, and that not every other reply reaches.
    stop = free[0].text[len(free[0].text) // 2 :][:2]
    rows = seeded_rows(base, max_new_tokens=12, stop=(stop,))
    together = lm.respond(base, rows, no_edit)
    reasons = Counter(response.finish_reason for response in together)
    assert together[0].finish_reason == "stop" and reasons["stop"] < len(rows)
    for one, response, before in zip(rows, together, free, strict=True):
        same(response, lm.respond(base, [one], no_edit)[0])
        assert stop not in response.text
        assert response.text == before.text.split(stop)[0].strip()
        assert response.tokens == before.tokens[: len(response.tokens)]


def test_stop_padding_is_not_taken_for_an_end(llama):
    """Where padding is the end token (tokenizers without one of their own), a row that stopped early did not end."""
    base = BaseLM(llama.model, copy.deepcopy(llama.tokenizer), "llama without a padding token")
    base.tokenizer.pad_token = base.tokenizer.eos_token
    free = lm.respond(base, seeded_rows(base, max_new_tokens=12), no_edit)
    stop = free[0].text[2:4]
    rows = seeded_rows(base, max_new_tokens=12, stop=(stop,))
    together = lm.respond(base, rows, no_edit)
    alone = [lm.respond(base, [one], no_edit)[0] for one in rows]
    assert together[0].finish_reason == "stop"
    for a, b in zip(together, alone, strict=True):
        same(a, b)


def test_length_and_end_are_told_apart(llama):
    rows = [row(llama, text, max_new_tokens=200) for text in PROMPTS]
    for response in lm.respond(llama, rows, no_edit):
        ended = response.tokens[-1] in llama.eos_ids
        assert response.finish_reason == ("eos" if ended else "length")
        assert ended or len(response.tokens) == 200
        assert not any(token in llama.eos_ids for token in response.tokens[:-1])


def test_the_models_own_generation_settings_do_not_leak_in(llama):
    """A generation_config.json may ask for sampling, penalties or a minimum length; the request decides here."""
    plain = lm.respond(llama, seeded_rows(llama, max_new_tokens=8), no_edit)
    before = copy.deepcopy(llama.model.generation_config)
    try:
        llama.model.generation_config.update(
            do_sample=True, temperature=3.0, top_k=1, repetition_penalty=9.0, no_repeat_ngram_size=1, min_length=50
        )
        for a, b in zip(lm.respond(llama, seeded_rows(llama, max_new_tokens=8), no_edit), plain, strict=True):
            same(a, b)
    finally:
        llama.model.generation_config = before


def test_seeds_decide_a_sample(llama):
    replies = lm.respond(
        llama, [row(llama, "the fox", seed=s, temperature=1.5, max_new_tokens=8) for s in (1, 2, 1)], no_edit
    )
    same(replies[0], replies[2])
    assert replies[0].tokens != replies[1].tokens


@pytest.mark.parametrize("temperature", (0.7, 1.0, 2.0))
def test_sampling_follows_the_softmax(llama, temperature):
    """2,000 draws of the next token between the two likeliest, against softmax(logits / temperature): |z| < 4."""
    prompt = llama.render(row(llama, "the fox").request.messages)
    with torch.no_grad():
        logits = llama.model(input_ids=torch.tensor([prompt])).logits[0, -1].float()
    expected = (logits / temperature).softmax(-1)
    n = 2000
    rows = [row(llama, "the fox", seed=s, temperature=temperature, max_new_tokens=1) for s in range(n)]
    drawn = Counter(response.tokens[0] for response in lm.respond(llama, rows, no_edit, batch_size=500))
    for token in expected.topk(5).indices.tolist():
        p = float(expected[token])
        z = (drawn[token] - n * p) / math.sqrt(n * p * (1 - p))
        assert abs(z) < 4, f"token {token}: drawn {drawn[token]} times, expected {n * p:.0f}"


def test_top_p_draws_only_from_the_nucleus(llama):
    prompt = llama.render(row(llama, "the fox").request.messages)
    with torch.no_grad():
        logits = llama.model(input_ids=torch.tensor([prompt])).logits[0, -1].float()
    p, order = logits.softmax(-1).sort(descending=True)
    nucleus = set(order[: int((p.cumsum(0) < 0.15).sum()) + 1].tolist())
    assert 1 < len(nucleus) < 50
    rows = [row(llama, "the fox", seed=s, temperature=1.0, top_p=0.15, max_new_tokens=1) for s in range(800)]
    assert {response.tokens[0] for response in lm.respond(llama, rows, no_edit, batch_size=400)} == nucleus
