from __future__ import annotations

import pytest
import torch
from lm_toys import ALL, PROMPTS, no_edit, plain_logps, request, row

from persona import lm
from persona.errors import UserError
from persona.personalizer import LanguageModel
from persona.types import Message, Request

# Options of one to many tokens, in numbers that differ per row.
OPTIONS = (
    ("fox", "a dog that sleeps by the river", "x"),
    ("yes",),
    ("small boats", "long walks in the rain and a very good day"),
    ("1", "2", "3", "4", "5"),
    ("the market",),
)


def continuations(base):
    return [[base.encode_option(option) for option in row] for row in OPTIONS]


@pytest.mark.parametrize("name", ALL)
def test_shared_prompt_equals_plain_forwards(load_base, name):
    base = load_base(name)
    rows = [row(base, text) for text in PROMPTS]
    scored = lm.score(base, rows, continuations(base), no_edit)
    for one, options, logps in zip(rows, continuations(base), scored, strict=True):
        assert len(logps) == len(options)
        for option, got in zip(options, logps, strict=True):
            assert got.tolist() == pytest.approx(plain_logps(base, one.prompt, option).tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_batched_equals_one_by_one(load_base, name):
    base = load_base(name)
    rows = [row(base, text) for text in PROMPTS]
    options = continuations(base)
    together = lm.score(base, rows, options, no_edit, batch_size=8)
    in_twos = lm.score(base, rows, options, no_edit, batch_size=2)
    for i, one in enumerate(rows):
        alone = lm.score(base, [one], [options[i]], no_edit)[0]
        for a, b, c in zip(together[i], in_twos[i], alone, strict=True):
            assert a.tolist() == pytest.approx(c.tolist(), abs=1e-4)
            assert b.tolist() == pytest.approx(c.tolist(), abs=1e-4)


def test_many_options_do_not_overfill_a_batch(llama):
    """Options beyond 4 x batch_size start another batch; every option keeps its row and place."""
    rows = [row(llama, text) for text in PROMPTS]
    options = [[[5 + i, 7 + k] for k in range(5)] for i in range(len(rows))]
    widest = []
    handle = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: widest.append(len(kwargs["attention_mask"])), with_kwargs=True
    )
    try:
        small = lm.score(llama, rows, options, no_edit, batch_size=2)
    finally:
        handle.remove()
    assert max(widest) <= 8
    for a, b in zip(small, lm.score(llama, rows, options, no_edit), strict=True):
        assert torch.allclose(torch.stack(a), torch.stack(b), atol=1e-4)


def test_prompts_are_copied_to_their_options_one_layer_at_a_time(llama):
    """While the options are computed, the cache of all layers keeps one row per prompt."""
    rows = [row(llama, text) for text in PROMPTS[:2]]
    caches = []
    handle = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    try:
        lm.score(llama, rows, [[[5, 6], [7, 8], [9, 10]]] * 2, no_edit)
    finally:
        handle.remove()
    assert caches[0] is caches[1]
    assert [layer.keys.shape[0] for layer in caches[1].layers] == [2, 2]


def test_rows_without_continuations_are_empty(llama):
    rows = [row(llama, text) for text in PROMPTS[:3]]
    scored = lm.score(llama, rows, [[[5]], [], [[6, 7]]], no_edit)
    assert [len(logps) for logps in scored] == [1, 0, 1]
    assert lm.score(llama, rows, [[], [], []], no_edit) == [[], [], []]


@pytest.mark.parametrize("name", ("llama", "gemma3", "t5"))
def test_choose_sums_and_keeps_the_order_of_options(load_base, name):
    base = load_base(name)
    requests = [
        Request((Message("user", text),), options=options) for text, options in zip(PROMPTS, OPTIONS, strict=True)
    ]
    chosen = LanguageModel(base, batch_size=2).choose(requests)
    for asked, scores in zip(requests, chosen, strict=True):
        prompt = base.render(asked.messages)
        expected = [float(plain_logps(base, prompt, base.encode_option(o)).sum()) for o in asked.options]
        assert scores == pytest.approx(expected, abs=1e-3)
    backwards = [Request(r.messages, options=tuple(reversed(r.options))) for r in requests]
    for scores, other in zip(chosen, LanguageModel(base).choose(backwards), strict=True):
        assert scores == pytest.approx(list(reversed(other)), abs=1e-3)


def test_single_tokens_sum_to_one(llama):
    """log p over the whole vocabulary as options is a distribution."""
    scored = lm.score(llama, [row(llama, "the fox")], [[[token] for token in range(330)]], no_edit)[0]
    assert float(torch.cat(scored).exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("options", (None, ()))
def test_choose_without_options_is_an_error(llama, options):
    with pytest.raises(UserError, match="needs options.*the fox"):
        LanguageModel(llama).choose([Request((Message("user", "the fox"),), options=options)])


def test_empty_option_is_an_error(llama):
    with pytest.raises(UserError, match="option is empty"):
        LanguageModel(llama).choose([Request((Message("user", "the fox"),), options=("a", ""))])


@pytest.mark.parametrize("name", ("llama", "gemma2", "t5"))
def test_a_response_scores_what_it_was_generated_with(load_base, name):
    base = load_base(name)
    rows = [row(base, text, seed=i, temperature=1.0, max_new_tokens=20) for i, text in enumerate(PROMPTS)]
    responses = lm.respond(base, rows, no_edit)
    scored = lm.score(base, rows, [[response.tokens] for response in responses], no_edit)
    for response, logps in zip(responses, scored, strict=True):
        assert logps[0].tolist() == pytest.approx(response.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_loglikelihood_is_that_of_the_reply_and_its_end(load_base, name):
    base = load_base(name)
    requests = [request(text, max_new_tokens=5) for text in PROMPTS]
    replies = ["a small boat", "yes", "in the rain , ada", "fox", "?"]
    for asked, reply, (total, n) in zip(
        requests, replies, LanguageModel(base).loglikelihood(requests, replies), strict=True
    ):
        tokens = base.render_reply(asked.messages, reply)
        assert n == len(tokens)
        expected = plain_logps(base, base.render(asked.messages), tokens)
        assert total == pytest.approx(float(expected.sum()), abs=1e-3)
