"""What holds of a mixture whatever its weights: one-hot is PEFT's adapter, zero is the base, folded is dynamic."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fuse_toys import QUERIES, requests, trained_looking

from persona import lm
from persona.lm import adapters, assemble
from persona.lm.batch import Row, forward_logits
from persona.methods.persona_fuse.experts import FOLDERS, read_experts, write_experts
from persona.methods.persona_fuse.personalizer import PersonaFuse
from persona.personalizer import LanguageModel, save
from persona.types import Message, Request

REPLY = "a good day by the river"


def rows(base, texts=QUERIES):
    return [Row(base.render(one.messages), None, one) for one in requests(*texts)]


@torch.no_grad()
def logits(base, context=None, texts=QUERIES, model=None):
    """Per text the logits where the reply is predicted."""
    found = rows(base, texts)
    inputs = assemble(base, found, [base.render_reply(row.request.messages, REPLY) for row in found])
    with context or nullcontext():
        out, targets = forward_logits(base, inputs, model)
    return [out[i][targets[i] != -100] for i in range(len(found))]


def close(one, other, tolerance=1e-5):
    size = max(float(x.abs().max()) for x in other)
    return all(torch.allclose(a, b, atol=tolerance * size) for a, b in zip(one, other, strict=True))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def made(llama):
    return trained_looking(llama, temperature=0.1)


def one_hot(number, count=11, texts=QUERIES):
    return torch.eye(count)[[number] * len(texts)]


@pytest.mark.parametrize("number", (0, 7, 9))
@pytest.mark.parametrize("top_k", (None, 1))
def test_one_hot_is_that_adapter_in_plain_peft(llama, made, tmp_path, number, top_k):
    from peft import PeftModel

    write_experts(made.experts, tmp_path, llama)
    peft = PeftModel.from_pretrained(copy.deepcopy(llama.model), tmp_path / FOLDERS[number]).eval()
    alone = logits(llama, model=peft)
    assert close(logits(llama, made.experts.applied(llama.model, one_hot(number), top_k)), alone)
    assert not close(alone, logits(llama), 1e-2), "the expert has no effect"
    again = read_experts(tmp_path, llama)
    assert same(again.state_dict().values(), made.experts.state_dict().values())


@pytest.mark.parametrize("gates", (torch.zeros(4, 11), torch.zeros(4, 10), one_hot(10)), ids=("zero", "ten", "null"))
@pytest.mark.parametrize("top_k", (None, 1, 3))
def test_zero_or_null_is_the_base_bitwise(llama, made, gates, top_k):
    assert same(logits(llama, made.experts.applied(llama.model, gates, top_k)), logits(llama))
    assert same(logits(llama, made.experts.folded(llama.model, gates[0])), logits(llama))


def test_folded_is_dynamic_and_is_undone(llama, made):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in llama.model.state_dict().items()}
    gate = torch.rand(11, generator=torch.Generator().manual_seed(3))
    dynamic = logits(llama, made.experts.applied(llama.model, gate.expand(4, -1)))
    with pytest.raises(RuntimeError, match="in the middle"):
        with made.experts.folded(llama.model, gate):
            assert close(logits(llama), dynamic, 1e-4) and not close(dynamic, logits(llama), 0)
            raise RuntimeError("in the middle")
    after = llama.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(places[name] == after[name].data_ptr() for name in before)


def test_top_k_computes_what_dense_does(llama, made):
    """Three experts of eleven, the null expert among them in some rows."""
    gates = torch.zeros(4, 11)
    for row, columns in enumerate(((0, 3, 10), (1, 2, 9), (10, 4, 5), (6, 7, 8))):
        gates[row, list(columns)] = torch.tensor([0.5, 0.3, 0.2])
    dense = logits(llama, made.experts.applied(llama.model, gates))
    assert close(logits(llama, made.experts.applied(llama.model, gates, 3)), dense, 1e-4)


GRANULARITIES = ({}, {"top_k": 2}, {"granularity": "layer"}, {"granularity": "layer", "top_k": 3},
                 {"granularity": "token"}, {"granularity": "token", "top_k": 2}, {"pole_guard": True},
                 {"null_expert": False}, {"pooling": "mean"})  # fmt: skip


@pytest.mark.parametrize("settings", GRANULARITIES, ids=str)
def test_a_batch_is_its_rows_one_by_one(llama, settings):
    """Gates, log-probs and generated tokens, with and without beams; padding and company do not matter."""
    fuse = PersonaFuse(llama, trained_looking(llama, temperature=0.1, **settings))
    model, asked = LanguageModel(llama, [fuse]), requests(*QUERIES)
    gates = fuse.gate(asked)
    assert gates.shape == (4, len(fuse.names)) and gates.sum(-1).tolist() == pytest.approx([1] * 4, abs=1e-6)
    assert torch.allclose(gates, torch.cat([fuse.gate([one]) for one in QUERIES]), atol=1e-5)
    assert (gates[0] - gates[1]).abs().max() > 0.05, "the rows have the same gate"
    together = model.loglikelihood(asked, [REPLY] * 4)
    alone = [model.loglikelihood([one], [REPLY])[0] for one in asked]
    assert [a for a, _ in together] == pytest.approx([a for a, _ in alone], abs=1e-2)
    bare = LanguageModel(llama).loglikelihood(asked, [REPLY] * 4)
    assert max(abs(a - b) for (a, _), (b, _) in zip(together, bare, strict=True)) > 0.5
    for beams in (1, 2):
        sampling = lm.generate.Sampling(max_new_tokens=5, num_beams=beams)
        some = [Request(one.messages, sampling=sampling) for one in asked]
        replies = model.respond(some)
        assert [r.tokens for r in replies] == [model.respond([one])[0].tokens for one in some]


def test_tokens_begin_as_the_sequence(llama):
    """The correction by token is zero at first: then a gate per token is the gate per sequence."""
    token, sequence = (trained_looking(llama, granularity=name) for name in ("token", "sequence"))
    token.router.token.data.zero_()
    asked = requests(*QUERIES)
    found = [
        LanguageModel(llama, [PersonaFuse(llama, one)]).loglikelihood(asked, [REPLY] * 4) for one in (token, sequence)
    ]
    assert [a for a, _ in found[0]] == pytest.approx([a for a, _ in found[1]], abs=1e-3)


def test_one_layer_has_one_gate(llama):
    """A mixture whose second layer is shut off is the one whose second layer has no experts."""
    made = trained_looking(llama, granularity="layer")
    gates = torch.full((4, 2, 11), 1 / 11)
    gates[:, 1] = 0
    routing = made.route(made.tokenize(requests(*QUERIES)))._replace(gates=gates)
    half = copy.deepcopy(made.experts)
    for name, up in zip(half.names, half.up, strict=True):
        if "layers.1." in name:
            up.data.zero_()
    expected = logits(llama, half.applied(llama.model, torch.full((4, 11), 1 / 11)))
    assert close(logits(llama, made.applied(llama.model, routing)), expected)
    assert not close(expected, logits(llama, made.experts.applied(llama.model, torch.full((4, 11), 1 / 11))), 1e-2)


def test_the_router_reads_the_users_turns_only(llama, made):
    fuse = PersonaFuse(llama, made)
    user = Message("user", "good morning")
    one = (Message("system", "be loud"), Message("user", "the fox"), Message("assistant", "what ?"), user)
    other = (Message("user", "the fox"), Message("assistant", "something else"), user)
    assert torch.equal(fuse.gate([Request(one)]), fuse.gate([Request(other)]))
    assert torch.equal(fuse.gate([Request((user,))]), fuse.gate(["good morning"]))
    assert not torch.allclose(fuse.gate([Request(one)]), fuse.gate([Request((user,))]), atol=1e-3)


def test_frozen_stays_frozen_and_train_mode_survives(llama, made):
    """Through a plain forward and through generation; PEFT's X-LoRA fails in all four."""
    fuse = PersonaFuse(llama, made)
    made.experts.requires_grad_(True)
    made.router.requires_grad_(False)
    llama.model.train()
    model = LanguageModel(llama, [fuse])
    try:
        model.loglikelihood(requests(*QUERIES), [REPLY] * 4)
        model.respond(requests(*QUERIES[:2]))
        assert llama.model.training and all(module.training for module in llama.model.modules())
        assert all(p.requires_grad for p in made.experts.parameters())
        assert not any(p.requires_grad for p in [*made.router.parameters(), *llama.model.parameters()])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())
    finally:
        llama.model.eval()
        made.experts.requires_grad_(False)


