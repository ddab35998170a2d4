"""The router's losses: pure functions of a whole batch (reference/persona_fuse.md 3.2).

p [B, d] are persona embeddings and `experts` [E, d] the experts' vectors, both of length 1; targets [B, E] say in 0 to
1 which experts a query should activate; gates [B, E] sum to 1. A loss over a batch that is spread over processes is
that of the gathered batch (training.py), as none of them is a mean over rows that could be split.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def contrastive_loss(p: Tensor, experts: Tensor, targets: Tensor, tau: float) -> Tensor:
    """L_con: pull p to the vectors of the experts it should activate, push it from the others. A scalar.

    Per row -(1/|P|) sum_{i in P} t_i log softmax_j(p·e_j / tau)_i over P = {i: t_i > 0}; the mean over the rows whose
    P is not empty (neutral queries are skipped), 0 when there is none.
    """
    logps = (p.float() @ experts.float().T / tau).log_softmax(-1)
    active = targets > 0
    rows = active.any(-1)
    each = -(targets * logps).sum(-1) / active.sum(-1).clamp(min=1)
    return (each * rows).sum() / rows.sum().clamp(min=1)


def trait_consistency(p: Tensor, targets: Tensor, similarity: str = "equal") -> Tensor:
    """L_tc: the mean over ordered pairs a != b of a batch of sim_ab · (1 - p_a·p_b); 0 for a batch of one.

    sim_ab is 1 where targets are "equal" and 0 elsewhere, or the "cosine" of the targets where that is positive (0
    with a target of zeros).
    """
    if similarity == "equal":
        alike = (targets[:, None] == targets[None]).all(-1).to(p.dtype)
    else:
        unit = normalize(targets.to(p.dtype), dim=-1)
        alike = (unit @ unit.T).clamp(min=0)
    apart = 1 - torch.eye(len(p), dtype=p.dtype, device=p.device)
    return (apart * alike * (1 - p @ p.T)).sum() / max(1, len(p) * (len(p) - 1))


def gate_kl(targets: Tensor, gates: Tensor) -> Tensor:
    """L_kl: KL(t / sum t || g), the mean over rows whose target is not all zeros; 0 when there is none."""
    share = targets / targets.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
    rows = targets.gt(0).any(-1)
    # x log x is 0 at 0; a gate that top-k has closed under a target counts as the smallest number there is.
    each = (torch.xlogy(share, share) - share * gates.clamp(min=torch.finfo(gates.dtype).tiny).log()).sum(-1)
    return (each * rows).sum() / rows.sum().clamp(min=1)


def load_balance(gates: Tensor, top_k: int = 1) -> Tensor:
    """L_bal = N sum_i f_i P_i over N experts: f_i the share of the `top_k` choices of all rows that fall on expert i,
    P_i its mean gate (Switch and Mixtral). 1 when both are even; gradients flow through P only."""
    n = gates.shape[-1]
    chosen = torch.zeros_like(gates).scatter(-1, gates.topk(min(top_k, n), dim=-1).indices, 1.0)
    return n * (chosen.mean(0) / min(top_k, n) * gates.mean(0)).sum()


def entropy(gates: Tensor) -> Tensor:
    """[..., E] → [...]: the entropy of each gate, in nats."""
    return -torch.xlogy(gates, gates).sum(-1)
