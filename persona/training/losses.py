"""Loss terms on per-token log-probabilities: pure, one value per row, to be added up and averaged by whoever trains.

All take natural log-probabilities [B, T] of given tokens and a mask [B, T] (true = a token of the reply); what stands
where the mask is false is never read, not even if it is not finite. A row without any token is worth 0. Sums are in
float32 or wider. Means over a batch are the caller's, so that one batch, several processes and accumulated batches
give one loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def token_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] → [B]: the sum over the tokens of each row."""
    return torch.where(mask.bool(), values.float(), 0.0).sum(-1)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] → [B]: the mean over the tokens of each row; 0 for a row without tokens."""
    return token_sum(values, mask) / mask.sum(-1).clamp(min=1)


def dpo_loss(
    margin: Tensor, *, beta: float, chosen_weight: Tensor | float = 1.0, rejected_weight: Tensor | float = 0.0
) -> Tensor:
    """Sigmoid DPO (Rafailov et al. 2023, eq. 7) of each pair, for both orientations: [B] → [B].

    `margin` is the log-ratio of the chosen reply to the reference, minus that of the rejected one (`margin_of`). The
    loss is chosen_weight · -log σ(beta·margin) + rejected_weight · -log σ(-beta·margin): with 1 and 0 the usual one;
    with P and 1 - P the expectation over which reply is the better one (APC paper, eq. 8-9). Weights are numbers or
    [B]. At margin 0 it is (chosen_weight + rejected_weight) · ln 2.
    """
    return -chosen_weight * logsigmoid(beta * margin) - rejected_weight * logsigmoid(-beta * margin)


def margin_of(
    chosen_logps: Tensor,
    ref_chosen_logps: Tensor,
    chosen_mask: Tensor,
    rejected_logps: Tensor,
    ref_rejected_logps: Tensor,
    rejected_mask: Tensor,
) -> Tensor:
    """[B]: (log π(chosen) - log ref(chosen)) - (log π(rejected) - log ref(rejected)), each summed over its tokens.

    Chosen and rejected replies may be padded to different lengths.
    """
    chosen = token_sum(chosen_logps.float() - ref_chosen_logps, chosen_mask)
    return chosen - token_sum(rejected_logps.float() - ref_rejected_logps, rejected_mask)


def sequence_nll(logps: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood per token of each row: the mean over tokens first, so a long reply weighs as much as a
    short one (reference/open_character_training 3.4). [B, T], [B, T] → [B]."""
    return -token_mean(logps, mask)


def squared_log_ratio(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's tokens of (log π - log ref)²: [B, T] three times → [B].

    It holds the policy near the reference token by token; it is no estimate of a KL divergence, though the paper's
    code names it so (reference/open_character_training 3.4).
    """
    # Masked before it is squared: the gradient of what is not finite is not finite either, even times zero.
    ratio = torch.where(mask.bool(), logps.float() - ref_logps, 0.0)
    return token_mean(ratio.square(), mask)


class PreferenceLoss(NamedTuple):
    """The terms of each pair, [B] each: `total` = `dpo` + nll_coef · `nll` + kl_coef · `kl`; and the `margin`."""

    total: Tensor
    dpo: Tensor
    nll: Tensor
    kl: Tensor
    margin: Tensor


def preference_loss(
    chosen_logps: Tensor,
    ref_chosen_logps: Tensor,
    chosen_mask: Tensor,
    rejected_logps: Tensor,
    ref_rejected_logps: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float,
    nll_coef: float = 0.0,
    kl_coef: float = 0.0,
    chosen_weight: Tensor | float = 1.0,
    rejected_weight: Tensor | float = 0.0,
) -> PreferenceLoss:
    """DPO + nll_coef · NLL of the chosen reply + kl_coef · squared log-ratio of both, per pair
    (reference/open_character_training 3.4).

    The mean of `total` over a batch is the paper's loss: the squared log-ratio there is a mean over all 2B replies,
    hence half of each here.
    """
    margin = margin_of(chosen_logps, ref_chosen_logps, chosen_mask, rejected_logps, ref_rejected_logps, rejected_mask)
    dpo = dpo_loss(margin, beta=beta, chosen_weight=chosen_weight, rejected_weight=rejected_weight)
    nll = sequence_nll(chosen_logps, chosen_mask)
    kl = squared_log_ratio(chosen_logps, ref_chosen_logps, chosen_mask)
    kl = (kl + squared_log_ratio(rejected_logps, ref_rejected_logps, rejected_mask)) / 2
    return PreferenceLoss(dpo + nll_coef * nll + kl_coef * kl, dpo, nll, kl, margin)
