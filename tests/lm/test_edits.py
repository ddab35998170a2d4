"""Edits: formulas by hand, positions the same however a forward is cut, rows apart, nothing left behind."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lm_toys import ALL, DECODERS, PROMPTS, plain_greedy, row

from persona import lm
from persona.errors import UserError
from persona.lm import BaseLM
from persona.lm.batch import assemble, forward_logits, prompts
from persona.lm.edits import POSITIONS, Counts, Edit, ablate, add, cap, edited
from persona.lm.residual import Site, changed, last_states
from persona.personalizer import LanguageModel, Personalizer
from persona.types import Message, Request, Sampling

H = torch.tensor([[3.0, 4.0], [-2.0, 1.0], [0.5, 0.0]])
V = torch.tensor([2.0, 0.0])  # not of length 1


def hooks(base) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules())


def direction(base, seed=0) -> torch.Tensor:
    return torch.randn(base.hidden_size, generator=torch.Generator().manual_seed(seed))


def size(base, layer) -> float:
    return float(last_states(base, [row(base, PROMPTS[1])], [[]], [Site(layer)])[0].norm())


def pushes(base, count=1, positions="all", layers=(0, 1), times=3.0) -> list[Edit]:
    """For each of `count` rows an addition at each layer, long enough to change what the tiny LMs say."""
    return [
        Edit(Site(layer), "add", direction(base, 10 * i + layer), times, size(base, layer), positions=positions)
        for i in range(count)
        for layer in layers
    ]


def caps(base, positions="all", layers=(0, 1), **bounds) -> list[Edit]:
    """A floor that most states of the tiny LMs lie below."""
    bounds = bounds or {"floor": 0.5}
    return [
        Edit(Site(layer), "cap", direction(base, layer), **{k: v * size(base, layer) for k, v in bounds.items()},
             positions=positions)
        for layer in layers
    ]  # fmt: skip


def door(base, edits, rows=None, counts=None):
    """The third door: row i of the rows asked for gets the edits with the numbers rows[i]."""
    if rows is None:
        return lambda indices: edited(base.model, edits, counts=counts)
    return lambda indices: edited(base.model, edits, [rows[i] for i in indices], counts)


# ---- pure ----------------------------------------------------------------------------------------------------------


def test_by_hand():
    assert torch.equal(add(H, V, 0.5), H + torch.tensor([1.0, 0.0]))
    assert torch.equal(add(H, V, -1.0, norm=3.0), H - torch.tensor([3.0, 0.0]))
    assert torch.equal(ablate(H, V), torch.tensor([[0.0, 4.0], [0.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(cap(H, V, floor=1.0), torch.tensor([[3.0, 4.0], [1.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(cap(H, V, ceiling=1.0), torch.tensor([[1.0, 4.0], [-2.0, 1.0], [0.5, 0.0]]))
    assert torch.equal(cap(H, V, -1.0, 1.0), torch.tensor([[1.0, 4.0], [-1.0, 1.0], [0.5, 0.0]]))
    # Off the axes: <h, v> = 5 with v = (.6, .8); down to 2 takes 3 v away.
    assert torch.allclose(cap(H[:1], torch.tensor([6.0, 8.0]), ceiling=2.0), torch.tensor([[1.2, 1.6]]))


def test_identities_of_the_cap():
    hidden, v = torch.randn(4, 7, 16), torch.randn(16)
    capped = cap(hidden, v, floor=0.3)
    assert torch.equal(capped, cap(hidden, -v, ceiling=-0.3))
    assert torch.allclose(cap(capped, v, floor=0.3), capped, atol=1e-6)
    inside = hidden @ (v / v.norm()) >= 0.3
    assert inside.any() and not inside.all() and torch.equal(capped[inside], hidden[inside])
    assert float((capped @ (v / v.norm())).min()) == pytest.approx(0.3, abs=1e-5)
    assert torch.equal(cap(hidden, v), hidden)
    # What is orthogonal to the direction stays.
    assert torch.allclose(ablate(capped, v), ablate(hidden, v), atol=1e-5)
    low = hidden.bfloat16()
    assert cap(low, v, floor=0.3).dtype == add(low, v).dtype == torch.bfloat16
    assert torch.allclose(cap(low, v, floor=0.3).float(), capped, atol=0.05)
    assert torch.equal(add(hidden, v, 0.0), hidden) and torch.equal(add(low, v, 0.0), low)


def test_gradients_pass_through():
    hidden = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for edit in (partial(cap, floor=0.2), partial(cap, floor=-0.1, ceiling=0.1), ablate, partial(add, norm=2.0)):
        assert torch.autograd.gradcheck(edit, (hidden, v))


# ---- positions -----------------------------------------------------------------------------------------------------


def by_hand(base, asked, reply, edits):
    """Log-probs of the reply by one whole unpadded forward, each state changed where the edit says, by index."""
    first = 1 if base.is_encoder_decoder else len(asked.prompt)

    def change(some, hidden):
        for edit in some:
            where = {"all": slice(None), "prompt": slice(None, first), "response": slice(first, None),
                     "last": slice(first - 1, None)}[edit.positions]  # fmt: skip
            part = hidden[:, where]
            part = {
                "add": lambda p, e: add(p, e.direction, e.strength, e.norm),
                "cap": lambda p, e: cap(p, e.direction, e.floor, e.ceiling),
                "ablate": lambda p, e: ablate(p, e.direction),
            }[edit.kind](part, edit)
            hidden = hidden.clone()
            hidden[:, where] = part
        return hidden

    by_site = {site: partial(change, [e for e in edits if e.site == site]) for site in {e.site for e in edits}}
    with torch.no_grad(), changed(base.model, by_site):
        if base.is_encoder_decoder:
            labels = torch.tensor([reply])
            logits = base.model(input_ids=torch.tensor([asked.prompt]), labels=labels).logits[0]
        else:
            logits = base.model(input_ids=torch.tensor([asked.prompt + reply])).logits[0, first - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("positions", POSITIONS)
def test_scores_are_those_of_one_whole_forward(load_base, name, positions):
    """Left padding, prompts computed once for several options of different lengths, the options behind a cache."""
    base = load_base(name)
    edits = [*caps(base, positions), *pushes(base, 1, positions)]
    rows = [row(base, text) for text in PROMPTS]
    options = [[base.encode_option(text) for text in ("boats in the rain", "yes")[: 1 + i % 2]] for i in range(5)]
    scored = lm.score(base, rows, options, door(base, edits), batch_size=3)
    for asked, replies, logps in zip(rows, options, scored, strict=True):
        for reply, found in zip(replies, logps, strict=True):
            assert found.tolist() == pytest.approx(by_hand(base, asked, reply, edits).tolist(), abs=2e-3)
    # Given whole, as training does it.
    inputs = assemble(base, rows, [replies[0] for replies in options])
    with torch.no_grad(), edited(base.model, edits):
        logits, targets = forward_logits(base, inputs)
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    for i, logps in enumerate(scored):
        assert picked[i][targets[i] != -100].tolist() == pytest.approx(logps[0].tolist(), abs=2e-3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("positions", POSITIONS)
def test_decoding_with_a_cache_is_one_whole_forward(load_base, name, positions):
    base = load_base(name)
    edits = [*caps(base, positions), *pushes(base, 1, positions)]
    rows = [row(base, text, max_new_tokens=6) for text in PROMPTS]
    replies = lm.respond(base, rows, door(base, edits), batch_size=3)
    for asked, reply in zip(rows, replies, strict=True):
        assert list(reply.logprobs) == pytest.approx(
            by_hand(base, asked, list(reply.tokens), edits).tolist(), abs=2e-3
        )
    said = [reply.tokens for reply in replies]
    assert said != [reply.tokens for reply in lm.respond(base, rows, batch_size=3)]


def test_each_positions_is_its_own(llama):
    """What is computed is changed for the first time where the positions begin."""
    asked, reply = row(llama, PROMPTS[1]), llama.encode_option("boats in the rain")
    first = len(asked.prompt)

    def states(edits):
        kept = []
        inputs = assemble(llama, [asked], [reply])
        with torch.no_grad(), edited(llama.model, edits), changed(llama.model, {Site(0): kept.append}):
            forward_logits(llama, inputs)
        return kept[0][0]

    plain = states([])
    for positions, expected in (
        ("all", range(0, first + len(reply))), ("prompt", range(0, first)),
        ("response", range(first, first + len(reply))), ("last", range(first - 1, first + len(reply))),
    ):  # fmt: skip
        moved = (states(pushes(llama, 1, positions, layers=[0])) != plain).any(-1).nonzero()[:, 0].tolist()
        assert moved == list(expected)


def test_vectors_in_front_are_the_prompts(llama):
    """A prompt and its embeddings handed over as vectors in front are the same row."""
    edits = caps(llama, "response") + pushes(llama, 1, "prompt")
    option = [[llama.encode_option("boats in the rain")]]
    asked = row(llama, PROMPTS[1])
    ahead = lm.Row(asked.prompt[4:], llama.embed(torch.tensor(asked.prompt[:4])), asked.request)
    one, other = (lm.score(llama, [r], option, door(llama, edits))[0][0] for r in (asked, ahead))
    assert one.tolist() == pytest.approx(other.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_a_shared_beginning_sees_the_same_edit(load_base, name):
    """Entered around everything, not as a third door: rows share beginnings, positions stay where they are."""
    base = load_base(name)
    texts = ["the red house by the river in the rain " * 3 + end for end in ("and boats", "or not", "yes", "no")] * 2
    rows = [row(base, text, max_new_tokens=4) for text in texts]
    for positions in POSITIONS:
        edits = [*caps(base, positions), *pushes(base, 1, positions)]
        with edited(base.model, edits):
            shared = lm.respond(base, rows)
        apart = lm.respond(base, rows, door(base, edits))
        for one, other in zip(shared, apart, strict=True):
            assert one.tokens == other.tokens and one.logprobs == pytest.approx(other.logprobs, abs=2e-3)


def test_positions_of_a_forward_of_ones_own(llama):
    edits, tokens = pushes(llama, 1, "response"), torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), edited(llama.model, edits):
        with pytest.raises(UserError, match="an edit at the response positions needs to know where replies begin"):
            llama.model(input_ids=tokens)
        with prompts([3]):
            whole = llama.model(input_ids=tokens).logits
            start = llama.model(input_ids=tokens[:, :2], use_cache=True)
            rest = llama.model(input_ids=tokens[:, 2:], past_key_values=start.past_key_values).logits
            padded = llama.model(
                input_ids=torch.cat([torch.tensor([[0, 0]]), tokens], dim=1),
                attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
                position_ids=torch.tensor([[0, 0, 0, 1, 2, 3, 4]]),
            ).logits
            unsaid = llama.model(  # positions are read off the mask
                input_ids=torch.cat([torch.tensor([[0, 0]]), tokens], dim=1),
                attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
            ).logits
    assert torch.allclose(torch.cat([start.logits, rest], dim=1), whole, atol=1e-3)
    assert torch.allclose(padded[:, 2:], whole, atol=1e-3)
    assert torch.allclose(unsaid[:, 2:], whole, atol=1e-3)  # rotary angles are relative


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_rows_get_their_own_edits_in_any_batch(load_base, name):
    """Different lengths (padding), edits of different kinds and positions, one row without; also generated."""
    base = load_base(name)
    rows = [row(base, text, max_new_tokens=6) for text in PROMPTS]
    edits = [
        *caps(base),
        *pushes(base, 2),
        *caps(base, "response", ceiling=-0.5),
        *pushes(base, 1, "last", times=-3.0),
    ]
    own = [[0, 1, 2], [4, 5, 6], [], [7, 8, 9], [0, 3, 6, 7]]
    options = [[base.encode_option("boats in the rain")]] * len(rows)
    counts = Counts()
    together = lm.score(base, rows, options, door(base, edits, own, counts), batch_size=5)
    replies = lm.respond(base, rows, door(base, edits, own), batch_size=5)
    for i, asked in enumerate(rows):
        mine = [edits[number] for number in own[i]]
        alone = lm.score(base, [asked], options[:1], door(base, mine), batch_size=1)
        assert torch.allclose(together[i][0], alone[0][0], atol=2e-3)
        (reply,) = lm.respond(base, [asked], door(base, mine), batch_size=1)
        assert reply.tokens == replies[i].tokens
    untouched = lm.score(base, rows, options, door(base, []), 5)
    assert torch.equal(together[2][0], untouched[2][0])
    moved = [float((a[0] - b[0]).abs().max()) for a, b in zip(together, untouched, strict=True)]
    assert min(moved[i] for i in (0, 1, 3, 4)) > 1e-2
    assert counts.seen[2:6] == [0] * 4 and counts.seen[8:] == [0] * 2 and min(counts.seen[:2]) > 0


def test_generation_with_a_cache_is_a_forward_per_token(llama):
    for asked in (row(llama, text, max_new_tokens=6) for text in PROMPTS[:3]):
        edits = [*pushes(llama), *caps(llama)]
        (reply,) = lm.respond(llama, [asked], door(llama, edits))
        with edited(llama.model, edits):
            assert list(reply.tokens) == plain_greedy(llama, asked.prompt, 6)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_beams_repeat_their_rows_edits(load_base, name):
    base = load_base(name)
    rows = [row(base, text, max_new_tokens=4, num_beams=2) for text in PROMPTS[:3]]
    edits = [*pushes(base, 2, "last"), *caps(base, "response")]
    own = [[0, 1], [2, 3, 4, 5], []]
    together = lm.respond(base, rows, door(base, edits, own), batch_size=3)
    for i, asked in enumerate(rows):
        alone = lm.respond(base, [asked], door(base, [edits[k] for k in own[i]]), batch_size=1)
        assert alone[0].tokens == together[i].tokens
        assert alone[0].logprobs == pytest.approx(together[i].logprobs, abs=2e-3)


def test_the_order_of_edits_at_one_site(llama):
    v = direction(llama)
    site, asked = Site(1), row(llama, PROMPTS[1])

    def state(edits, rows=None):
        return last_states(llama, [asked], [[]], [site], door(llama, edits, rows))[0, 0]

    plain = state([])
    push, floor, drop = Edit(site, "add", v, -4.0), Edit(site, "cap", v, floor=9.0), Edit(site, "ablate", v)
    other = Edit(site, "add", direction(llama, 5), 2.0)
    for edits, expected in (
        ([push, floor], cap(add(plain, v, -4.0), v, 9.0)),
        ([floor, push], add(cap(plain, v, 9.0), v, -4.0)),
        ([floor, other, drop, push], add(ablate(add(cap(plain, v, 9.0), other.direction, 2.0), v), v, -4.0)),
        ([floor, Edit(site, "ablate", other.direction)], ablate(cap(plain, v, 9.0), other.direction)),
        ([push, other, push], add(add(plain, v, -8.0), other.direction, 2.0)),
    ):
        assert torch.allclose(state(edits), expected, atol=1e-4)
        assert torch.allclose(state(edits, [list(range(len(edits)))]), expected, atol=1e-4)


def test_contexts_within_each_other_act_as_entered(llama):
    v, asked = direction(llama), row(llama, PROMPTS[1])
    plain = last_states(llama, [asked], [[]], [Site(1)])[0, 0]
    with (
        edited(llama.model, [Edit(Site(1), "add", v, 5.0)]),
        edited(llama.model, [Edit(Site(1), "cap", v, ceiling=1.0)]),
    ):
        found = last_states(llama, [asked], [[]], [Site(1)])[0, 0]
    assert torch.allclose(found, cap(add(plain, v, 5.0), v, ceiling=1.0), atol=1e-4)

    class Held(Personalizer):
        method = "held"

        def __init__(self, edits):
            self.edits = edits

        def modules(self, requests):
            return edited(llama.model, self.edits)

    asked = [Request((Message("user", text),), sampling=Sampling(5)) for text in PROMPTS]
    stack = LanguageModel(llama, [Held(pushes(llama)), Held(caps(llama))]).loglikelihood(asked, ["boats"] * 5)
    joined = LanguageModel(llama, [Held([*pushes(llama), *caps(llama)])]).loglikelihood(asked, ["boats"] * 5)
    for (a, _), (b, _) in zip(stack, joined, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


# ---- identities within forwards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_nothing_to_do_is_the_base_bitwise(load_base, name):
    base = load_base(name)
    rows = [row(base, text) for text in PROMPTS]
    options = [[base.encode_option("boats in the rain")]] * 5

    def scored(edits, rows_of=None):
        return torch.stack([row[0] for row in lm.score(base, rows, options, door(base, edits, rows_of))])

    plain = scored([])
    v = direction(base)
    with edited(base.model, [Edit(Site(0), "add", v, 0.0), Edit(Site(1), "add", torch.zeros_like(v))]):
        assert hooks(base) == 0
    assert torch.equal(scored([Edit(Site(0), "add", v, 0.0)]), plain)
    assert torch.equal(scored(caps(base), [[]] * 5), plain)
    wide = caps(base, floor=-50.0, ceiling=50.0)
    assert torch.equal(scored(wide), plain), "within the bounds nothing moves"
    some = scored([*caps(base), *pushes(base)], [[], [0, 2], [], [1, 3], []])
    assert torch.equal(some[[0, 2, 4]], plain[[0, 2, 4]]) and (some[[1, 3]] != plain[[1, 3]]).any(-1).all()


def test_a_floor_is_a_ceiling_on_the_other_side(llama):
    rows = [row(llama, text) for text in PROMPTS]
    options = [[llama.encode_option("boats in the rain")]] * 5
    floors = caps(llama)
    ceilings = [Edit(e.site, "cap", -e.direction, ceiling=-e.floor) for e in floors]
    one, other = (lm.score(llama, rows, options, door(llama, edits)) for edits in (floors, ceilings))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))
    twice = lm.score(llama, rows, options, door(llama, [e for e in floors for _ in range(2)]))
    assert all(torch.allclose(a[0], b[0], atol=1e-3) for a, b in zip(one, twice, strict=True))


@pytest.mark.parametrize("part", ("block_input", "attention", "mlp"))
def test_other_sites(load_base, part):
    for base in map(load_base, ("llama", "t5")):
        v, asked, site = direction(base), row(base, PROMPTS[0]), Site(1, part)
        reply = base.encode_option("boats")
        plain = last_states(base, [asked], [reply], [site])[0, 0]
        held = last_states(base, [asked], [reply], [site], door(base, [Edit(site, "cap", v, floor=9.0)]))[0, 0]
        assert torch.allclose(held, cap(plain, v, 9.0), atol=1e-4) and not torch.allclose(held, plain)


# ---- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_counts_are_those_of_rows_one_by_one(load_base, name):
    """Padding does not count, nor do positions behind a row's end while its batch goes on."""
    base = load_base(name)
    ends = base.model.generation_config.eos_token_id
    rows = [row(base, text, max_new_tokens=8) for text in PROMPTS]
    edits = [*caps(base), *caps(base, "response", ceiling=0.1), *pushes(base, 5)]
    own = [[0, 1, 2, 3, 4 + 2 * i, 5 + 2 * i] for i in range(5)]
    free = lm.respond(base, rows, door(base, edits, own), batch_size=5)
    try:  # what one row says becomes the end, so that rows end at different places
        base.model.generation_config.eos_token_id = [ends, free[0].tokens[2]]
        together, alone = Counts(), Counts()
        replies = lm.respond(base, rows, door(base, edits, own, together), batch_size=5)
        for i, asked in enumerate(rows):
            lm.respond(base, [asked], door(base, edits, own[i : i + 1], alone), batch_size=1)
    finally:
        base.model.generation_config.eos_token_id = ends
    lengths = {len(reply.tokens) for reply in replies}
    assert len(lengths) > 1 and together.seen == alone.seen and together.acted == alone.acted
    written = sum(len(reply.tokens) - 1 for reply in replies)  # the last token is said, not read
    prompt = 5 if base.is_encoder_decoder else sum(asked.length for asked in rows)
    assert together.seen == [prompt + written] * 2 + [written] * 2 + [0] * 10
    assert together.engaged()[-1] is None and 0 < together.engaged()[0] <= 1


