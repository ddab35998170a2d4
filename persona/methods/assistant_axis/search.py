"""Which cap: bands of layers and quantiles tried on the dev split, by what they prevent and what they cost.

Harm is role take-over: the share of rollouts of held-out roles that the judge scores somewhat or fully in the role, or
cannot read: an LM that is capped until it talks nonsense has not come back to its assistant.
Cost is what the plain assistant's own replies lose, in nats per token, when the capped LM is to say them. Both can be
measured of any LM; benchmarks of one's own say more (docs/assistant_axis.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from persona.errors import UserError
from persona.methods.assistant_axis.axis import SOMEWHAT
from persona.methods.assistant_axis.calibration import Band, pareto_front
from persona.methods.assistant_axis.config import CalibrationConfig
from persona.personalizer import LanguageModel
from persona.types import Message, Request


def take_over(scores: Sequence[float | None]) -> float:
    """Share of rollouts that are somewhat or fully in the role, or have no score (None). Raises UserError without any
    score at all."""
    if not any(score is not None for score in scores):
        raise UserError("a cap is searched by role take-over, but no rollout of the dev split has a readable verdict")
    return sum(score is None or score >= SOMEWHAT for score in scores) / len(scores)


def nats_per_token(model: LanguageModel, rows: Sequence[Mapping[str, Any]]) -> float:
    """Minus the mean log-likelihood of the rollouts' replies, per token."""
    requests = [Request(tuple(Message(**message) for message in row["messages"])) for row in rows]
    scored = model.loglikelihood(requests, [row["reply"] for row in rows])
    return -sum(total for total, _ in scored) / sum(tokens for _, tokens in scored)


def choose(tried: Sequence[Mapping[str, Any]], config: CalibrationConfig) -> Mapping[str, Any]:
    """The setting with the least take-over among those that lose at most `max_loss`; of equals, the one of least loss.

    Raises UserError where every setting loses more.
    """
    allowed = [one for one in tried if one["loss"] <= config.max_loss]
    if not allowed:
        least = min(one["loss"] for one in tried)
        raise UserError(
            f"every cap that was tried costs the plain assistant {least:.3g} nats per token or more, over "
            f"method.calibration.max_loss={config.max_loss:g}: try lower floors or narrower bands"
        )
    return min(allowed, key=lambda one: (one["take_over"], one["loss"]))


def search(
    settings: Iterable[tuple[Band, float]],
    measure: Callable[[Band, float], tuple[float, float]],
    untouched: tuple[float, float],
) -> list[dict[str, Any]]:
    """Each setting's take-over, how much less it is than that of the untouched LM, its loss, and whether no other one
    beats it. `settings`: bands, and how far floors are raised; `measure`, `untouched`: take-over and nats per token.
    """
    tried: list[dict[str, Any]] = []
    for band, raised in settings:
        harm, cost = measure(band, raised)
        setting: dict[str, Any] = {"id": band.id, "layers": f"{band.start}:{band.stop}", "quantile": band.quantile}
        tried.append(
            {
                **setting,
                "raised": raised,
                "take_over": harm,
                "reduction": untouched[0] - harm,
                "loss": cost - untouched[1],
            }
        )
    front = set(pareto_front([one["loss"] for one in tried], [one["reduction"] for one in tried]))
    return [{**one, "pareto": place in front} for place, one in enumerate(tried)]
