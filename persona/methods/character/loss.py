"""Third stage, its loss (notes 3.4): DPO + nll_coef · NLL of the teacher's answer + kl_coef · squared log-ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from persona.training.losses import preference_loss


class CharacterLoss(NamedTuple):
    """Means over the batch, 0-d each: `total` = `dpo` + nll_coef · `nll` + kl_coef · `kl`."""

    total: Tensor
    dpo: Tensor
    nll: Tensor
    kl: Tensor


def character_loss(
    policy_chosen: Sequence[Tensor],
    reference_chosen: Sequence[Tensor],
    policy_rejected: Sequence[Tensor],
    reference_rejected: Sequence[Tensor],
    *,
    beta: float = 0.1,
    nll_coef: float = 0.1,
    kl_coef: float = 0.001,
) -> CharacterLoss:
    """The three terms over B pairs, each given as its replies' log-probabilities per token (1-D, any lengths).

    `dpo`: -log sigmoid of beta times the difference of summed log-ratios. `nll`: of the chosen reply, mean per token
    and then over the batch. `kl`: mean per token of (log policy - log reference)², then over all 2 B replies.
    Raises ValueError for lists or replies whose lengths do not fit each other, and for no pair at all.
    """
    lists = (policy_chosen, reference_chosen, policy_rejected, reference_rejected)
    if not policy_chosen or len({len(replies) for replies in lists}) > 1:
        raise ValueError(f"the four lists should hold one entry a pair, not {', '.join(str(len(x)) for x in lists)}")
    for policy, reference in ((policy_chosen, reference_chosen), (policy_rejected, reference_rejected)):
        if any(p.shape != r.shape for p, r in zip(policy, reference, strict=True)):
            raise ValueError("policy and reference should have the same tokens of each reply")

    def mask(replies: Sequence[Tensor]) -> Tensor:
        return pad_sequence([torch.ones_like(reply, dtype=torch.bool) for reply in replies], batch_first=True)

    padded = [pad_sequence(list(replies), batch_first=True) for replies in lists]
    chosen, rejected = mask(policy_chosen), mask(policy_rejected)
    terms = preference_loss(
        padded[0], padded[1], chosen, padded[2], padded[3], rejected, beta=beta, nll_coef=nll_coef, kl_coef=kl_coef
    )
    return CharacterLoss(terms.total.mean(), terms.dpo.mean(), terms.nll.mean(), terms.kl.mean())
