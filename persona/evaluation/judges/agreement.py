"""How far the judges of a run agree, and how often each could not be read, from the verdicts in its rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from persona.evaluation.results import Row
from persona.metrics.agreement import Level, cohen_kappa, krippendorff_alpha
from persona.types import Verdict


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the judges of one rubric make of the same questions.

    `n` counts questions that two judges or more answered readably. `alpha` is Krippendorff's over all judges: nominal
    for words, ordinal for whole numbers, interval for numbers with a fraction (`level`). `kappa` is Cohen's of each
    pair on the questions both answered: plain for words, with quadratic weights over the whole numbers from the least
    to the greatest verdict given, None for numbers with a fraction. Both are None where they are not defined (one
    judge, or nothing but equal verdicts). `asked` and `unreadable` are questions per judge, and the share of them
    without a verdict.
    """

    n: int
    level: Level
    alpha: float | None
    kappa: Mapping[tuple[str, str], float | None]
    asked: Mapping[str, int]
    unreadable: Mapping[str, float]


def judge_agreement(rows: Sequence[Row]) -> dict[str, Agreement]:
    """Agreement by rubric, in the order in which rubrics first occur; empty when there are no verdicts.

    A question is a rubric's n-th use within one row (both orders of a pair are two questions). A rubric whose file
    changed between rows is taken apart, as "name (hash)".
    """
    wordings: dict[str, list[str]] = {}
    asked: dict[tuple[str, str], dict[str, dict[tuple[str, int], Verdict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        times: dict[tuple[str, str, str], int] = defaultdict(int)
        for verdict in row.verdicts:
            if verdict.prompt not in wordings.setdefault(verdict.rubric, []):
                wordings[verdict.rubric].append(verdict.prompt)
            use = times[verdict.rubric, verdict.prompt, verdict.judge]
            times[verdict.rubric, verdict.prompt, verdict.judge] += 1
            asked[verdict.rubric, verdict.prompt][verdict.judge][row.id, use] = verdict
    return {
        name if len(wordings[name]) == 1 else f"{name} ({prompt})": _agreement(judges)
        for (name, prompt), judges in asked.items()
    }


def _agreement(judges: Mapping[str, Mapping[tuple[str, int], Verdict]]) -> Agreement:
    said = {
        judge: {question: verdict.value for question, verdict in verdicts.items() if verdict.value is not None}
        for judge, verdicts in judges.items()
    }
    values = {value for answers in said.values() for value in answers.values()}
    numbers = not any(isinstance(value, str) for value in values)
    whole = numbers and all(float(value) == int(value) for value in values)
    level: Level = "ordinal" if whole else "interval" if numbers else "nominal"
    code = {value: float(value) if numbers else float(place) for place, value in enumerate(sorted(values, key=str))}
    questions = list(dict.fromkeys(question for answers in said.values() for question in answers))
    codes = [[code[said[judge][question]] if question in said[judge] else math.nan for question in questions]
             for judge in judges]  # fmt: skip
    ratings = np.array(codes).reshape(len(judges), len(questions))
    scale = range(int(min(values)), int(max(values)) + 1) if whole and values else ()  # type: ignore[type-var, arg-type]
    kappa: dict[tuple[str, str], float | None] = {}
    for one, other in combinations(judges, 2):
        both = [question for question in said[one] if question in said[other]]
        first, second = [said[one][question] for question in both], [said[other][question] for question in both]
        if whole:
            first, second = [int(value) for value in first], [int(value) for value in second]
            kappa[one, other] = _defined(cohen_kappa(first, second, weights="quadratic", labels=scale))
        else:
            kappa[one, other] = None if numbers else _defined(cohen_kappa(first, second))
    return Agreement(
        n=int(((~np.isnan(ratings)).sum(axis=0) >= 2).sum()),
        level=level,
        alpha=_defined(krippendorff_alpha(ratings, level)),
        kappa=kappa,
        asked={judge: len(verdicts) for judge, verdicts in judges.items()},
        unreadable={judge: 1 - len(said[judge]) / len(verdicts) for judge, verdicts in judges.items()},
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
