from __future__ import annotations

import pytest
import torch
from lm_toys import ALL, DECODERS, PROMPTS, no_edit, plain_greedy, plain_logps, request, row

from persona import lm
from persona.lm import Row, assemble
from persona.lm.batch import batches, forward_logits, nll_sum

REPLIES = ("fox", "a dog that sleeps", "yes", "1 2", "the market by the river")


@torch.no_grad()
def split(base, text: str, n: int) -> tuple[Row, list[int]]:
    """A row whose first n prompt tokens are given as vectors, and the whole prompt."""
    whole = base.render(request(text, max_new_tokens=5).messages)
    vectors = base.embed(torch.tensor(whole[:n]))
    return Row(whole[n:], vectors, request(text, max_new_tokens=5)), whole


@pytest.mark.parametrize("name", ALL)
def test_vectors_of_real_tokens_are_those_tokens(load_base, name):
    base = load_base(name)
    option = base.encode_option("small boats")
    pairs = [split(base, text, n) for text, n in zip(PROMPTS, (2, 5, 1, 4, 3), strict=True)]
    scored = lm.score(base, [one for one, _ in pairs], [[option]] * len(pairs), no_edit)
    replies = lm.respond(base, [one for one, _ in pairs], no_edit)
    for (_, whole), logps, reply in zip(pairs, scored, replies, strict=True):
        assert logps[0].tolist() == pytest.approx(plain_logps(base, whole, option).tolist(), abs=1e-4)
        assert list(reply.tokens) == plain_greedy(base, whole, 5)


@pytest.mark.parametrize("name", ("llama", "t5"))
def test_single_row_logits_are_bitwise_those_of_the_tokens(load_base, name):
    base = load_base(name)
    one, whole = split(base, PROMPTS[1], 4)
    plain = Row(whole, None, one.request)
    a, b = assemble(base, [one]), assemble(base, [plain])
    assert torch.equal(a.embeds, b.embeds) and torch.equal(a.mask, b.mask) and torch.equal(a.positions, b.positions)


def test_rows_with_and_without_vectors_share_a_batch(llama, t5):
    for base in (llama, t5):
        generator = torch.Generator().manual_seed(0)
        prefixes = [torch.randn(n, base.hidden_size, generator=generator) if n else None for n in (3, 0, 1, 0, 2)]
        rows = [row(base, text, prefix) for text, prefix in zip(PROMPTS, prefixes, strict=True)]
        option = base.encode_option("small boats")
        together = lm.score(base, rows, [[option]] * 5, no_edit)
        for i, one in enumerate(rows):
            alone = lm.score(base, [one], [[option]], no_edit)[0][0]
            assert together[i][0].tolist() == pytest.approx(alone.tolist(), abs=1e-4)
            if one.prefix is not None:
                bare = lm.score(base, [Row(one.prompt, None, one.request)], [[option]], no_edit)[0][0]
                assert not torch.allclose(bare, alone, atol=1e-3), "the vectors had no effect"


def test_no_vectors_and_zero_vectors_are_the_same(llama):
    none, empty = row(llama, "the fox"), row(llama, "the fox", torch.zeros(0, llama.hidden_size))
    other = row(llama, "good morning", torch.ones(2, llama.hidden_size))
    a, b = assemble(llama, [none, other]), assemble(llama, [empty, other])
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    a, b = assemble(llama, [none]), assemble(llama, [empty])
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_padding_positions_and_labels_by_hand(llama, t5):
    rows = [
        Row([11, 12, 13], None, request("")),
        Row([21], torch.ones(2, 32), request("")),
        Row([31], None, request("")),
    ]
    inputs = assemble(llama, rows, [[91], [92, 93, 94], [95]])
    assert inputs.mask.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 1, 1]]
    assert inputs.positions.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1]]
    no = -100
    assert inputs.labels.tolist() == [[no] * 5 + [91], [no] * 3 + [92, 93, 94], [no] * 5 + [95]]
    assert torch.equal(inputs.embeds[1, :2], torch.ones(2, 32))
    assert torch.equal(inputs.embeds[1, 2], llama.embed.weight[21])
    assert torch.equal(inputs.embeds[0, 2:5], llama.embed.weight[11:14])
    inputs = assemble(t5, rows, [[91], [92, 93, 94], [95]])
    assert inputs.mask.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert inputs.labels.tolist() == [[91, no, no], [92, 93, 94], [95, no, no]]


@pytest.mark.parametrize("name", ALL)
def test_training_loss_is_the_nll_of_the_replies(load_base, name):
    base = load_base(name)
    rows = [row(base, text) for text in PROMPTS]
    replies = [base.render_reply(one.request.messages, reply) for one, reply in zip(rows, REPLIES, strict=True)]
    with torch.no_grad():
        loss = nll_sum(*forward_logits(base, assemble(base, rows, replies)))
    expected = -sum(float(plain_logps(base, one.prompt, r).sum()) for one, r in zip(rows, replies, strict=True))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", (*DECODERS[:1], "t5"))
def test_gradients_reach_the_vectors_of_every_row(load_base, name):
    base = load_base(name)
    prefixes = [torch.randn(2, base.hidden_size, requires_grad=True) for _ in PROMPTS]
    rows = [row(base, text, prefix) for text, prefix in zip(PROMPTS, prefixes, strict=True)]
    nll_sum(*forward_logits(base, assemble(base, rows, [[5, 2]] * len(rows)))).backward()
    assert all(bool(prefix.grad.abs().sum(-1).gt(0).all()) for prefix in prefixes)
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_batches_are_longest_first_and_complete():
    assert list(batches([1, 5, 3, 4, 2], 2)) == [[1, 3], [2, 4], [0]]
    assert list(batches([], 2)) == []
