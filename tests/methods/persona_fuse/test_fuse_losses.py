"""The router's losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from persona.methods.persona_fuse import contrastive_loss
from persona.methods.persona_fuse.losses import entropy, gate_kl, load_balance, trait_consistency

EXPERTS = tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])


def test_contrastive_by_hand():
    """One active expert at cosine .6 against .8 and -.6, tau .5; and the mean over the two active ones."""
    p = tensor([[0.6, 0.8]])
    total = math.exp(1.2) + math.exp(1.6) + math.exp(-1.2)
    one, other = -math.log(math.exp(1.2) / total), -math.log(math.exp(1.6) / total)
    assert contrastive_loss(p, EXPERTS, tensor([[1.0, 0, 0]]), 0.5).item() == pytest.approx(one, rel=1e-6)
    both = contrastive_loss(p, EXPERTS, tensor([[1.0, 1, 0]]), 0.5).item()
    assert both == pytest.approx((one + other) / 2, rel=1e-6)
    soft = contrastive_loss(p, EXPERTS, tensor([[0.5, 1, 0]]), 0.5).item()
    assert soft == pytest.approx((0.5 * one + other) / 2, rel=1e-6)


def test_neutral_queries_skip_the_contrastive_loss():
    p = tensor([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]])
    targets = tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert contrastive_loss(p, EXPERTS, targets, 0.1) == contrastive_loss(p[:1], EXPERTS, targets[:1], 0.1)
    p = p.requires_grad_()
    loss = contrastive_loss(p, EXPERTS, targets, 0.1)
    loss.backward()
    assert torch.equal(p.grad[1:], torch.zeros(2, 2)) and p.grad[0].any()
    assert contrastive_loss(p[1:], EXPERTS, targets[1:], 0.1).item() == 0


def test_consistency_by_hand():
    """Of six ordered pairs, (0, 1) and (1, 0) call for the same: 2 · (1 - .6) / 6. By cosine some with the third."""
    p = tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    targets = tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 0]])
    assert trait_consistency(p, targets).item() == pytest.approx(2 * 0.4 / 6)
    half = 1 / math.sqrt(2)
    expected = 2 * (0.4 + half * 1.0 + half * 0.2) / 6
    assert trait_consistency(p, targets, "cosine").item() == pytest.approx(expected)
    assert trait_consistency(p[:1], targets[:1]).item() == 0
    zeros = torch.zeros(2, 3)
    assert trait_consistency(p[:2], zeros).item() == pytest.approx(0.4)  # two neutral queries call for the same
    assert trait_consistency(p[:2], zeros, "cosine").item() == 0


def test_gate_kl_by_hand():
    gates = tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    targets = tensor([[1.0, 1, 0], [0, 0, 0]])
    expected = 0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    assert gate_kl(targets, gates).item() == pytest.approx(expected)
    assert gate_kl(targets[1:], gates[1:]).item() == 0
    closed = gate_kl(tensor([[0.0, 1, 0]]), tensor([[1.0, 0, 0]]))
    assert math.isfinite(closed.item()) and closed > 10


def test_load_balance_by_hand():
    """Three of four rows choose the first: 2 · (.75 · mean + .25 · mean); even choices and gates give 1."""
    gates = tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    assert load_balance(gates).item() == pytest.approx(2 * (0.75 * 0.7 + 0.25 * 0.3))
    assert load_balance(gates, top_k=2).item() == pytest.approx(1)  # everybody is chosen
    assert load_balance(tensor([[0.6, 0.4], [0.4, 0.6]])).item() == pytest.approx(1)
    assert load_balance(tensor([[1.0, 0.0]] * 3)).item() == pytest.approx(2)


def test_entropy_by_hand():
    assert entropy(tensor([[0.5, 0.5], [1.0, 0.0]])).tolist() == pytest.approx([math.log(2), 0])
