"""Two answers side by side, shown to every judge in both orders: which is preferred, and by what a place is worth."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from persona.errors import UserError
from persona.evaluation.judges.judging import Judge, Rubric
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Verdict

PAIR_METRICS = {
    "consistent": Metric(description="share of pairs judged alike when the two answers change places"),
    "position_bias": Metric(
        False, description="rate at which the answer shown first is chosen, minus .5 (0: its place counts for nothing)"
    ),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """What the judges make of two answers. Only judges whose verdicts in both orders can be read count.

    `value` is the share preferring the first answer, where a tie or a choice that changes with the order is half;
    `consistent` the share of judges that choose the same answer (or a tie) in both orders; `position_bias` the rate at
    which the answer *shown* first is chosen minus .5, in -.5 to .5 (a tie is half a choice). All three are None when
    no judge counts, and `reason` says why. `verdicts` are all of them: first the ones on the given order, by judge,
    then those on the other.
    """

    value: float | None
    consistent: float | None
    position_bias: float | None
    verdicts: tuple[Verdict, ...]
    reason: str = ""

    @property
    def values(self) -> dict[str, float]:
        """The values of `PAIR_METRICS`; empty when no judge counts."""
        if self.consistent is None or self.position_bias is None:
            return {}
        return {"consistent": self.consistent, "position_bias": self.position_bias}


async def compare(
    judges: Roles | Sequence[Judge],
    rubric: Rubric,
    first: object,
    second: object,
    /,
    *,
    places: tuple[str, str] = ("response_a", "response_b"),
    wins: tuple[float | str, float | str] = ("A", "B"),
    **slots: object,
) -> Pair:
    """Ask each judge which of `first` and `second` is better, once in either order, all at once.

    `places` are the rubric's slots for the answer shown first and second, `wins` the verdicts for them; any other
    verdict of the rubric is a tie. Raises UserError without judges, and for a rubric without these slots or answers.
    """
    panel = judges.judges if isinstance(judges, Roles) else judges
    if not panel:
        raise UserError("there is no judge: choose one with judge=endpoint, say")
    if not set(places) <= rubric.prompt.slots or not set(wins) <= set(rubric.answers):
        raise UserError(
            f"the rubric {rubric.name} compares two answers only with the slots {places[0]} and {places[1]} and the "
            f"answers {wins[0]} and {wins[1]}: it has the slots {', '.join(sorted(rubric.prompt.slots))} and the "
            f"answers {', '.join(map(str, rubric.answers))}"
        )
    orders = ({places[0]: first, places[1]: second}, {places[0]: second, places[1]: first})
    asked = [judge.ask(rubric, **order, **slots) for order in orders for judge in panel]
    verdicts = tuple(await asyncio.gather(*asked))

    def of_shown_first(verdict: Verdict) -> float:
        return {wins[0]: 1.0, wins[1]: 0.0}.get(verdict.value, 0.5)  # type: ignore[arg-type]

    both = list(zip(verdicts[: len(panel)], verdicts[len(panel) :], strict=True))
    readable = [
        (of_shown_first(given), of_shown_first(turned))
        for given, turned in both
        if given.value is not None and turned.value is not None
    ]
    if not readable:
        reasons = dict.fromkeys(verdict.reason for verdict in verdicts if verdict.value is None)
        return Pair(None, None, None, verdicts, f"no judge is readable in both orders: {'; '.join(reasons)}")
    n = len(readable)
    return Pair(
        value=sum((given + 1 - turned) / 2 for given, turned in readable) / n,
        consistent=sum(given == 1 - turned for given, turned in readable) / n,
        position_bias=sum(given + turned for given, turned in readable) / (2 * n) - 0.5,
        verdicts=verdicts,
    )
