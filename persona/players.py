"""From a config to somebody who answers: a local LM under personalizers, an endpoint, or a judge of its own kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import persona
from persona import lm
from persona.config.schemas import RoleConfig
from persona.errors import UserError
from persona.evaluation.endpoints.endpoint import Endpoint, PersonalizedEndpoint
from persona.methods import load_personalizer


def play(role: RoleConfig, name: str, seed: int = 0) -> Any:
    """Whoever `role` says, for the role `name`; None where its kind is "none". `seed` is what a random judge draws
    with. Raises UserError."""
    if role.kind in ("random", "oracle") and name in ("reference", "user_simulator", "teacher"):
        raise UserError(f"{name}.kind={role.kind} is for judges only: choose local or endpoint")
    if role.kind == "local":
        return persona.load(lm.load(role.model), role.personalizers, role.model.batch_size)
    if role.kind == "endpoint":
        return personalized(Endpoint(role.endpoint), role.personalizers, role.model)
    if role.kind == "random":
        from persona.evaluation.judges.judging import random_judge

        return random_judge(seed)
    if role.kind == "oracle":
        from persona.evaluation.judges.oracle import OracleJudge

        return OracleJudge()
    return None


def judges(roles: Mapping[str, RoleConfig]) -> list[Any]:
    """Every judge that is taken, in order; random ones draw each for itself."""
    taken = [(name, role) for name, role in roles.items() if role.kind != "none"]
    return [play(role, name, seed) for seed, (name, role) in enumerate(taken)]


def personalized(endpoint: Endpoint, stack: Sequence[Any], tokenizer: lm.ModelConfig) -> Any:
    """An endpoint under personalizers that act through the prompt. A server does not hand out its tokenizer, so
    token budgets are counted in that of the local model `tokenizer`."""
    if not stack:
        return endpoint
    base = lm.load(tokenizer)
    return PersonalizedEndpoint(endpoint, [load_personalizer(what, base) for what in stack])


def model_settings(base: Any) -> dict[str, Any]:
    """What of a loaded base LM or endpoint makes numbers comparable."""
    if hasattr(base, "identity"):
        return {**base.identity, "dtype": str(base.dtype)}
    return {"endpoint": base.config.model, "base_url": base.config.base_url}


def role_settings(role: RoleConfig) -> dict[str, Any]:
    """What of a role makes numbers comparable; not how fast or at what price it is asked."""
    if role.kind == "local":
        return {"kind": role.kind, "model": role.model.path, "dtype": role.model.dtype, "stack": role.personalizers}
    if role.kind == "endpoint":
        server = {"model": role.endpoint.model, "base_url": role.endpoint.base_url}
        return {"kind": role.kind, **server, "stack": role.personalizers}
    return {"kind": role.kind}
