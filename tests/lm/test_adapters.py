"""The hook engine against PEFT's own forward and against merged weights, for adapters that PEFT saved."""

from __future__ import annotations

import copy
import json
import shutil
from collections import OrderedDict

import pytest
import torch
from lm_toys import PROMPTS, no_edit, row

from persona import lm
from persona.errors import UserError
from persona.lm import adapters, assemble
from persona.lm.batch import forward_logits

NAMES = ("llama", "t5")
RANKS = (3, 5)


@pytest.fixture(scope="module")
def saved(load_base, tmp_path_factory):
    """Per model: two folders of PEFT LoRAs (ranks 3 and 5, the second rank-stabilised) and PEFT's logits with each."""
    from peft import LoraConfig, get_peft_model

    made = {}
    for name in NAMES:
        base = load_base(name)
        made[name] = []
        for seed, rank in enumerate(RANKS):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=rank,
                lora_alpha=4,
                target_modules="all-linear",
                lora_dropout=0.3,
                use_rslora=seed == 1,
                init_lora_weights=False,
            )
            model = get_peft_model(copy.deepcopy(base.model), config).eval()
            folder = tmp_path_factory.mktemp(f"{name}-{rank}")
            model.save_pretrained(folder)
            made[name].append((folder, logits(base, model=model)))
    return made


@torch.no_grad()
def logits(base, texts=PROMPTS, model=None):
    rows = [row(base, text) for text in texts]
    inputs = assemble(base, rows, [base.render_reply(one.request.messages, "a good day") for one in rows])
    out, targets = forward_logits(base, inputs, model)
    # Only where a reply is predicted: what stands on padding means nothing.
    return [out[i][targets[i] != -100] for i in range(len(rows))]


def close(one, other, tolerance=1e-4):
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(one, other, strict=True))


def merged(base, loaded, weights):
    """A copy of the base LM whose matrices are W + sum_e weight_e · scaling_e · B_e A_e."""
    model = copy.deepcopy(base.model)
    for adapter, weight in zip(loaded, weights, strict=True):
        for name, (down, up) in adapter.modules.items():
            model.get_submodule(name).weight.data += weight * adapter.scaling[name] * (up @ down)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_equals_pefts_own_forward(load_base, saved, name):
    base = load_base(name)
    plain = logits(base)
    for folder, expected in saved[name]:
        with adapters.apply(base.model, [adapters.load_adapter(folder)], torch.ones(len(PROMPTS), 1)):
            got = logits(base)
        assert close(got, expected, 1e-5 * max(float(x.abs().max()) for x in expected))
        assert not close(got, plain, 1e-2), "the adapter had no effect"


@pytest.mark.parametrize("name", NAMES)
def test_weighted_sum_equals_merged_weights(load_base, saved, name):
    base = load_base(name)
    loaded = [adapters.load_adapter(folder) for folder, _ in saved[name]]
    gates = torch.tensor([[0.7, -0.4]] * len(PROMPTS))
    with adapters.apply(base.model, loaded, gates):
        got = logits(base)
    assert close(got, logits(base, model=merged(base, loaded, (0.7, -0.4))), 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_each_row_has_its_own_gates(load_base, saved, name):
    base = load_base(name)
    loaded = [adapters.load_adapter(folder) for folder, _ in saved[name]]
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.5], [0.0, -2.0]])
    with adapters.apply(base.model, loaded, gates):
        together = logits(base)
    for i, text in enumerate(PROMPTS):
        with adapters.apply(base.model, loaded, gates[i : i + 1]):
            alone = logits(base, [text])
        assert close(together[i : i + 1], alone)
    assert close(together[:1], [saved[name][0][1][0]]) and close(together[1:2], [saved[name][1][1][1]])


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gate_is_the_base_bitwise(load_base, saved, name):
    base = load_base(name)
    loaded = [adapters.load_adapter(folder) for folder, _ in saved[name]]
    plain = logits(base)
    with adapters.apply(base.model, loaded, torch.zeros(len(PROMPTS), 2)):
        assert all(torch.equal(a, b) for a, b in zip(logits(base), plain, strict=True))
    gates = torch.zeros(len(PROMPTS), 2)
    gates[1, 0] = 1
    with adapters.apply(base.model, loaded, gates):
        mixed = logits(base)
    assert [torch.equal(a, b) for a, b in zip(mixed, plain, strict=True)] == [True, False, True, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_gone_afterwards_also_after_an_exception(load_base, saved, name):
    base = load_base(name)
    loaded = adapters.load_adapter(saved[name][0][0])
    plain, before = logits(base), {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the middle"):
        with adapters.apply(base.model, [loaded], torch.ones(len(PROMPTS), 1)):
            raise RuntimeError("in the middle")
    assert all(torch.equal(a, b) for a, b in zip(logits(base), plain, strict=True))
    assert all(module._forward_hooks == OrderedDict() for module in base.model.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in base.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beams", (1, 3))
def test_generation_with_an_adapter_per_row(load_base, saved, name, beams):
    base = load_base(name)
    loaded = [adapters.load_adapter(folder) for folder, _ in saved[name]]
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.5], [0.0, -2.0]])
    rows = [row(base, text, max_new_tokens=6, num_beams=beams) for text in PROMPTS]

    def edit(indices):
        return adapters.apply(base.model, loaded, gates[list(indices)])

    together = lm.respond(base, rows, edit)
    for i, one in enumerate(rows):
        alone = lm.respond(base, [one], lambda _, i=i: adapters.apply(base.model, loaded, gates[i : i + 1]))[0]
        assert together[i].tokens == alone.tokens
        assert together[i].logprobs == pytest.approx(alone.logprobs, abs=1e-3)
    bare = lm.respond(base, rows, no_edit)
    assert together[2].tokens == bare[2].tokens
    assert [t.tokens for t in together] != [t.tokens for t in bare]


