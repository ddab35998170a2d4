"""The residual stream, read: sites where they are said to be in every family, means as of stored states."""

from __future__ import annotations

import copy

import pytest
import torch
from lm_toys import ALL, DECODERS, PROMPTS, row
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from persona.errors import UserError
from persona.lm import BaseLM
from persona.lm.edits import Edit, edited
from persona.lm.residual import Site, blocks, changed, last_states, mean_norms, span_means
from persona.lm.spans import message_tokens, reply_tokens
from persona.types import Message

SITES = (Site(1), Site(0), Site(1, "block_input"), Site(1, "attention"), Site(0, "mlp"))


def hooks(base) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules())


def chat(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))


CHATS = [
    chat("the red house", "i like small boats and long walks"),
    chat("good morning", "how was your day ?", "how was your day ?", "the market in the rain", "", "yes"),
    chat("write one line", ""),
    (Message("system", "in the manner of ada"), *chat("the fox", "the fox")),
    chat("only asked"),
]


@pytest.fixture(scope="module")
def family(llama):
    """A tiny model of a family that persona.lm.scratch does not make, with the tests' tokenizer."""
    small = {"vocab_size": len(llama.tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

    def get(name: str) -> BaseLM:
        model = {
            "opt": lambda: OPTForCausalLM(OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=8, pad_token_id=0)),
            "opt, norm behind": lambda: OPTForCausalLM(
                OPTConfig(**small, ffn_dim=16, do_layer_norm_before=False, word_embed_proj_dim=16, pad_token_id=0)
            ),
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**small, num_key_value_heads=1, intermediate_size=16)),
            "gpt2": lambda: GPT2LMHeadModel(
                GPT2Config(vocab_size=small["vocab_size"], n_embd=16, n_layer=2, n_head=2, n_positions=256)
            ),
            "falcon": lambda: FalconForCausalLM(FalconConfig(**small)),
            "bloom": lambda: BloomForCausalLM(BloomConfig(**small)),
        }[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return BaseLM(model(), llama.tokenizer, name)

    return get


# ---- sites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_layer_l_is_what_transformers_calls_hidden_state_l_plus_1(load_base, name):
    base = load_base(name)
    rows = [row(base, text) for text in PROMPTS]
    replies = [base.encode_option("i like boats")[:n] for n in (0, 3, 1, 0, 2)]
    theirs = copy.deepcopy(base.model)  # transformers leaves hooks of its own in a model once it was asked for states
    states = last_states(base, rows, replies, [Site(1), Site(0)], batch_size=3)
    assert states.shape == (5, 2, base.hidden_size) and hooks(base) == 0
    inputs = last_states(base, rows, replies, [Site(0, "block_input"), Site(1, "block_input")])
    assert torch.allclose(inputs[:, 1], states[:, 1], atol=2e-4)
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
        # One by one without padding. Layers 0 to n-2 are theirs; the last one they show after the final norm only.
        assert torch.allclose(states[i, 1], alone[1][0, -1], atol=2e-4, rtol=1e-4)
        assert torch.allclose(inputs[i, 0], alone[0][0, -1], atol=2e-4, rtol=1e-4)
        assert not torch.allclose(states[i, 0], alone[2][0, -1], atol=2e-4, rtol=1e-4)
        norm = base.model.get_decoder()
        norm = getattr(norm, "final_layer_norm", None) or norm.norm
        assert torch.allclose(norm(states[i, 0]), alone[2][0, -1], atol=2e-4, rtol=1e-4)
    assert torch.equal(last_states(base, rows, replies, [Site(0), Site(1)], batch_size=3), states[:, [1, 0]])


@pytest.mark.parametrize("name", [*DECODERS, "t5", "opt", "opt, norm behind", "qwen2", "gpt2", "falcon"])
def test_the_block_is_its_input_and_what_its_parts_add(load_base, family, name):
    base = load_base(name) if name in ALL else family(name)
    asked, reply = row(base, PROMPTS[0]), base.encode_option("boats")
    parts = {part: last_states(base, [asked], [reply], [Site(1, part)])[0, 0] for part in ("attention", "mlp")}
    before, after = last_states(base, [asked], [reply], [Site(1, "block_input"), Site(1)])[0]
    block = blocks(base.model)[1]
    if name.startswith("gemma"):  # norms behind
        parts = {
            "attention": block.post_attention_layernorm(parts["attention"]),
            "mlp": block.post_feedforward_layernorm(parts["mlp"]),
        }
    total = before + parts["attention"] + parts["mlp"]
    if name == "t5":  # and attention to the encoder
        crossed: list[torch.Tensor] = []
        handle = block.layer[1].EncDecAttention.register_forward_hook(lambda m, a, out: crossed.append(out[0][0, -1]))
        last_states(base, [asked], [reply], [Site(0)])
        handle.remove()
        total = total + crossed[0]
    if name == "opt, norm behind":
        total = block.final_layer_norm(block.self_attn_layer_norm(before + parts["attention"]) + parts["mlp"])
    assert torch.allclose(total, after, atol=2e-4, rtol=1e-4) and hooks(base) == 0


@pytest.mark.parametrize("name", [*ALL, "opt", "gpt2", "falcon"])
@pytest.mark.parametrize("part", ("block", "block_input", "attention", "mlp"))
def test_a_change_at_a_site_is_what_the_model_goes_on_with(load_base, family, name, part):
    base = load_base(name) if name in ALL else family(name)
    asked, reply = row(base, PROMPTS[0]), base.encode_option("boats in")

    def zero(hidden):
        assert hidden.shape[0] == 1 and hidden.ndim == 3
        return torch.zeros_like(hidden)

    def states(sites):
        return last_states(base, [asked], [reply], sites)[0]

    plain = states([Site(1)])
    with changed(base.model, {Site(1, part): zero}):
        # Our own reading is registered behind the change, so it sees what comes of it.
        assert not states([Site(1, part)]).any()
        assert not torch.allclose(states([Site(1)]), plain, atol=1e-3)
    assert torch.equal(states([Site(1)]), plain) and hooks(base) == 0


def test_blocks_are_found_under_peft_and_in_other_layouts(load_base, family):
    from peft import LoraConfig, get_peft_model

    opt = family("opt").model
    assert blocks(opt) is opt.model.decoder.layers
    base = load_base("llama")
    asked = row(base, PROMPTS[0])
    plain = last_states(base, [asked], [[]], SITES)
    wrapped = get_peft_model(base.model, LoraConfig(target_modules="all-linear"))
    try:
        assert blocks(wrapped) is blocks(base.model) is base.model.model.layers
        assert torch.equal(last_states(BaseLM(wrapped, base.tokenizer, "peft"), [asked], [[]], SITES), plain)
        cap = Edit(Site(1, "mlp"), "cap", torch.ones(base.hidden_size), floor=5.0)
        with edited(wrapped, [cap]) as counts:
            capped = last_states(base, [asked], [[]], SITES)
        with edited(base.model, [cap]):
            assert torch.equal(last_states(base, [asked], [[]], SITES), capped)
        assert counts.acted[0] > 0 and not torch.equal(capped, plain)
    finally:
        wrapped.unload()
    wrapped = get_peft_model(opt, LoraConfig(target_modules=["fc2"]))
    assert last_states(BaseLM(wrapped, base.tokenizer, "peft"), [asked], [[]], SITES).shape == (1, 5, 16)
    wrapped.unload()
    assert blocks(load_base("t5").model) is load_base("t5").model.decoder.block
    opt.config.num_hidden_layers = 4
    with pytest.raises(UserError, match="OPTForCausalLM has no list of 4 decoder blocks"):
        blocks(opt)
    with pytest.raises(UserError, match="there is no layer 2: the base LM has layers 0 to 1"):
        with changed(base.model, {Site(2): print}):
            pass
    with pytest.raises(UserError, match="BloomBlock has no mlp module that could be read or changed"):
        last_states(family("bloom"), [asked], [[]], [Site(0, "mlp")])
    with pytest.raises(UserError, match="a site's part is one of block, block_input, attention, mlp, not 'norm'"):
        Site(0, "norm")


def test_a_model_with_accelerates_device_map_is_read_and_edited(llama):
    from accelerate import dispatch_model

    model = copy.deepcopy(llama.model)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = BaseLM(model, llama.tokenizer, "spread")
    asked = row(llama, PROMPTS[1])
    plain = last_states(llama, [asked], [[]], SITES)
    edit = Edit(Site(1), "cap", torch.ones(llama.hidden_size), floor=3.0)
    with edited(llama.model, [edit]):
        capped = last_states(llama, [asked], [[]], SITES)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)
        assert next(model.model.layers[1].parameters()).device.type == "meta"
        assert torch.equal(last_states(spread, [asked], [[]], SITES), plain)
        with edited(model, [edit]):
            assert torch.equal(last_states(spread, [asked], [[]], SITES), capped)
    assert not torch.equal(capped, plain)