def test_the_engaged_share_by_hand(llama):
    asked, v = row(llama, PROMPTS[1]), direction(llama)
    kept = []
    with torch.no_grad(), changed(llama.model, {Site(0): kept.append}):
        llama.model(input_ids=torch.tensor([asked.prompt]))
    along = (kept[0][0] @ (v / v.norm())).sort().values
    floor = float(along[3:5].mean())  # four positions lie below
    with torch.no_grad(), edited(llama.model, [Edit(Site(0), "cap", v, floor=floor)]) as counts:
        for _ in range(2):
            llama.model(input_ids=torch.tensor([asked.prompt]))
    assert counts.acted == [8] and counts.seen == [2 * len(asked.prompt)]
    assert counts.engaged() == [4 / len(asked.prompt)]


# ---- what else touches a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5"])
def test_hooks_are_gone_after_an_exception(load_base, name):
    base = load_base(name)
    edits = [*pushes(base, 1, "response"), *caps(base)]
    with pytest.raises(RuntimeError, match="stop"), edited(base.model, edits):
        assert hooks(base) == 4  # two layers, and both sides of the decoder
        raise RuntimeError("stop")
    assert hooks(base) == 0

    def fail(hidden):
        raise RuntimeError("inside a forward")

    given = {"input_ids": torch.tensor([[5, 6]]), **({"labels": torch.tensor([[5]])} if name == "t5" else {})}
    with (
        pytest.raises(RuntimeError, match="inside"),
        edited(base.model, caps(base)),
        changed(base.model, {Site(1): fail}),
    ):
        base.model(**given)
    with pytest.raises(UserError, match="there is no layer 2"), edited(base.model, caps(base, layers=[1]) + [
        Edit(Site(2), "ablate", direction(base))
    ]):  # fmt: skip
        pass
    assert hooks(base) == 0


