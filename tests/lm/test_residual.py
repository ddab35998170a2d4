"""The residual stream, read and changed: layers where they are said to be, rows apart, nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from lm_toys import ALL, DECODERS, PROMPTS, plain_greedy, row
from transformers import OPTConfig, OPTForCausalLM

from persona import lm
from persona.errors import UserError
from persona.lm.residual import added, blocks, changed, last_states, reply_means
from persona.personalizer import LanguageModel, Personalizer
from persona.types import Message, Request, Sampling


def vectors(base, layers=(0, 1), count=1, size=3.0, seed=0) -> dict[int, torch.Tensor]:
    """Per layer one vector for each of `count` rows, long enough to change what the tiny LMs say."""
    drawn = torch.randn(len(layers), count, base.hidden_size, generator=torch.Generator().manual_seed(seed))
    scale = {layer: size * states.norm() for layer, states in zip(layers, _norms(base, layers), strict=True)}
    return {layer: scale[layer] * drawn[i] / drawn[i].norm(dim=-1, keepdim=True) for i, layer in enumerate(layers)}


def _norms(base, layers) -> torch.Tensor:
    return last_states(base, [row(base, PROMPTS[1])], [[]], layers)[0]


def hooks(base) -> int:
    return sum(len(module._forward_hooks) for module in base.model.modules())


def edit_of(base, chosen):
    """The third door: row i of the batch gets the i-th vectors."""
    return lambda indices: added(base.model, {layer: rows[list(indices)] for layer, rows in chosen.items()})


@pytest.mark.parametrize("name", ALL)
def test_layer_l_is_what_transformers_calls_hidden_state_l_plus_1(load_base, name):
    base = load_base(name)
    rows = [row(base, text) for text in PROMPTS]
    replies = [base.encode_option("i like boats")[:n] for n in (0, 3, 1, 0, 2)]
    theirs = copy.deepcopy(base.model)  # transformers leaves hooks of its own in a model once it was asked for states
    states = last_states(base, rows, replies, [1, 0], batch_size=3)
    assert states.shape == (5, 2, base.hidden_size) and hooks(base) == 0
    for i, (asked, reply) in enumerate(zip(rows, replies, strict=True)):
        with torch.no_grad():
            if base.is_encoder_decoder:
                start = [[base.model.config.decoder_start_token_id, *reply]]
                alone = theirs(
                    input_ids=torch.tensor([asked.prompt]), decoder_input_ids=torch.tensor(start),
                    output_hidden_states=True,
                ).decoder_hidden_states  # fmt: skip
            else:
                ids = torch.tensor([asked.prompt + reply])
                alone = theirs(input_ids=ids, output_hidden_states=True).hidden_states
        # One by one without padding; transformers shows the last layer after the final norm only, so here the first.
        assert torch.allclose(states[i, 1], alone[1][0, -1], atol=2e-4, rtol=1e-4)
    assert torch.equal(last_states(base, rows, replies, [0, 1], batch_size=3), states[:, [1, 0]])


def test_blocks_are_found_under_peft_and_in_other_layouts(load_base):
    from peft import LoraConfig, get_peft_model

    opt = OPTForCausalLM(
        OPTConfig(vocab_size=20, hidden_size=16, num_hidden_layers=3, ffn_dim=16, num_attention_heads=2,
                  max_position_embeddings=16, word_embed_proj_dim=16)
    )  # fmt: skip
    assert blocks(opt) is opt.model.decoder.layers
    base = load_base("llama")
    wrapped = get_peft_model(base.model, LoraConfig(target_modules="all-linear"))
    try:
        assert blocks(wrapped) is blocks(base.model) is base.model.model.layers
    finally:
        wrapped.unload()
    assert blocks(load_base("t5").model) is load_base("t5").model.decoder.block
    opt.config.num_hidden_layers = 4
    with pytest.raises(UserError, match="OPTForCausalLM has no list of 4 decoder blocks"):
        blocks(opt)
    with pytest.raises(UserError, match="there is no layer 2: the base LM has layers 0 to 1"):
        with changed(base.model, {2: print}):
            pass


@pytest.mark.parametrize("name", ALL)
def test_rows_get_their_own_vector_in_any_batch(load_base, name):
    """Different lengths (padding), different vectors, one row with zeros; batch = one by one, also generated."""
    base = load_base(name)
    rows = [row(base, text, max_new_tokens=6) for text in PROMPTS]
    chosen = vectors(base, count=len(rows))
    for layer in chosen.values():
        layer[2] = 0
    options = [[base.encode_option("boats in the rain")]] * len(rows)
    together = lm.score(base, rows, options, edit_of(base, chosen), batch_size=5)
    replies = lm.respond(base, rows, edit_of(base, chosen), batch_size=5)
    for i, asked in enumerate(rows):
        mine = {layer: vector[i : i + 1] for layer, vector in chosen.items()}
        alone = lm.score(base, [asked], options[:1], edit_of(base, mine), batch_size=1)
        assert torch.allclose(together[i][0], alone[0][0], atol=1e-3)
        (reply,) = lm.respond(base, [asked], edit_of(base, mine), batch_size=1)
        assert reply.tokens == replies[i].tokens
        with added(base.model, mine):  # generation with a cache = one full forward per token
            assert list(reply.tokens) == plain_greedy(base, asked.prompt, 6)
    untouched = lm.score(base, rows, options, batch_size=5)
    assert torch.equal(together[2][0], lm.score(base, rows, options, lambda i: added(base.model, {}), 5)[2][0])
    moved = [float((a[0] - b[0]).abs().max()) for a, b in zip(together, untouched, strict=True)]
    assert moved[2] < 1e-3 < min(moved[i] for i in (0, 1, 3, 4))


def test_zeros_are_the_base_bitwise_and_register_nothing(llama):
    tokens = torch.tensor([llama.render(row(llama, PROMPTS[1]).request.messages)])
    with torch.no_grad():
        before = llama.model(input_ids=tokens).logits
        with added(llama.model, {0: torch.zeros(1, llama.hidden_size)}):
            assert hooks(llama) == 0
            assert torch.equal(llama.model(input_ids=tokens).logits, before)
        with added(llama.model, {0: torch.stack([torch.zeros(llama.hidden_size), torch.ones(llama.hidden_size)])}):
            both = llama.model(input_ids=tokens.repeat(2, 1)).logits
        plain = llama.model(input_ids=tokens.repeat(2, 1)).logits
    assert torch.equal(both[0], plain[0]) and not torch.allclose(both[1], plain[1])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5"])
def test_hooks_are_gone_after_an_exception(load_base, name):
    base = load_base(name)
    with pytest.raises(RuntimeError, match="stop"), added(base.model, vectors(base)):
        assert hooks(base) == 2
        raise RuntimeError("stop")
    assert hooks(base) == 0

    def fail(hidden):
        raise RuntimeError("inside a forward")

    with pytest.raises(RuntimeError, match="inside"), changed(base.model, {1: fail}):
        base.model(input_ids=torch.tensor([[5, 6]]), **({"labels": torch.tensor([[5]])} if name == "t5" else {}))
    assert hooks(base) == 0


@pytest.mark.parametrize("name", DECODERS)
def test_beams_repeat_their_rows_vector(load_base, name):
    base = load_base(name)
    rows = [row(base, text, max_new_tokens=4, num_beams=2) for text in PROMPTS[:2]]
    chosen = vectors(base, count=2)
    together = lm.respond(base, rows, edit_of(base, chosen), batch_size=2)
    for i, asked in enumerate(rows):
        mine = {layer: vector[i : i + 1] for layer, vector in chosen.items()}
        assert lm.respond(base, [asked], edit_of(base, mine), batch_size=1)[0].tokens == together[i].tokens


def test_two_edits_in_a_stack_add_up(llama):
    one, other = vectors(llama, seed=1), vectors(llama, seed=2)

    class Push(Personalizer):
        method = "push"

        def __init__(self, chosen):
            self.chosen = chosen

        def modules(self, requests):
            return added(llama.model, {layer: rows.expand(len(requests), -1) for layer, rows in self.chosen.items()})

    asked = [Request((Message("user", text),), sampling=Sampling(5)) for text in PROMPTS]
    both = LanguageModel(llama, [Push(one), Push(other)]).loglikelihood(asked, ["boats"] * 5)
    joined = LanguageModel(llama, [Push({layer: one[layer] + other[layer] for layer in one})])
    for (a, _), (b, _) in zip(both, joined.loglikelihood(asked, ["boats"] * 5), strict=True):
        assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_means_over_replies_are_those_of_stored_states(load_base, name):
    """Batches with padding = one by one by transformers' own states; what stands before what counts is left out."""
    base = load_base(name)
    rows = [row(base, text) for text in PROMPTS]
    replies = [base.encode_option("i like small boats")[:n] for n in (3, 1, 4, 2, 0)]
    counted = [2, 1, 4, 1, 0]
    theirs = copy.deepcopy(base.model)
    means = reply_means(base, rows, replies, counted, [1, 0], batch_size=3)
    assert means.shape == (5, 2, base.hidden_size) and hooks(base) == 0
    assert bool(means[4].isnan().all())
    for i, n in enumerate(counted[:4]):
        with torch.no_grad():
            ids = torch.tensor([rows[i].prompt + replies[i]])
            states = theirs(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
        # transformers shows the last layer after the final norm only, so here the first.
        assert torch.allclose(means[i, 1], states[-n:].mean(0), atol=2e-4, rtol=1e-4)


def test_means_over_replies_see_edits_and_are_of_decoders(llama, t5):
    rows, replies = [row(llama, PROMPTS[0])] * 2, [llama.encode_option("i like boats")] * 2
    chosen = {0: torch.randn(2, llama.hidden_size, generator=torch.Generator().manual_seed(1))}
    plain, moved = (reply_means(llama, rows, replies, [3, 3], [0], edit) for edit in (None, edit_of(llama, chosen)))
    assert torch.allclose(moved[:, 0] - plain[:, 0], chosen[0], atol=1e-4)
    with pytest.raises(UserError, match="read from decoder-only LMs"):
        reply_means(t5, [row(t5, PROMPTS[0])], [[3]], [1], [0])
