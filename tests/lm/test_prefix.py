"""Shared beginnings: the same numbers as without sharing, fewer tokens computed, nowhere where it would be wrong."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from lm_toys import DECODERS, no_edit, plain_greedy, plain_logps, request

from persona import lm
from persona.lm import BaseLM, Row
from persona.lm.prefix import Shared, can_share, find_families
from persona.personalizer import LanguageModel, Personalizer
from persona.types import Message, Persona, Request, Sampling

SETTINGS = {
    "greedy": {"max_new_tokens": 6},
    "sampled": {"max_new_tokens": 6, "temperature": 1.3},
    "nucleus": {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.7},
    "beams": {"max_new_tokens": 5, "num_beams": 3},
}


def tokens(n: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(10, 330) for _ in range(n)]


def family_rows(base: BaseLM, **sampling) -> list[Row]:
    """In mixed order: six rows on one context of 60 tokens, four on two vectors and 50 tokens, four samples of one
    prompt, and two rows that share nothing; own parts of 1 to 9 tokens."""
    vectors = base.embed(torch.tensor(tokens(2, 90))) * 0.9
    rows = [(tokens(60, 1) + tokens(1 + k % 4, 10 + k), None) for k in range(6)]
    rows += [(tokens(50, 2) + tokens(2 + 2 * k, 20 + k), vectors.clone()) for k in range(4)]
    rows += [(tokens(57, 3), None)] * 4 + [(tokens(40, 4), None), (tokens(3, 5), vectors)]
    rows = [Row(prompt, prefix, request("", seed=k, **sampling)) for k, (prompt, prefix) in enumerate(rows)]
    random.Random(0).shuffle(rows)
    return rows


@contextmanager
def computed(base: BaseLM) -> Iterator[list[tuple[int, int]]]:
    """(rows, columns) of every forward within."""
    shapes: list[tuple[int, int]] = []

    def note(module, args, kwargs):
        given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        shapes.append((given.shape[0], given.shape[1]))

    handle = base.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def options(rows: list[Row]) -> list[list[list[int]]]:
    return [[tokens(1 + (k + o) % 4, 100 + 7 * k + o) for o in range(1 + k % 3)] for k in range(len(rows))]


# ---- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_scores_are_those_of_plain_forwards(load_base, name):
    base = load_base(name)
    rows = [row for row in family_rows(base) if row.prefix is None]
    with computed(base) as shapes:
        shared = lm.score(base, rows, options(rows))
    assert len(shapes) == 3, "one forward over the beginnings, one over the prompts' ends, one over the options"
    for row, row_options, logps in zip(rows, options(rows), shared, strict=True):
        for option, got in zip(row_options, logps, strict=True):
            assert got.tolist() == pytest.approx(plain_logps(base, row.prompt, option).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_scores_are_those_without_sharing(load_base, name):
    base = load_base(name)
    rows = family_rows(base)
    for batch_size in (32, 7):
        shared = lm.score(base, rows, options(rows), None, batch_size)
        apart = lm.score(base, rows, options(rows), no_edit, batch_size)
        alone = [lm.score(base, [row], [given])[0] for row, given in zip(rows, options(rows), strict=True)]
        for a, b, c in zip(shared, apart, alone, strict=True):
            assert torch.cat(a).tolist() == pytest.approx(torch.cat(b).tolist(), abs=1e-5)
            assert torch.cat(a).tolist() == pytest.approx(torch.cat(c).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ("llama", "gemma3", "gpt_neox"))
def test_in_double_precision_nothing_is_left_of_the_difference(load_base, name):
    """What float32 shows is rounding: in float64 the two ways agree to ten digits."""
    single = load_base(name)
    base = BaseLM(copy.deepcopy(single.model).double(), single.tokenizer, "in double precision")
    rows = family_rows(base)
    with torch.no_grad():
        inputs = lm.assemble(base, rows)
        cache = Shared(base, rows, None).cache(range(len(rows)))
        done = cache.get_seq_length()
        kept = {"attention_mask": inputs.mask, "logits_to_keep": 1}
        shared = base.model(
            inputs_embeds=inputs.embeds[:, done:],
            position_ids=inputs.positions[:, done:],
            past_key_values=cache,
            **kept,
        ).logits
        plain = base.model(inputs_embeds=inputs.embeds, position_ids=inputs.positions, **kept).logits
    assert done > 32 and torch.allclose(shared, plain, atol=1e-9)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_replies_are_those_without_sharing(load_base, name, setting):
    base = load_base(name)
    rows = family_rows(base, **SETTINGS[setting])
    with computed(base) as with_sharing:
        shared = lm.respond(base, rows)
    with computed(base) as without:
        apart = lm.respond(base, rows, no_edit)
    first = sum(rows * columns for rows, columns in with_sharing[:2])
    assert first < 0.6 * without[0][0] * without[0][1], "the first forwards are as large as without sharing"
    for one, other in zip(shared, apart, strict=True):
        assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len({reply.tokens for reply in shared}) > 5


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_is_the_argmax_of_plain_forwards(load_base, name):
    base = load_base(name)
    rows = [row for row in family_rows(base, max_new_tokens=5) if row.prefix is None]
    for row, reply in zip(rows, lm.respond(base, rows), strict=True):
        assert list(reply.tokens) == plain_greedy(base, row.prompt, 5)


def test_a_stop_string_ends_one_row_and_leaves_the_others(llama):
    free = lm.respond(llama, family_rows(llama, max_new_tokens=10))
    stop = free[0].text[len(free[0].text) // 2 :][:2]
    rows = family_rows(llama, max_new_tokens=10, stop=(stop,))
    shared, apart = lm.respond(llama, rows), lm.respond(llama, rows, no_edit)
    assert shared[0].finish_reason == "stop"
    for one, other, before in zip(shared, apart, free, strict=True):
        assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
        assert one.text == before.text.split(stop)[0].strip()


def test_samples_of_one_prompt_share_all_of_it_but_a_token(llama):
    rows = [Row(tokens(80, 0), None, request("", seed=s, temperature=1.5, max_new_tokens=4)) for s in range(8)]
    with computed(llama) as shapes:
        replies = lm.respond(llama, rows)
    assert shapes[:2] == [(1, 79), (8, 1)]
    assert len({reply.tokens for reply in replies}) > 1
    assert replies[3].tokens == lm.respond(llama, rows[3:4])[0].tokens


def test_windows_keep_the_columns_they_would_have(load_base):
    """A sliding layer's cache holds the window's end of each row's own beginning, and counts all its columns."""
    base = load_base("mistral")
    rows = [Row(tokens(60, 1) + tokens(1 + k, k), None, request("")) for k in range(8)]
    with torch.no_grad():
        cache = Shared(base, rows, None).cache(range(8))
    assert cache.get_seq_length() == 60 and cache.layers[0].keys.shape[2] == 7
    inputs = lm.assemble(base, rows)
    with torch.no_grad():
        plain = base.model(
            inputs_embeds=inputs.embeds[:, :60],
            attention_mask=inputs.mask[:, :60],
            position_ids=inputs.positions[:, :60],
        ).past_key_values
    for one, other in zip(cache.layers, plain.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-4) and torch.allclose(one.values, other.values, atol=1e-4)