def test_options_of_a_row_share_its_gates(llama, saved):
    loaded = [adapters.load_adapter(folder) for folder, _ in saved["llama"]]
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rows = [row(llama, text) for text in PROMPTS[:2]]
    options = [[[5], [6, 7, 8]], [[9, 10], [11], [12, 13, 14, 15]]]
    scored = lm.score(llama, rows, options, lambda i: adapters.apply(llama.model, loaded, gates[list(i)]))
    for i, adapter in enumerate(loaded):
        llm = lm.BaseLM(merged(llama, [adapter], (1.0,)), llama.tokenizer, "merged")
        for a, b in zip(scored[i], lm.score(llm, rows[i : i + 1], options[i : i + 1], no_edit)[0], strict=True):
            assert a.tolist() == pytest.approx(b.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_of_many_per_row(load_base, name):
    """One of many stacked adapters per row against `apply` with one gate per user; a row of weight 0 is the base."""
    base = load_base(name)
    torch.manual_seed(0)
    users = [
        {
            n: (torch.randn(2, m.in_features), torch.randn(m.out_features, 2) / 10)
            for n, m in base.model.named_modules()
            if isinstance(m, torch.nn.Linear) and n != "lm_head"
        }
        for _ in range(3)
    ]
    stacked = {n: (torch.stack([u[n][0] for u in users]), torch.stack([u[n][1] for u in users])) for n in users[0]}
    owners, weights = [2, 0, 0, 1, 2], [0.5, 0.0, 0.5, 0.5, 0.5]
    with adapters.apply_stacked(base.model, stacked, torch.tensor(weights)[:, None], torch.tensor(owners)[:, None]):
        got = logits(base)
    gates = torch.tensor([[w * (o == u) for u in range(3)] for o, w in zip(owners, weights, strict=True)])
    with adapters.apply(base.model, [adapters.Adapter(u, dict.fromkeys(u, 1.0)) for u in users], gates):
        expected = logits(base)
    assert close(got, expected, 1e-3) and torch.equal(got[1], logits(base)[1])
    assert not any(module._forward_hooks for module in base.model.modules())
    with adapters.apply_stacked(base.model, stacked, gates):
        everyone = logits(base)
    assert close(everyone, expected, 1e-3) and torch.equal(everyone[1], got[1])


def test_an_adapter_of_another_architecture(t5, saved):
    with pytest.raises(UserError, match="changes module 'model.layers.*which this base LM does not have"):
        with adapters.apply(t5.model, [adapters.load_adapter(saved["llama"][0][0])], torch.ones(1, 1)):
            pass
    assert not any(module._forward_hooks for module in t5.model.modules())


@pytest.mark.parametrize(
    "settings",
    (
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_a_plain_sum_is_refused(llama, tmp_path, settings):
    from peft import LoraConfig, get_peft_model

    get_peft_model(
        copy.deepcopy(llama.model), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not a plain LoRA adapter"):
        adapters.load_adapter(tmp_path)


def test_other_tuners_and_broken_folders_are_refused(saved, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(UserError, match="is not a LoRA adapter in PEFT's format"):
        adapters.load_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="is not a LoRA adapter in PEFT's format"):
        adapters.load_adapter(folder)
    shutil.copy(saved["llama"][0][0] / "adapter_model.safetensors", folder)
    config = json.loads((saved["llama"][0][0] / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(UserError, match="IA3"):
        adapters.load_adapter(folder)