def test_fold_in_the_personalizer(llama, made):
    """A batch of one goes through changed weights, a batch of several through hooks: the same replies."""
    asked = requests(*QUERIES)
    plain, fold = (LanguageModel(llama, [PersonaFuse(llama, made, fold)]) for fold in (False, True))
    with PersonaFuse(llama, made, True).modules(asked[:1]):
        assert not any(m._forward_hooks for m in llama.model.modules())
    for batch in ([asked[0]], asked):
        one, other = (model.loglikelihood(batch, [REPLY] * len(batch)) for model in (plain, fold))
        assert [a for a, _ in one] == pytest.approx([a for a, _ in other], abs=1e-2)
        assert [r.tokens for r in plain.respond(batch)] == [r.tokens for r in fold.respond(batch)]


@pytest.mark.parametrize("settings", ({}, {"train_encoder": False}, {"granularity": "token"}), ids=str)
def test_saved_and_loaded_are_equal(llama, tmp_path, settings):
    import persona

    fuse = PersonaFuse(llama, trained_looking(llama, **settings))
    if fuse.mixture.router.config.train_encoder:
        next(fuse.mixture.router.encoder.parameters()).data.mul_(1.1)
    again = persona.load(llama, [save(fuse, llama, tmp_path / "fuse")]).personalizers[0]
    assert torch.equal(again.gate(QUERIES), fuse.gate(QUERIES))
    one, other = (LanguageModel(llama, [x]).loglikelihood(requests(*QUERIES), [REPLY] * 4) for x in (fuse, again))
    assert one == other
    assert adapters.load_adapter(tmp_path / "fuse" / "experts" / "N_low").scaling.popitem()[1] == 2.0