# ---- where it is not done ------------------------------------------------------------------------------------------


def test_an_edit_of_modules_shuts_it_off(llama):
    rows = [Row(tokens(60, 1) + [5 + k], None, request("", max_new_tokens=1)) for k in range(8)]
    for ask in (lambda edit: lm.respond(llama, rows, edit), lambda edit: lm.score(llama, rows, [[[7]]] * 8, edit)):
        with computed(llama) as shapes:
            ask(no_edit)
        assert shapes == [(8, 61)]
        with computed(llama) as shapes:
            ask(None)
        assert shapes == [(1, 60), (8, 1)]


class Bare(Personalizer):
    method = "bare"


class Editing(Personalizer):
    method = "editing"

    def modules(self, requests):
        return nullcontext()


def test_a_stack_shares_until_someone_opens_the_third_door(llama):
    context = " ".join(["the quick brown fox jumps over the lazy dog"] * 6)
    persona = Persona("ada")
    asked = [
        Request(
            (Message("system", context), Message("user", question)), persona, Sampling(max_new_tokens=3), ("a", "b")
        )
        for question in (
            "good morning",
            "the red house ?",
            "i like boats",
            "the market",
            "a line",
            "rain",
            "how",
            "my",
        )
    ]
    shares, apart = LanguageModel(llama, [Bare()]), LanguageModel(llama, [Bare(), Editing()])
    with computed(llama) as few:
        replies, chosen = shares.respond(asked), shares.choose(asked)
    with computed(llama) as many:
        replies_apart, chosen_apart = apart.respond(asked), apart.choose(asked)
    assert max(columns for rows, columns in few if rows == len(asked)) < 40
    assert max(columns for rows, columns in many if rows == len(asked)) > 60
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in replies_apart]
    for a, b in zip(chosen, chosen_apart, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_an_encoder_reads_the_whole_row(t5):
    rows = [Row(tokens(60, 1) + [5 + k], None, request("", max_new_tokens=2)) for k in range(8)]
    assert Shared(t5, rows, None).cache(range(8)) is None
    for one, other in zip(lm.respond(t5, rows), lm.respond(t5, rows, no_edit), strict=True):
        assert one.tokens == other.tokens and one.logprobs == other.logprobs


@pytest.mark.parametrize("rope", ({"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope"}))
def test_angles_that_depend_on_the_whole_length_are_not_shared(llama, rope):
    model = copy.deepcopy(llama.model)
    assert can_share(llama)
    model.config.rope_parameters = {**model.config.rope_parameters, **rope}
    assert not can_share(BaseLM(model, llama.tokenizer, "angles by length"))


def test_recurrent_layers_are_not_shared(llama):
    model = copy.deepcopy(llama.model)
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert not can_share(BaseLM(model, llama.tokenizer, "half recurrent"))


@pytest.mark.parametrize(
    ("shared", "own", "rows", "pays"),
    ((40, 1, 8, True), (31, 1, 12, False), (40, 1, 7, False), (40, 150, 16, False), (60, 100, 8, True)),
    ids=("enough", "too short", "too few tokens saved", "too small a part", "a quarter and more"),
)
def test_it_has_to_pay(llama, shared, own, rows, pays):
    rows = [Row(tokens(shared, 0) + tokens(own, 1 + k), None, request("")) for k in range(rows)]
    with torch.no_grad():
        cache = Shared(llama, rows, None).cache(range(len(rows)))
    assert (cache is not None) == pays
    assert not pays or cache.get_seq_length() == shared


# ---- which rows ----------------------------------------------------------------------------------------------------


def test_families_by_hand():
    system, ada, bea = tokens(40, 0), tokens(60, 1), tokens(60, 2)
    rows = [
        system + ada + [11],  # 0
        tokens(50, 3),  # 1: alone
        system + bea + [12, 13],  # 2
        system + ada + [14],  # 3
        system + [15],  # 4
        system + ada,  # 5
        system + bea + [16],  # 6
        system + [17],  # 7
        system + tokens(200, 4),  # 8: the system prompt is too small a part of it
    ]
    # Ada's three questions save 2 x 100 tokens by themselves and 3 x 40 with the others. Bea's two save 100 and 80.
    assert sorted(find_families(rows)) == [(40, [4, 7]), (100, [0, 3, 5]), (100, [2, 6])]
    # With a context of ten tokens more two questions save 50 by themselves and 80 with the others.
    short = [system + tokens(10, 1) + [n] for n in (1, 2)] + [system + [15], system + [17]]
    assert find_families(short) == [(40, [0, 1, 2, 3])]
    assert find_families([tokens(31, 0) + [1], tokens(31, 0) + [2]]) == []
    assert find_families([tokens(32, 0), tokens(32, 0), tokens(32, 0) + [1]]) == [(32, [0, 1, 2])]
    assert find_families([]) == []


def test_families_of_a_growing_conversation():
    """Each row continues the one before: far deeper nesting than a recursion would stand."""
    whole = tokens(3000, 0)
    rows = [whole[: 40 + n] for n in range(0, 2900, 2)]
    families = find_families(rows)
    members = [i for _, family in families for i in family]
    assert len(members) == len(set(members)) > 1400
    assert all(rows[i][:n] == whole[:n] and 4 * n >= len(rows[i]) for n, family in families for i in family)


@pytest.mark.parametrize("seed", range(20))
def test_families_share_what_they_say(seed):
    """Random prefix trees: every family's rows begin alike, no row is in two, and something is found."""
    draw = random.Random(seed)
    stems = [tokens(draw.randrange(20, 90), 1000 * seed + k) for k in range(3)]
    stems += [draw.choice(stems) + tokens(draw.randrange(5, 90), 1000 * seed + 10 + k) for k in range(4)]
    rows = [draw.choice(stems) + tokens(draw.randrange(0, 30), 1000 * seed + 20 + k) for k in range(40)]
    families = find_families(rows)
    members = [i for _, family in families for i in family]
    assert len(members) == len(set(members)) and families
    for n, family in families:
        assert n >= 32 and len(family) > 1 and len({tuple(rows[i][:n]) for i in family}) == 1
        assert all(len(rows[i]) <= 4 * n for i in family)


def test_families_stay_together_in_as_many_batches_as_without(llama):
    rows = [Row(tokens(60, k % 5) + tokens(1 + k % 7, k), None, request("")) for k in range(40)]
    given = list(Shared(llama, rows, None).batches(8))
    assert [len(batch) for batch in given] == [8] * 5
    assert sorted(i for batch in given for i in batch) == list(range(40))
    assert all(len({i % 5 for i in batch}) == 1 for batch in given)
    assert max(rows[i].length for i in given[0]) == max(row.length for row in rows)
    apart = list(Shared(llama, rows, no_edit).batches(8))
    assert apart == list(lm.batch.batches([row.length for row in rows], 8))


def test_vectors_in_front_count_by_value(llama):
    """Equal vectors in different tensors are one beginning; a vector that differs in one number starts another."""
    vectors = torch.randn(2, llama.hidden_size, generator=torch.Generator().manual_seed(0))
    other = vectors.clone()
    other[1, 3] += 1e-3
    rows = [Row(tokens(60, 1) + [5 + k], (vectors if k % 2 else other).clone(), request("")) for k in range(16)]
    with computed(llama) as shapes:
        shared = lm.score(llama, rows, [[[7]]] * 16)
    assert shapes == [(2, 62), (16, 1)]
    assert [float(a[0]) for a in shared] == pytest.approx(
        [float(a[0]) for a in lm.score(llama, rows, [[[7]]] * 16, no_edit)], abs=1e-5
    )
