"""Loss terms on numbers small enough for paper and pencil."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from persona.training.losses import dpo_loss, margin_of, preference_loss, sequence_nll, squared_log_ratio

NAN, INF = math.nan, math.inf

# Two pairs. Log-probs are multiples of 1/4, so that every sum below is exact. Padding holds what must never be read.
CHOSEN = tensor([[-1.0, -2.0, -0.5], [-0.25, NAN, -INF]])
REF_CHOSEN = tensor([[-1.5, -2.5, -0.5], [-0.75, INF, 3.0]])
CHOSEN_MASK = tensor([[1, 1, 1], [1, 0, 0]])
REJECTED = tensor([[-3.0, NAN], [-1.0, -1.0]])
REF_REJECTED = tensor([[-2.0, NAN], [-1.0, -1.5]])
REJECTED_MASK = tensor([[1, 0], [1, 1]])
ROWS = (CHOSEN, REF_CHOSEN, CHOSEN_MASK, REJECTED, REF_REJECTED, REJECTED_MASK)


def test_margins_by_hand():
    """Pair 1: (.5 + .5 + 0) - (-1) = 2. Pair 2: .5 - (0 + .5) = 0."""
    assert margin_of(*ROWS).tolist() == [2.0, 0.0]


def test_the_three_terms_by_hand():
    """NLL: 3.5/3 and .25. Squared log-ratio: chosen (.25 + .25 + 0)/3 and .25, rejected 1 and (0 + .25)/2; halves."""
    loss = preference_loss(*ROWS, beta=0.1, nll_coef=0.1, kl_coef=0.001)
    dpo = [math.log(1 + math.exp(-0.2)), math.log(2)]
    nll, kl = [3.5 / 3, 0.25], [(0.5 / 3 + 1) / 2, (0.25 + 0.125) / 2]
    assert loss.dpo.tolist() == pytest.approx(dpo, rel=1e-6)
    assert loss.nll.tolist() == pytest.approx(nll, rel=1e-6)
    assert loss.kl.tolist() == pytest.approx(kl, rel=1e-6)
    total = [d + 0.1 * n + 0.001 * k for d, n, k in zip(dpo, nll, kl, strict=True)]
    assert loss.total.tolist() == pytest.approx(total, rel=1e-6)
    # The paper's loss of the batch: means over 2 pairs, over 2 chosen replies, and over 4 replies.
    batch = sum(dpo) / 2 + 0.1 * sum(nll) / 2 + 0.001 * (0.5 / 3 + 0.25 + 1 + 0.125) / 4
    assert float(loss.total.mean()) == pytest.approx(batch, rel=1e-6)


def test_a_policy_that_is_the_reference_is_worth_ln_2():
    same = preference_loss(CHOSEN, CHOSEN, CHOSEN_MASK, REJECTED, REJECTED, REJECTED_MASK, beta=0.7, kl_coef=1.0)
    assert same.total.tolist() == pytest.approx([math.log(2)] * 2) and same.kl.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("weights", ((1.0, 0.0), (0.0, 1.0), (0.25, 0.75), (2.0, 3.0)))
def test_weights_of_both_orientations(weights):
    """-log σ(x) = ln(1 + e^-x), here x = ±.5 · 2."""
    chosen, rejected = weights
    expected = chosen * math.log(1 + math.exp(-1)) + rejected * math.log(1 + math.exp(1))
    loss = dpo_loss(tensor([2.0, 0.0]), beta=0.5, chosen_weight=tensor([chosen, 1.0]),
                    rejected_weight=tensor([rejected, 1.0]))  # fmt: skip
    assert loss.tolist() == pytest.approx([expected, 2 * math.log(2)], rel=1e-6)
    assert float(dpo_loss(tensor(2.0), beta=0.5, chosen_weight=chosen, rejected_weight=rejected)) == pytest.approx(
        expected, rel=1e-6
    )


def test_exchanged_replies_are_exchanged_weights():
    there = preference_loss(*ROWS, beta=0.3, chosen_weight=0.8, rejected_weight=0.2)
    back = preference_loss(*ROWS[3:], *ROWS[:3], beta=0.3, chosen_weight=0.2, rejected_weight=0.8)
    assert torch.allclose(there.dpo, back.dpo) and torch.equal(there.margin, -back.margin)
    assert torch.equal(there.kl, back.kl)


def test_a_margin_far_out_is_finite_and_linear():
    assert dpo_loss(tensor([-1e4, 1e4]), beta=1.0).tolist() == [1e4, 0.0]


def test_a_row_without_tokens_is_worth_nothing():
    empty = torch.zeros(1, 2)
    row = torch.full((1, 2), NAN, requires_grad=True)
    for value in (sequence_nll(row, empty), squared_log_ratio(row, row, empty)):
        assert value.tolist() == [0.0]
    loss = preference_loss(row, row, empty, row, row, empty, beta=0.1, nll_coef=1.0, kl_coef=1.0).total
    assert loss.tolist() == pytest.approx([math.log(2)])
    loss.sum().backward()
    assert row.grad.tolist() == [[0.0, 0.0]]


def test_what_is_masked_has_no_gradient():
    chosen = CHOSEN.clone().requires_grad_()
    preference_loss(chosen, *ROWS[1:], beta=0.1, nll_coef=0.1, kl_coef=0.1).total.sum().backward()
    assert torch.equal(chosen.grad != 0, CHOSEN_MASK.bool())


def test_a_batch_is_its_rows_one_by_one_and_padding_is_nothing():
    options = {"beta": 0.1, "nll_coef": 0.1, "kl_coef": 0.01}
    together = preference_loss(*ROWS, **options)
    wider = preference_loss(*(torch.nn.functional.pad(t, (2, 3)) for t in ROWS), **options)
    for i in range(2):
        alone = preference_loss(*(t[i : i + 1] for t in ROWS), **options)
        for one, many, padded in zip(alone, together, wider, strict=True):
            assert float(one) == float(many[i]) == float(padded[i])


def test_half_precision_is_summed_in_single():
    """In bfloat16 256 + 1 is 256: a sum that stays there after the 256th token would be off by the rest."""
    ones = torch.full((1, 600), -1.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 600)
    assert float(sequence_nll(ones, mask)) == 1.0
    assert float(margin_of(ones, ones * 2, mask, ones, ones, mask)) == 600.0
