"""Does a reply show the traits that its situation calls for, and no other? The town's oracle reads them.

    python evaluate.py data=town_situations benchmark=town_traits personalizers=[outputs/x/personalizer]

A situation's reply is right when the five levels it shows (high, low, none) are exactly those called for; a neutral
question's when it shows no trait. A reply outside the town's language shows nothing that could be read: it is wrong,
and `readable` tells how many there were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from persona.benchmarks import BenchmarkConfig
from persona.data.base import People
from persona.data.situations import TRAITS, traits_of
from persona.evaluation.episodes import Benchmark
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.town import oracle
from persona.types import Request, Sample, Sampling, Score


@dataclass
class TownTraitsConfig(BenchmarkConfig):
    """Over the situations of `data`, in `split`."""

    name: str = "town_traits"
    max_new_tokens: int = 48
    split: str = "test"


def f1(description: str, columns: tuple[str, str]) -> Metric:
    return Metric(aggregate="ratio", columns=columns, description=description)


class TownTraits(Benchmark):
    name = "town_traits"
    version = "1"
    metrics = {
        "exact": Metric(
            description="share of situations whose reply shows exactly the traits called for, of all five"
        ),
        "f1": f1("F1 over poles called for and poles shown, in situations", ("hits", "poles")),
        **{
            f"f1_{letter}": f1(f"the same for {trait} alone", (f"hits_{letter}", f"poles_{letter}"))
            for letter, trait in TRAITS.items()
        },
        "neutral": Metric(description="share of neutral questions whose reply shows no trait"),
        "readable": Metric(description="share of replies that are sentences of the town's language"),
    }
    primary = "exact"

    def __init__(self, samples: Sequence[Sample], max_new_tokens: int) -> None:
        self._samples, self.max_new_tokens = samples, max_new_tokens

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def groups(self, sample: Sample) -> Mapping[str, str]:
        kind = sample.metadata.get("kind")
        return {"new": kind} if kind else {}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        request = Request(sample.messages, sample.persona, Sampling(self.max_new_tokens), task=sample.task)
        reply = await roles.model.respond(request)
        return Score(values(reply.text, traits_of(sample)), raw=reply.text)


def values(reply: str, traits: Mapping[str, int]) -> dict[str, float]:
    """What one reply earns where `traits` (letter -> -1, 0 or 1) are called for.

    F1 is 2 · hits / (poles called for + poles shown); `hits_*` holds twice the hits. A reply that shows both poles of
    a trait shows two.
    """
    shown = oracle.trait_levels(reply)
    found = {"readable": float(shown is not None)}
    # None: not shown; 0: both poles are.
    levels = {letter: (shown or {}).get(name) for letter, name in TRAITS.items()}
    if not any(traits.values()):
        return {**found, "neutral": float(shown == {})}
    for letter, called in traits.items():
        level = levels[letter]
        found[f"hits_{letter}"] = 2.0 * (called != 0 and level in (called, 0))
        found[f"poles_{letter}"] = float(called != 0) + (0.0 if level is None else 2.0 if level == 0 else 1.0)
    for column in ("hits", "poles"):
        found[column] = sum(found[f"{column}_{letter}"] for letter in TRAITS)
    exact = shown is not None and all((level or 0) == traits[t] and level != 0 for t, level in levels.items())
    return {**found, "exact": float(exact)}


def build(config: TownTraitsConfig, people: People) -> TownTraits:
    """Raises UserError, when a sample is reached, where the people are no situations."""
    samples = list(people.split(config.split))[: config.limit]
    for sample in samples:
        traits_of(sample)
    return TownTraits(samples, config.max_new_tokens)
