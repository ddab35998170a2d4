"""Persona-Plug: the aggregation by hand, its invariances, the data, and what training moves and leaves alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from plug_toys import config, history, person, request, toy_people, trainer
from torch import nn

import persona
from persona.errors import UserError
from persona.methods import persona_plug
from persona.methods.persona_plug import (
    PersonaPlug,
    PlugData,
    aggregate,
    attention_weights,
    augmented,
    prefix_scale,
    projector,
    query_text,
)
from persona.personalizer import LanguageModel, save
from persona.types import HistoryItem, Message, Persona, Request, Sample

# ---- aggregation ---------------------------------------------------------------------------------------------------


class Square(nn.Module):
    """A projector whose mean of images is not the image of the mean: x → (x², 10 x)."""

    def forward(self, x):
        return torch.cat([x**2, 10 * x], dim=-1)


def batch(seed: int = 0, lengths=(5, 3, 1, 0), d: int = 6):
    generator = torch.Generator().manual_seed(seed)
    n = max(lengths)
    history = torch.randn(len(lengths), n, d, generator=generator)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    return history, mask, torch.randn(len(lengths), d, generator=generator)


def mlp(d: int = 6, out: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return projector(d, out)


def test_two_items_by_hand():
    """scores 1·2 and 3·2; weights e^2 and e^6 over their sum; P = w1 (1, 10) + w2 (9, 30)."""
    history, query = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[2.0]])
    w = math.exp(6) / (math.exp(2) + math.exp(6))
    got = aggregate(history, torch.ones(1, 2), query, Square())
    assert got[0].tolist() == pytest.approx([(1 - w) * 1 + w * 9, (1 - w) * 10 + w * 30], rel=1e-6)


def test_items_are_projected_before_they_are_averaged():
    history, query = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[0.0]])
    assert aggregate(history, torch.ones(1, 2), query, Square())[0].tolist() == [5.0, 20.0]  # not (2², 20)


def test_temperature_by_hand():
    history, query = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[2.0]])
    w = math.exp(6 / 4) / (math.exp(2 / 4) + math.exp(6 / 4))
    for temperature in (4.0, torch.tensor(4.0)):
        got = aggregate(history, torch.ones(1, 2), query, Square(), temperature=temperature)
        assert float(got[0, 0]) == pytest.approx((1 - w) + 9 * w, rel=1e-6)


def test_top_k_by_hand():
    """Scores 0, 1, 2; the best two weigh e/(1+e+e²) and e²/(1+e+e²), or e/(e+e²) and e²/(e+e²) renormalised."""
    history, query = torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([[1.0]])
    e = math.e
    kept = attention_weights(history, torch.ones(1, 3), query, top_k=2, renormalize=False)[0]
    assert kept.tolist() == pytest.approx([0, e / (1 + e + e * e), e * e / (1 + e + e * e)], rel=1e-6)
    kept = attention_weights(history, torch.ones(1, 3), query, top_k=2)[0]
    assert kept.tolist() == pytest.approx([0, 1 / (1 + e), e / (1 + e)], rel=1e-6)
    got = aggregate(history, torch.ones(1, 3), query, Square(), top_k=1)
    assert got[0].tolist() == pytest.approx([4.0, 20.0])


@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("top_k", (5, 7))
def test_top_k_of_all_items_is_full(top_k, renormalize):
    data, project = batch(), mlp()
    full = aggregate(*data, project)
    assert torch.allclose(aggregate(*data, project, top_k=top_k, renormalize=renormalize), full, atol=1e-6)


def test_top_k_counts_real_items_only():
    """A history of three items and k = 4: padding is never chosen, and the three keep their weights."""
    data = batch()
    weights = attention_weights(*data, top_k=4)
    assert weights[1].tolist() == pytest.approx(attention_weights(*data)[1].tolist()) and weights[1, 3:].sum() == 0
    assert (weights[0] > 0).sum() == 4


def test_low_temperature_picks_the_best_item():
    history, mask, query = batch()
    scores = torch.einsum("bnd,bd->bn", history, query).masked_fill(~mask, -math.inf)
    project = mlp()
    got = aggregate(history, mask, query, project, temperature=1e-4)
    for i in range(3):
        assert torch.allclose(got[i], project(history[i, scores[i].argmax()]), atol=1e-5)


def test_not_input_aware_is_the_mean_of_projections():
    history, mask, query = batch()
    project = mlp()
    got = aggregate(history, mask, query, project, input_aware=False)
    for i, n in enumerate((5, 3, 1)):
        assert torch.allclose(got[i], project(history[i, :n]).mean(0), atol=1e-6)
    assert torch.equal(got, aggregate(history, mask, 100 * query, project, input_aware=False))


@pytest.mark.parametrize("options", ({}, {"top_k": 2}, {"temperature": 0.01}, {"input_aware": False}))
def test_weights_sum_to_one_and_an_empty_history_to_zero(options):
    weights = attention_weights(*batch(), **options)
    assert weights.sum(-1).tolist() == pytest.approx([1, 1, 1, 0], abs=1e-6)
    assert not attention_weights(*batch())[~batch()[1]].any()


@pytest.mark.parametrize("options", ({}, {"top_k": 2}, {"input_aware": False}))
def test_an_empty_history_is_zeros_without_nan_in_value_or_gradient(options):
    history, mask, query = batch()
    history.requires_grad_(), query.requires_grad_()
    project = mlp()
    got = aggregate(history, mask, query, project, **options)
    assert torch.equal(got[3], torch.zeros(4)) and bool(got[:3].abs().sum(-1).gt(0).all())
    got.square().sum().backward()
    for tensor in (history.grad, *(p.grad for p in project.parameters())):
        assert bool(tensor.isfinite().all())
    assert torch.equal(aggregate(history[3:], mask[3:], query[3:], project, **options), torch.zeros(1, 4))


@pytest.mark.parametrize("options", ({}, {"top_k": 2}, {"top_k": 2, "renormalize": False}, {"input_aware": False}))
def test_padding_and_order_of_items_do_not_matter(options):
    history, mask, query = batch()
    project = mlp()
    expected = aggregate(history, mask, query, project, **options)
    junk = torch.full((4, 7, 6), 1e6)
    padded = torch.cat([history.masked_fill(~mask[..., None], -1e6), junk], dim=1)
    longer = torch.cat([mask, torch.zeros(4, 7, dtype=torch.bool)], dim=1)
    assert torch.allclose(aggregate(padded, longer, query, project, **options), expected, atol=1e-5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(
        aggregate(padded[:, order], longer[:, order], query, project, **options), expected, atol=1e-5
    )
    for i in range(4):
        alone = aggregate(history[i : i + 1], mask[i : i + 1], query[i : i + 1], project, **options)
        assert torch.allclose(alone[0], expected[i], atol=1e-5)


def test_only_weighted_items_are_projected():
    seen = []
    history, mask, query = batch()
    aggregate(history, mask, query, lambda x: seen.append(len(x)) or x)
    aggregate(history, mask, query, lambda x: seen.append(len(x)) or x, top_k=1)
    assert seen == [9, 3]


def test_nonsense_is_refused():
    with pytest.raises(UserError, match="top_k=0 keeps no item"):
        aggregate(*batch(), mlp(), top_k=0)
    for temperature in (0, -1.0):
        with pytest.raises(UserError, match="has to be positive"):
            aggregate(*batch(), mlp(), temperature=temperature)


# ---- augmentation --------------------------------------------------------------------------------------------------


def test_a_copy_is_decided_by_its_numbers_alone():
    for n in (3, 10, 200):
        one, again = augmented(n, 4, 0, 17, 0.5), augmented(n, 4, 0, 17, 0.5)
        assert np.array_equal(one, again)
        assert (np.diff(one) > 0).all() and one.min() >= 0 and one.max() < n
    draws = [
        tuple(augmented(50, copy, seed, sample, 0.5))
        for copy, seed, sample in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))
    ]
    assert len(set(draws)) == 4


def test_how_many_items_a_copy_drops():
    """int(100·U(0, .5)) + 1 is uniform over 1 … 50, whatever item; each item is dropped equally often."""
    kept = [augmented(100, copy, 0, sample, 0.5) for sample in range(300) for copy in range(1, 11)]
    dropped = np.array([100 - len(rows) for rows in kept])
    assert dropped.min() == 1 and dropped.max() == 50
    assert dropped.mean() == pytest.approx(25.5, abs=4 * math.sqrt((50**2 - 1) / 12 / len(kept)))
    counts = np.bincount(dropped, minlength=51)[1:]
    assert ((counts - 60) ** 2 / 60).sum() < 49 + 4 * math.sqrt(2 * 49)  # chi-square, 49 degrees of freedom
    per_item = np.bincount(np.concatenate(kept), minlength=100) / len(kept)
    assert np.abs(per_item - 0.745).max() < 5 * math.sqrt(0.745 * 0.255 / len(kept))
    assert {100 - len(augmented(100, c, 0, 0, 0.0)) for c in range(1, 30)} == {1}


def test_originals_and_short_histories():
    assert np.array_equal(augmented(5, 0, 0, 0, 0.5), np.arange(5))
    assert augmented(2, 1, 0, 0, 0.5) is None


def test_eleven_times_the_data_and_short_histories_once(llama, encoder_folder, tmp_path):
    plug = PersonaPlug(config(encoder_folder, tmp_path), llama)
    samples = [Sample(str(i), (Message("user", "fox"),), "yes", person(i, n)) for i, n in enumerate((5, 2, 0, 3))]
    data = PlugData(samples, plug.histories, copies=10, drop=0.5, seed=0)
    assert len(data) == 11 + 1 + 1 + 11
    examples = [data[i] for i in range(len(data))]
    assert [e.sample.id for e in examples] == ["0"] * 11 + ["1", "2"] + ["3"] * 11
    assert [i for i, e in enumerate(examples) if e.keep is None] == [0, 11, 12, 13]
    assert all(1 <= len(e.keep) < 5 for e in examples[1:11])
    again = PlugData(samples, plug.histories, copies=10, drop=0.5, seed=0)
    for i in (20, 3, 7):  # whatever the order of reading
        assert np.array_equal(again[i].keep, examples[i].keep)
    other = PlugData(samples, plug.histories, copies=10, drop=0.5, seed=1)
    assert any(not np.array_equal(other[i].keep, examples[i].keep) for i in range(1, 11))


# ---- the personalizer ----------------------------------------------------------------------------------------------


@pytest.fixture
def plug(llama, encoder_folder, tmp_path):
    torch.manual_seed(0)
    plug = PersonaPlug(config(encoder_folder, tmp_path), llama)
    nn.init.normal_(plug.embedder.no_history)
    return plug


def requests(lengths=(4, 0, 1, 3)):
    return [request("what do you think of the red house ?", person(i, n)) for i, n in enumerate(lengths)]


def test_vectors_in_front_by_hand(plug, llama):
    """[I; P_u] from the parts: Proj_inst(v)·scale/7 and sum of w_i Proj(h_i)·scale with vectors of the encoder."""
    asked = requests()[0]
    got = plug.embeddings([asked])[0]
    e = plug.embedder.eval()
    items = plug.encoder.encode([item.text for item in asked.persona.history])
    h = torch.from_numpy(items.astype(np.float16).astype(np.float32))  # as the store keeps them
    q = torch.from_numpy(plug.encoder.encode([asked.messages[-1].content], query=True))[0]
    with torch.no_grad():
        user = ((h @ q).softmax(0)[:, None] * e.project(h)).sum(0) * e.scale
        instruction = e.project_instruction(e.instruction) * e.scale / 7
    assert torch.allclose(got, torch.stack([instruction, user]), atol=1e-5)
    norms = llama.embed.weight.norm(dim=-1)
    assert e.scale == pytest.approx(float(norms.mean()), rel=1e-5)


def test_company_and_order_of_history_do_not_matter(plug):
    asked = requests()
    together = plug.embeddings(asked)
    for one, vector in zip(asked, together, strict=True):
        assert torch.allclose(plug.embeddings([one])[0], vector, atol=1e-5)
        shuffled = Persona(one.persona.id, history=tuple(reversed(one.persona.history)))
        assert torch.allclose(plug.embeddings([replace(one, persona=shuffled)])[0], vector, atol=1e-5)
    assert not torch.allclose(together[0], together[3], atol=1e-2)


def test_a_person_without_history_has_the_learned_vector(plug):
    learned = plug.embedder.no_history * plug.embedder.scale
    nobody = replace(requests()[0], persona=None)
    for vector in plug.embeddings([requests()[1], nobody]):
        assert torch.equal(vector[1:], learned) and bool(vector.isfinite().all())


def test_only_the_last_items_count(encoder_folder, llama, tmp_path):
    plug = PersonaPlug(config(encoder_folder, tmp_path, history_limit=3), llama)
    whole, last = person(0, 7), person(0, 7).history[-3:]
    assert torch.equal(*plug.embeddings([request("fox", whole), request("fox", Persona("0", history=last))]))
    assert [len(w) for w in plug.attention([request("fox", whole)])] == [3]


def test_attention_is_the_weights_of_the_items(plug):
    weights = plug.attention(requests())
    assert [len(w) for w in weights] == [4, 0, 1, 3]
    assert [float(w.sum()) for w in weights] == pytest.approx([1, 0, 1, 1], abs=1e-6)


def test_labels_are_encoded_when_asked_for(encoder_folder, llama, tmp_path):
    from persona.data.base import plain_task, register

    register(plain_task("toy_with_labels"))
    liked, disliked = (
        Persona("a", history=(HistoryItem("1", "the red house", label),)) for label in ("good day", "lazy day")
    )
    for include in (False, True):
        plug = PersonaPlug(config(encoder_folder, tmp_path, include_label=include), llama)
        one, other = plug.embeddings([request("fox", who, task="toy_with_labels") for who in (liked, disliked)])
        assert torch.equal(one, other) != include


def test_query_is_the_last_user_message_or_the_tasks_part_of_it():
    messages = (Message("user", "first"), Message("assistant", "reply"), Message("user", "last"))
    assert query_text(Request(messages)) == "last" and query_text(Request(())) == ""
    lamp = "which one of the two is it? description: a film about the river"
    assert query_text(Request((Message("user", lamp),), task="LaMP_2"), "reference") == "a film about the river"


@pytest.mark.parametrize("tokens, instruction", ((1, True), (1, False), (3, True), (0, True)))
def test_how_many_vectors_stand_in_front(encoder_folder, llama, tmp_path, tokens, instruction):
    plug = PersonaPlug(config(encoder_folder, tmp_path, user_tokens=tokens, instruction=instruction), llama)
    for vectors in plug.embeddings(requests()):
        assert vectors.shape == (tokens + instruction, 32)
    one, other = plug.embeddings([requests()[0], requests()[3]])
    assert torch.equal(one, other) == (tokens == 0), "the instruction alone knows no user"


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"user_tokens": 0, "instruction": False}, "nothing stands in front"),
        ({"prefix_scale": "large"}, "prefix_scale='large' is unknown: use measured or none"),
        ({"learn_temperature": True, "input_aware": False}, "nothing to learn"),
    ),
)
def test_settings_that_make_no_sense(encoder_folder, llama, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        PersonaPlug(config(encoder_folder, tmp_path, **settings), llama)


def test_scales(encoder_folder, llama, tmp_path):
    assert prefix_scale(config(encoder_folder, tmp_path, prefix_scale="none"), llama) == 1
    assert prefix_scale(config(encoder_folder, tmp_path, compat="reference"), llama) == 539.9738


def test_a_store_that_is_being_written_does_not_stop_evaluation(plug, encoder_folder):
    """Another process holds the writer's lock: unseen histories are encoded for this once, and come out the same."""
    import fcntl

    plug.embeddings(requests((4,)))
    expected = plug.embeddings(requests((4, 0, 2, 3)))
    folder = plug.histories.store.folder
    unseen = [replace(r, persona=Persona("new" + r.persona.id, history=r.persona.history[:-1])) for r in requests()]
    with open(folder / "lock", "a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        before = len(plug.histories.store)
        held = plug.embeddings(unseen)
        assert len(plug.histories.store) == before
    assert plug.embeddings(requests((4, 0, 2, 3)))[0].equal(expected[0])
    for a, b in zip(held, plug.embeddings(unseen), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_save_and_load(plug, llama, tmp_path):
    for seed, (name, parameter) in enumerate(plug.embedder.named_parameters()):
        generator = torch.Generator().manual_seed(seed)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        assert name
    expected = plug.embeddings(requests())
    folder = save(plug, llama, tmp_path / "plug")
    again = persona.load(llama, [folder]).personalizers[0]
    assert all(torch.equal(a, b) for a, b in zip(again.embeddings(requests()), expected, strict=True))
    # And once more: what was loaded and saved again has lost nothing.
    twice = persona.load(llama, [save(again, llama, tmp_path / "twice")]).personalizers[0]
    assert all(torch.equal(a, b) for a, b in zip(twice.embeddings(requests()), expected, strict=True))


def test_an_untrained_query_encoder_is_not_saved(encoder_folder, llama, tmp_path):
    from safetensors.torch import load_file

    plug = PersonaPlug(config(encoder_folder, tmp_path, train_query_encoder=False), llama)
    folder = save(plug, llama, tmp_path / "plug")
    assert not any(name.startswith("query_encoder") for name in load_file(folder / "embedder.safetensors"))
    again = persona.load(llama, [folder]).personalizers[0]
    assert all(map(torch.equal, again.embeddings(requests()), plug.embeddings(requests())))


def test_weights_that_do_not_fit_their_config(plug, llama, tmp_path):
    folder = save(plug, llama, tmp_path / "plug")
    settings = json.loads((folder / "personalizer.json").read_text())["config"]
    for change, what in (({"user_tokens": 2}, "no_history"), ({"learn_temperature": True}, "log_temperature")):
        with pytest.raises(UserError, match=f"does not fit its own config: .*{what}"):
            PersonaPlug.load(folder, {**settings, **change}, llama)


def test_an_encoder_that_was_exchanged_under_its_name(llama, encoder_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    own = shutil.copytree(encoder_folder, tmp_path / "encoder")
    folder = save(PersonaPlug(config(own, tmp_path), llama), llama, tmp_path / "plug")
    weights = load_file(own / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="was trained with another encoder than the one that .*encoder is today"):
        persona.load(llama, [folder])


# ---- training ------------------------------------------------------------------------------------------------------


def train(base, people, settings, trainer, out, below=()):
    return persona_plug.train(settings, LanguageModel(base, below), people, trainer, out)


def losses(out) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("name", ("llama", "t5"))
def test_training_moves_what_it_trains_and_nothing_else(load_base, encoder_folder, tmp_path, name, monkeypatch):
    base = load_base(name)
    seen = {}
    before_lm = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    inner = persona_plug.fit

    def fit(module, *rest):  # the real one, with a look at the module before it
        seen["module"] = module
        seen["start"] = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        return inner(module, *rest)

    monkeypatch.setattr(persona_plug, "fit", fit)
    settings = config(encoder_folder, tmp_path, learn_temperature=True)
    folder = train(base, toy_people(), settings, trainer(max_steps=4), tmp_path / "out")
    module = seen["module"]
    moved = {n: not torch.equal(p, seen["start"][n]) for n, p in module.named_parameters() if p.requires_grad}
    assert moved and all(moved.values()), [n for n, m in moved.items() if not m]
    assert any(n.startswith("embedder.query_encoder") for n in moved)
    assert all(torch.equal(before_lm[key], tensor) for key, tensor in base.model.state_dict().items())
    assert not base.model.training and all(p.grad is None for p in base.model.parameters())
    # The store's vectors are the encoder's, before and after.
    plug = persona.load(base, [folder]).personalizers[0]
    texts = [item.text for item in history(0, 5)]
    stored = plug.histories.store.embed(texts)
    assert np.array_equal(stored, plug.encoder.encode(texts).astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("name", ("llama", "t5"))
def test_training_learns_and_the_directory_gives_what_was_learned(load_base, encoder_folder, tmp_path, name):
    base, people = load_base(name), toy_people()
    settings = config(encoder_folder, tmp_path)
    out = tmp_path / "out"
    folder = train(base, people, settings, trainer(max_steps=40, learning_rate=0.01), out)
    curve = losses(out)
    assert len(curve) == 40 and sum(curve[-5:]) < sum(curve[:5]) - 1
    asked = [Request(s.messages, s.persona) for s in people.train]
    with_plug, bare = persona.load(base, [folder]), persona.load(base)
    gain = [
        a[0] - b[0]
        for a, b in zip(
            with_plug.loglikelihood(asked, [s.target for s in people.train]),
            bare.loglikelihood(asked, [s.target for s in people.train]),
            strict=True,
        )
    ]
    assert np.mean(gain) > 0.3, "what was learned does not show in use"


def test_the_loss_is_the_nll_of_use(llama, encoder_folder, tmp_path):
    """The dev loss logged in training is what the saved personalizer gives: the same rows, cuts and vectors."""
    people = toy_people()
    out = tmp_path / "out"
    settings = config(encoder_folder, tmp_path)
    folder = train(llama, people, settings, trainer(max_steps=2, eval_every=2, batch_size=64), out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    asked = [Request(s.messages, s.persona) for s in people.dev]
    scored = persona.load(llama, [folder]).loglikelihood(asked, [s.target for s in people.dev])
    assert logged == pytest.approx(-sum(x for x, _ in scored) / sum(n for _, n in scored), rel=1e-4)


def test_two_runs_of_one_seed_are_the_same_and_of_another_are_not(llama, encoder_folder, tmp_path):
    curves = []
    for i, seed in enumerate((0, 0, 1)):
        settings = config(encoder_folder, tmp_path)
        train(llama, toy_people(), settings, trainer(max_steps=4, seed=seed), tmp_path / str(i))
        curves.append(losses(tmp_path / str(i)))
    assert curves[0] == curves[1] != curves[2]


def test_accumulated_batches_are_one_batch(llama, encoder_folder, tmp_path):
    """Replies differ in length, so a mean of means would differ; tokens are counted over the whole global batch."""
    curves = []
    for i, (size, accumulated) in enumerate(((8, 1), (2, 4))):
        settings = config(encoder_folder, tmp_path, train_query_encoder=False)
        options = trainer(max_steps=3, batch_size=size, gradient_accumulation=accumulated)
        train(llama, toy_people(), settings, options, tmp_path / str(i))
        curves.append(losses(tmp_path / str(i)))
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)


def test_gradient_checkpointing_recomputes_and_changes_no_loss(llama, encoder_folder, tmp_path):
    calls = []
    handle = llama.model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    curves, counts = [], []
    try:
        for on in (False, True):
            calls.clear()
            settings = config(encoder_folder, tmp_path, train_query_encoder=False)
            options = trainer(max_steps=3, gradient_checkpointing=on)
            train(llama, toy_people(dev=0), settings, options, tmp_path / str(on))
            curves.append(losses(tmp_path / str(on)))
            counts.append(len(calls))
    finally:
        handle.remove()
    assert not any(m._forward_hooks or getattr(m, "gradient_checkpointing", False) for m in llama.model.modules())
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert counts == [3, 6], "blocks were not recomputed in the backward pass"


def test_on_top_of_another_personalizer(llama, encoder_folder, tmp_path):
    """A prompt below is part of what is trained on, and stands in the manifest."""
    from persona.methods.prompt import Description
    from persona.personalizer import read_manifest

    people = toy_people(description=True)
    plain = train(llama, people, config(encoder_folder, tmp_path), trainer(max_steps=2), tmp_path / "plain")
    below = Description.load(None, {}, llama)
    stacked = train(llama, people, config(encoder_folder, tmp_path), trainer(max_steps=2), tmp_path / "on", [below])
    assert losses(tmp_path / "plain") != losses(tmp_path / "on")
    assert read_manifest(stacked)["trained_on_top_of"] == ["description"]
    assert read_manifest(plain)["trained_on_top_of"] == []


@pytest.mark.parametrize(
    "change, message",
    (
        ({"compat": "paper"}, "compat='paper' is unknown"),
        ({"train": ()}, "training split is empty"),
        ({"target": ""}, "5 samples have no target to learn from, the first is 0"),
    ),
    ids=("compat", "empty", "target"),
)
def test_what_cannot_be_trained(llama, encoder_folder, tmp_path, change, message):
    people = toy_people(train=5, dev=0)
    if "train" in change:
        people = replace(people, train=())
    if "target" in change:
        people = replace(people, train=tuple(replace(s, target="") for s in people.train))
    settings = config(encoder_folder, tmp_path, compat=change.get("compat"))
    with pytest.raises(UserError, match=message):
        train(llama, people, settings, trainer(max_steps=1), tmp_path / "out")


def test_minilm_end_to_end(llama, tmp_path):
    """The encoder that is installed with the package, in one step of training and in use."""
    from persona.encoders import EncoderConfig

    settings = config("minilm", tmp_path)
    settings = replace(settings, encoder=EncoderConfig())
    folder = train(llama, toy_people(train=4, dev=2), settings, trainer(max_steps=1, batch_size=4), tmp_path / "out")
    model = persona.load(llama, [folder])
    assert model.personalizers[0].encoder.dim == 384
    assert len(model.respond(requests())) == 4
