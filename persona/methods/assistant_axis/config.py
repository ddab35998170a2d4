"""What can be set of the method: how rollouts are drawn, which of them count, where the cap lies, what it does."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CalibrationConfig:
    """Where the cap's floors lie (calibration.py; reference/assistant_axis.md 3.6).

    `layers`: a band with its end excluded, "46:54"; null takes the share of the depth that was best in Qwen3-32B.
    `quantile` of the rollouts' projections, counted on the `quantile_direction`: "negated" as published, where .25 is
    the 75th percentile on the axis itself, or "axis". `raised` lifts the floors further, in lengths of the axis.
    `positions`: all as published, or those of the prompt, the response, or the last ones (persona/lm/edits.py).
    `widths`: where there are any, bands of these widths, a middle at every `every`-th layer, with each of `quantiles`
    and `raises` are tried on the data's dev split. The cap is the one that leaves least role take-over among those
    whose loss of log-likelihood (nats per token of the plain assistant's own replies) is at most `max_loss`.
    """

    layers: str | None = None
    quantile: float = 0.25
    quantile_direction: str = "negated"
    raised: float = 0.0
    positions: str = "all"
    widths: list[int] = field(default_factory=list)
    every: int = 2
    quantiles: list[float] = field(default_factory=lambda: [0.01, 0.25, 0.5, 0.75])
    raises: list[float] = field(default_factory=lambda: [0.0])
    max_loss: float = 0.05


@dataclass
class AssistantAxisConfig:
    """Published values, except where docs/errata.md says so.

    `min_count`: rollouts with a score that a role needs for a vector of it, 10 as in the paper (its code: 50); of a
    trait, pairs. `read`: what a rollout's activation is, the mean over the reply's tokens, as published ("reply"), or
    the state at the prompt's last token, where the reply is begun ("prompt_last"): what a cap has to move there, free
    of the words that are then said (docs/assistant_axis.md). `layer` is where persona space is looked at; null: the
    middle one. `part` ("3/16") makes the rollouts, verdicts, sums and projections of a share of the roles only: tasks
    of an array take one each, and a run without it goes on from what they left. `compat: reference` judges with the
    question that each role's file brings, and reads the reply as the published code does.
    """

    name: str = "assistant_axis"
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    min_count: int = 10
    read: str = "reply"
    layer: int | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    part: str | None = None
    compat: str | None = None