def test_gradients_reach_directions_and_what_lies_below(llama):
    """Nothing is written in place: through a cap and an addition, to a learned vector and to the embeddings."""
    v = direction(llama).requires_grad_()
    embeds = llama.embed(torch.tensor([row(llama, PROMPTS[1]).prompt])).detach().requires_grad_()
    edits = [Edit(Site(0), "add", v, 2.0), Edit(Site(0), "cap", direction(llama, 1), floor=3.0)]
    for rows in (None, [[0, 1]]):
        with edited(llama.model, edits, rows):
            llama.model(inputs_embeds=embeds).logits.float().log_softmax(-1)[0, -1, 5].backward()
        assert v.grad.abs().sum() > 0 and embeds.grad.abs().sum() > 0
        kept, moved, step = v.grad.clone(), v.detach().clone(), 1e-2 * v.grad / v.grad.norm() ** 2
        v.grad = embeds.grad = None
        values = []
        for sign in (1, -1):
            nudged = [Edit(Site(0), "add", moved + sign * step, 2.0), edits[1]]
            with torch.no_grad(), edited(llama.model, nudged, rows):
                values.append(llama.model(inputs_embeds=embeds).logits.float().log_softmax(-1)[0, -1, 5])
        assert float(values[0] - values[1]) == pytest.approx(2 * float((kept * step).sum()), rel=0.2)