def test_what_is_mixed_is_in_the_plots(llama, made, tmp_path):
    """Gates of some queries, likeness of the experts by hand, and a reply by each expert alone; in plots.json."""
    from persona.evaluation import plots
    from persona.evaluation.results import read_plots
    from persona.types import Sample

    fuse = PersonaFuse(llama, made)
    asked = [Sample(str(n), one.messages) for n, one in enumerate(requests(*QUERIES))]
    plots.write(LanguageModel(llama, [fuse]), asked, tmp_path)
    shown = read_plots(tmp_path).mixture
    assert shown.names == fuse.names and [query for query, _ in shown.queries] == list(QUERIES)
    assert np.allclose([weights for _, weights in shown.queries], fuse.gate(QUERIES), atol=1e-4)
    changes = [torch.cat([(b @ a).flatten() for a, b in made.experts.expert(n).modules.values()]) for n in range(10)]
    cosines = torch.stack([torch.cosine_similarity(changes[2], other, dim=0) for other in changes])
    assert np.allclose(shown.similarity[2][:10], cosines, atol=1e-3) and shown.similarity[2][10] == 0
    replies = dict(shown.replies)
    alone = logits(llama, made.experts.applied(llama.model, one_hot(3)))
    assert close(logits(llama, fuse.alone("C-").modules([])), alone, 1e-4)
    assert replies["null"] == LanguageModel(llama).respond([Request(asked[0].messages)])[0].text
    assert len(set(replies.values())) > 5 and list(replies) == list(fuse.names)