# ---- means over spans ----------------------------------------------------------------------------------------------


def stored(base, messages, sites, before=False) -> list[torch.Tensor]:
    """Every state of one unpadded conversation kept; then the means over the assistant's tokens, turn by turn, or the
    states at the token before them."""
    if base.is_encoder_decoder:
        ids, span = reply_tokens(base, messages[:-1], messages[-1].content)
        given = {"input_ids": torch.tensor([base.render(messages[:-1])])}
        given["decoder_input_ids"] = torch.tensor([[base.model.config.decoder_start_token_id, *ids]])
        spans = [range(1 + span.start, 1 + span.stop)]
    else:
        ids, spans = message_tokens(base, messages)
        spans = [span for span, message in zip(spans, messages, strict=True) if message.role == "assistant"]
        given = {"input_ids": torch.tensor([ids])}
    if before:
        spans = [range(span.start - 1, span.start) for span in spans]
    kept: dict[Site, torch.Tensor] = {}

    def keep(site):
        return lambda hidden: kept.__setitem__(site, hidden.clone())

    with torch.no_grad(), changed(base.model, {site: keep(site) for site in sites}):
        base.model(**given)
    return [torch.stack([kept[site][0, span.start : span.stop].mean(0) for site in sites]) for span in spans]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("batch_size", (1, 2, 8))
