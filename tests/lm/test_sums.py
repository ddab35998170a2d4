"""Running sums over rollouts: those of stored means, and the same to the bit on two processes."""

from __future__ import annotations

import pytest
import torch

from persona.errors import UserError
from persona.lm import sums
from persona.lm.edits import Edit, edited
from persona.lm.residual import Site, span_means
from persona.lm.sums import Sums, rollout_sums
from persona.types import Message

SITES = [Site(0), Site(1)]
WORDS = "the quick brown fox jumps over a lazy dog in the rain by the red house".split()


def rollouts(count: int = 40) -> tuple[list[tuple[Message, ...]], list[tuple[str, int]]]:
    """Of one to three turns and many lengths; some replies are empty, and rollout 7 says nothing at all."""
    conversations = []
    for i in range(count):
        messages = []
        for turn in range(1 + i % 3):
            reply = "" if i == 7 or (turn == 1 and i % 4 == 0) else " ".join(WORDS[turn : turn + 1 + (5 * i) % 11])
            messages += [Message("user", " ".join(WORDS[: 1 + i % 13])), Message("assistant", reply)]
        conversations.append(tuple(messages))
    return conversations, [(WORDS[i % 3], i % 4) for i in range(count)]


def test_sums_are_those_of_the_means_of_turns(llama):
    conversations, keys = rollouts()
    axis = torch.randn(2, llama.hidden_size, generator=torch.Generator().manual_seed(0))
    found = rollout_sums(llama, conversations, keys, SITES, axis, batch_size=8)
    means = dict(span_means(llama, conversations, SITES, batch_size=8))
    assert found.empty == [7] and sorted(found.projections) == [i for i in range(40) if i != 7]
    for key in set(keys):
        mine = [i for i, other in enumerate(keys) if other == key and i != 7]
        stored = torch.stack([means[i].nanmean(dim=0).double() for i in mine])
        assert found.counts[key] == len(mine)
        assert torch.allclose(found.sums[key], stored.sum(0), rtol=1e-6, atol=1e-4)
    by_hand = torch.einsum("lh,lh->l", means[5].nanmean(dim=0), axis / axis.norm(dim=-1, keepdim=True))
    assert torch.allclose(found.projections[5], by_hand, atol=1e-4)


def test_merging_is_adding_in_order():
    vectors = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0)) * 1e4
    whole, parts = Sums(), [Sums(), Sums()]
    for i, vector in enumerate(vectors):
        whole.add("ab"[i % 2], vector)
        parts[i // 3].add("ab"[i % 2], vector)
    merged = Sums()
    for part in parts:
        merged.merge(part)
    assert merged.counts == whole.counts == {"a": 3, "b": 3}
    assert all(torch.allclose(merged.sums[key], whole.sums[key], rtol=1e-15) for key in "ab")
    assert whole.sums["a"].dtype == torch.float64


def test_edits_get_the_conversations_they_belong_to(llama, monkeypatch):
    monkeypatch.setattr(sums, "CHUNK", 4)
    conversations, keys = rollouts(12)
    push = Edit(Site(1), "add", torch.ones(llama.hidden_size))

    def edit(indices):
        return edited(llama.model, [push], [[0] if i in (5, 9) else [] for i in indices])

    plain, pushed = (rollout_sums(llama, conversations, range(12), SITES, edit=one) for one in (None, edit))
    for i in plain.sums:
        assert torch.allclose(pushed.sums[i][1], plain.sums[i][1] + (i in (5, 9)), atol=1e-3)


def test_mistakes_are_named(llama):
    conversations, keys = rollouts(3)
    with pytest.raises(UserError, match="an axis with 3 layers does not fit 2 sites: it belongs to another LM"):
        rollout_sums(llama, conversations, keys, SITES, torch.ones(3, llama.hidden_size))
    with pytest.raises(UserError, match="leave out turns"):
        rollout_sums(llama, [(Message("assistant", "boats " * 300),)], [0], SITES)


@pytest.mark.multi_process
def test_two_processes_are_one(llama, monkeypatch, tmp_path, root):
    """Bitwise, with a last chunk that has no partner; and an error of one of them reaches both."""
    monkeypatch.syspath_prepend(str(root / "tests" / "training"))
    from training_toys import in_two

    monkeypatch.setattr(sums, "CHUNK", 8)
    conversations, keys = rollouts()
    axis = torch.randn(2, llama.hidden_size, generator=torch.Generator().manual_seed(0))
    one = rollout_sums(llama, conversations, keys, SITES, axis)

    def act() -> None:
        found = rollout_sums(llama, conversations, keys, SITES, axis)
        assert (found.counts, found.empty) == (one.counts, one.empty) and found.sums.keys() == one.sums.keys()
        assert all(torch.equal(found.sums[key], one.sums[key]) for key in one.sums)
        assert all(torch.equal(found.projections[i], one.projections[i]) for i in one.projections)
        long = [*conversations[:9], (Message("assistant", "boats " * 300),)]
        with pytest.raises(UserError, match="leave out turns"):  # the second chunk's, on both
            rollout_sums(llama, long, range(10), SITES)

    assert in_two(act) == [0, 0]
