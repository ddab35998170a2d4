"""How queries are routed: traces, what they say as a whole, and a collapse named."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from persona.methods.persona_fuse.losses import entropy

logger = logging.getLogger(__name__)


def trace(id: str, gate: Tensor, norm: float) -> dict[str, Any]:
    """One query's gate [N] as a row of traces.jsonl: the gate, its experts from the largest on as numbers, the norm of
    the persona embedding before it was normalised, and the gate's entropy in nats."""
    order = gate.argsort(descending=True, stable=True)
    return {
        "id": id,
        "g": [round(value, 6) for value in gate.tolist()],
        "topk": [number for number in order.tolist() if gate[number] > 0],
        "p_norm": round(norm, 6),
        "entropy": round(float(entropy(gate)), 6),
    }


def report(gates: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """What gates [B, N] do against targets [B, N] (`data.targets_of`): n; `accuracy`, the share of queries whose
    largest gate is one they call for (of a neutral one: null; without a null expert neutral queries do not count);
    `complete`, the share of those for which everything called for has a larger gate than everything else; `mass`, the
    mean gate on what is called for; mean `entropy` in nats; by expert the mean gate and the shares of queries for
    which it is the largest (`usage`) and is called for (`called`, split evenly where a query calls for several)."""
    known = targets.sum(-1) > 0
    chosen = gates.argmax(-1)
    right = targets.gather(-1, chosen[:, None])[:, 0] > 0
    wanted = gates.masked_fill(targets <= 0, 2.0).amin(-1)
    complete = wanted > gates.masked_fill(targets > 0, -1.0).amax(-1)
    usage = [float((chosen == number).float().mean()) for number in range(len(names))]
    called = (targets / targets.sum(-1, keepdim=True).clamp(min=1e-9)).mean(0)
    count = max(1, int(known.sum()))
    return {
        "n": len(gates),
        "accuracy": float(right[known].float().sum()) / count,
        "complete": float(complete[known].float().sum()) / count,
        "mass": float((gates * (targets > 0))[known].sum()) / count,
        "entropy": float(entropy(gates).mean()),
        "gate": dict(zip(names, gates.mean(0).tolist(), strict=True)),
        "usage": dict(zip(names, usage, strict=True)),
        "called": dict(zip(names, called.tolist(), strict=True)),
    }


def collapse(found: dict[str, Any]) -> str | None:
    """Whether a `report` shows a collapse, in one sentence: an expert that is the largest for over half of the queries
    and over twice the share that call for it, or experts that never are though one query in 25 calls for them."""
    said = []
    for name, share in found["usage"].items():
        if share > max(0.5, 2 * found["called"][name]):
            said.append(f"{name} takes {share:.0%} of {found['n']} queries ({found['called'][name]:.0%} call for it)")
    idle = [name for name, share in found["usage"].items() if share == 0 and found["called"][name] >= 0.04]
    if idle:
        said.append(f"{', '.join(idle)} never {'has' if len(idle) == 1 else 'have'} the largest gate")
    return f"the router has collapsed: {'; '.join(said)}" if said else None