def test_means_are_those_of_stored_states_in_any_batch(load_base, name, batch_size):
    base = load_base(name)
    found = dict(span_means(base, CHATS, SITES, batch_size=batch_size))
    assert sorted(found) == list(range(len(CHATS))) and hooks(base) == 0
    assert [len(found[i]) for i in range(5)] == [1, 3, 1, 1, 0]
    for i in (0, 1, 3):
        for turn, expected in zip(found[i], stored(base, CHATS[i], SITES), strict=True):
            # The tiny LMs' states are large; padding changes the order of sums within the LM, which is seen later.
            within = (1e-6 if batch_size == 1 else 2e-5) * float(expected.abs().max())
            assert torch.allclose(turn, expected, rtol=0, atol=within)
    assert found[2].isnan().all() and found[2].shape == (1, 5, base.hidden_size)


@pytest.mark.parametrize("name", DECODERS)
def test_the_prompts_last_state_is_that_before_each_reply(load_base, name):
    base = load_base(name)
    found = dict(span_means(base, CHATS, SITES, batch_size=4, where="prompt_last"))
    assert found[2].isnan().all() and len(found[4]) == 0  # nothing is said there
    for i in (0, 1, 3):
        for turn, expected in zip(found[i], stored(base, CHATS[i], SITES, before=True), strict=True):
            assert torch.allclose(turn, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_means_are_of_float32_whatever_the_states_are(llama, dtype):
    """In double precision nothing is left but the mean's own float32; of coarse states the mean is still float32."""
    base = BaseLM(copy.deepcopy(llama.model).to(dtype), llama.tokenizer, "other precision")
    kept: list[torch.Tensor] = []
    with changed(base.model, {Site(1): kept.append}):
        ((_, (mean,)),) = span_means(base, CHATS[:1], [Site(1)])
    (_, span), (states,) = message_tokens(base, CHATS[0])[1], kept
    assert states.dtype == dtype and mean.dtype == torch.float32
    assert torch.allclose(mean[0].double(), states[0, span.start : span.stop].double().mean(0), rtol=1e-6, atol=1e-6)
    if dtype == torch.float64:  # padding changes nothing
        for i, turns in span_means(base, CHATS, SITES, batch_size=4):
            for turn, expected in zip(turns, stored(base, CHATS[i], SITES) if i not in (2, 4) else [], strict=False):
                assert torch.allclose(turn.double(), expected, rtol=1e-6, atol=1e-6)


def test_an_encoder_decoders_replies_are_read_in_its_decoder(t5):
    chats = [chat("the fox", "boats in the rain"), chat("good morning", "yes", "why", "the river"), chat("hi", "")]
    found = dict(span_means(t5, chats, [Site(1), Site(0, "mlp")], batch_size=3))
    assert [found[i].shape[0] for i in range(3)] == [1, 2, 1] and found[2].isnan().all()
    for i, turn, messages in ((0, 0, chats[0]), (1, 0, chats[1][:2]), (1, 1, chats[1])):
        (expected,) = stored(t5, messages, [Site(1), Site(0, "mlp")])
        assert torch.allclose(found[i][turn], expected, rtol=1e-5, atol=1e-4)


def test_the_head_is_not_computed_and_nothing_stays(llama):
    def fail(module, args):
        raise AssertionError("logits were computed")

    handle = llama.model.lm_head.register_forward_pre_hook(fail)
    try:
        assert len(dict(span_means(llama, CHATS, [Site(0)]))) == 5
    finally:
        handle.remove()


def test_vectors_in_front_and_edits_are_honoured(llama):
    vectors = llama.embed(torch.tensor([5, 6, 7]))
    (ids, spans), turns = message_tokens(llama, CHATS[0]), dict(span_means(llama, CHATS[:1], [Site(1)]))
    ahead = dict(span_means(llama, CHATS[:2], [Site(1)], prefixes=[vectors, None]))
    longer = torch.tensor([[5, 6, 7, *ids]])
    seen = []
    with torch.no_grad(), changed(llama.model, {Site(1): seen.append}):
        llama.model(input_ids=longer)
    span = spans[1]
    assert torch.allclose(ahead[0][0, 0], seen[0][0, 3 + span.start : 3 + span.stop].mean(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ahead[0], turns[0], atol=1e-2)
    assert torch.allclose(ahead[1], dict(span_means(llama, CHATS[1:2], [Site(1)]))[0], rtol=1e-4, atol=1e-3)

    asked = []

    def edit(indices):
        asked.extend(indices)
        direction = torch.ones(llama.hidden_size)
        return edited(llama.model, [Edit(Site(1), "add", direction)], [[0] if i == 1 else [] for i in indices])

    plain = dict(span_means(llama, CHATS[:2], [Site(1)], batch_size=2))
    pushed = dict(span_means(llama, CHATS[:2], [Site(1)], edit, batch_size=2))
    assert sorted(asked) == [0, 1] and torch.equal(pushed[0], plain[0])
    assert torch.allclose(pushed[1], plain[1] + 1, atol=1e-4)


def test_norms_are_means_over_all_tokens(llama):
    norms = mean_norms(llama, CHATS[:3], [Site(1), Site(0)], batch_size=2)
    kept: list[torch.Tensor] = []
    for messages in CHATS[:3]:
        with torch.no_grad(), changed(llama.model, {Site(1): lambda hidden: kept.append(hidden[0].norm(dim=-1))}):
            llama.model(input_ids=torch.tensor([message_tokens(llama, messages)[0]]))
    assert norms[0] == pytest.approx(float(torch.cat(kept).mean()), rel=1e-5) and len(norms) == 2


def test_bad_conversations_are_named(llama, t5):
    with pytest.raises(UserError, match="mean norms are read from decoder-only LMs, and .* is none"):
        mean_norms(t5, CHATS[:1], [Site(0)])
    with pytest.raises(UserError, match=r"conversation that begins 'x' is \d+ tokens long, but .* has 256 pos"):
        list(span_means(llama, [CHATS[0], chat("x", "boats " * 300)], [Site(0)]))
    broken = BaseLM(copy.deepcopy(llama.model), llama.tokenizer, "broken")
    with torch.no_grad():
        broken.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="states at layer 1 are not finite for the conversation that begins 'the red"):
        list(span_means(broken, CHATS[:1], [Site(0), Site(1)]))