@pytest.mark.slow
def test_it_compiles_whole(llama):
    """Nothing in the hooks depends on data: one graph. The graph is run as it is; no compiler is needed."""
    model = copy.deepcopy(llama.model)
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    edits = [*caps(llama), *pushes(llama, 1, "response")]
    with torch.no_grad(), prompts([2, 3]):
        with edited(model, edits, [[0, 1], [2, 3]]) as plain:
            expected = model(input_ids=tokens, use_cache=False).logits
        with edited(model, edits, [[0, 1], [2, 3]]) as counts:
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            for _ in range(2):
                assert torch.allclose(compiled(input_ids=tokens, use_cache=False).logits, expected, atol=1e-4)
    assert counts.acted == [2 * n for n in plain.acted] and counts.seen == [8, 8, 0, 0]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_the_states_dtype_stays(llama, dtype):
    base = BaseLM(copy.deepcopy(llama.model).to(dtype), llama.tokenizer, "other precision")
    seen = []
    with (
        torch.no_grad(),
        edited(base.model, [*caps(base), *pushes(base)]),
        changed(base.model, {Site(1): seen.append}),
    ):
        base.model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen[0].dtype == dtype


def test_mistakes_are_named(llama):
    v, site = direction(llama), Site(1)
    for build, message in (
        (lambda: Edit(site, "turn", v), "an edit's kind is one of add, ablate, cap, not 'turn'"),
        (lambda: Edit(site, "add", v, positions="first"), "one of all, prompt, response, last, not 'first'"),
        (lambda: Edit(site, "cap", v), "the cap at layer 1: a cap needs a floor or a ceiling"),
        (lambda: Edit(site, "add", v, floor=1.0), "only a cap has them"),
        (lambda: Edit(site, "cap", v, floor=2.0, ceiling=1.0), "a cap's floor of 2.0 lies above its ceiling of 1.0"),
        (lambda: cap(H, V, 2.0, 1.0), "a cap's floor of 2.0 lies above"),
        (lambda: Edit(site, "cap", v * torch.nan, floor=0.0), "one direction of finite numbers"),
        (lambda: Edit(site, "add", torch.stack([v, v])), r"one direction of finite numbers, but has \(2, 32\)"),
        (lambda: Edit(site, "ablate", v * 0), "a direction of length 0: it points nowhere"),
        (lambda: edited(llama.model, [Edit(site, "ablate", V)]).__enter__(), "2 numbers, but the LM has states of 32"),
    ):
        with pytest.raises(UserError, match=message):
            build()
    with pytest.raises(UserError, match="edits were given for 2 rows, but the forward has 3"):
        with torch.no_grad(), edited(llama.model, caps(llama), [[0], [1]]):
            llama.model(input_ids=torch.tensor([[5], [6], [7]]))
    assert hooks(llama) == 0
