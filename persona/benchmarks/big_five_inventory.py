"""A Big Five questionnaire: which traits does a model express when it rates 44 sentences as true of itself, 1 to 5?

Source: persona_fuse §7 names the BFI-44, whose items are not ours to copy. The 44 sentences here are our own: eight or
ten for each trait, half of them keyed in reverse, and not validated on people. They show how stacks differ; norms for
people do not apply. Items of one's own (the official ones, say) are a file, one item a line.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from persona.benchmarks import FileBenchmarkConfig
from persona.benchmarks.emobench import MODES
from persona.data.rows import field, read_jsonl
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark, Unscored
from persona.evaluation.judges.parsing import Unreadable, parse_integer
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Persona, Request, Sample, Sampling, Score

TRAITS = {
    "O": "openness", "C": "conscientiousness", "E": "extraversion", "A": "agreeableness", "N": "neuroticism",
}  # fmt: skip
SCALE = ("1", "2", "3", "4", "5")
MIDDLE = 3.0
_ITEMS = Path(__file__).parent / "samples" / "big_five_inventory" / "items.jsonl"
ITEM = Prompt.load(Path(__file__).parent / "prompts" / "big_five_inventory" / "item.md")


@dataclass(frozen=True)
class Item:
    """A sentence about oneself; `reverse`: whoever agrees with it has less of the trait."""

    id: str
    text: str
    trait: str
    reverse: bool


def read_items(path: Path) -> list[Item]:
    """The items of a file, one {id, text, trait, reverse} a line.

    Raises UserError naming the line for a missing field, an id that is there twice, a trait that is none of O, C, E,
    A, N, and a `reverse` that is neither true nor false.
    """
    items: dict[str, Item] = {}
    for number, row, _ in read_jsonl(path):
        where = f"{path}, line {number}"
        id, text, trait = (field(row, name, where) for name in ("id", "text", "trait"))
        if trait not in TRAITS:
            raise UserError(f"{where} has the trait {trait!r}, which should be one of {', '.join(TRAITS)}")
        if not isinstance(row.get("reverse"), bool):
            raise UserError(f"{where} has {row.get('reverse')!r} as reverse, which should be true or false")
        if id in items:
            raise UserError(f"{where} repeats the id {id!r}")
        items[id] = Item(id, text, trait, row["reverse"])
    if not items:
        raise UserError(f"{path} holds no items")
    return list(items.values())


def read_personas(path: Path) -> list[tuple[Persona, dict[str, float]]]:
    """Personas with their traits, one {id, description, traits} a line; `traits` may be left out, as may any of them.

    A trait is from -1 (low) to 1 (high). Raises UserError naming the line for anything else.
    """
    personas: dict[str, tuple[Persona, dict[str, float]]] = {}
    for number, row, _ in read_jsonl(path):
        where = f"{path}, line {number}"
        id, description, given = field(row, "id", where), field(row, "description", where), row.get("traits", {})
        if id in personas:
            raise UserError(f"{where} repeats the id {id!r}")
        if not isinstance(given, dict) or not all(_level(given[key]) and key in TRAITS for key in given):
            raise UserError(f"{where} has {given!r:.80} as traits, which should be O, C, E, A, N from -1 to 1")
        personas[id] = Persona(id, description), {trait: float(value) for trait, value in given.items()}
    if not personas:
        raise UserError(f"{path} holds no personas")
    return list(personas.values())


def _level(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= 1


def keyed(answer: float, reverse: bool) -> float:
    """An answer from 1 to 5 in the direction of the trait."""
    return 2 * MIDDLE - answer if reverse else answer


@dataclass
class BigFiveInventoryConfig(FileBenchmarkConfig):
    """`path`: items of one's own. `personas`: a file of personas, each of whom answers all items; a personalizer
    brings the persona (`personalizers=[description]`, say), the prompt does not. Null asks the stack itself.

    `mode`: "text" reads the number that the model writes; "likelihood" takes the mean of 1 to 5 under its
    probabilities of them. `limit` takes the first items.
    """

    name: str = "big_five_inventory"
    max_new_tokens: int = 16
    personas: str | None = None
    mode: str = "text"


class BigFiveInventory(Benchmark):
    """A sample is one item, asked of one persona or of nobody in particular. `keyed` is read by trait: over all items
    it says little. Agreeing with everything moves no trait, as keys are balanced here; `acquiescence` shows it."""

    name = "big_five_inventory"
    version = "1"
    primary = "keyed"
    prompts = (ITEM,)

    def __init__(self, config: BigFiveInventoryConfig) -> None:
        if config.compat is not None:
            raise UserError(f"benchmark.compat={config.compat}: there is no published code to agree with")
        if config.mode not in MODES:
            raise UserError(f"benchmark.mode={config.mode} is unknown; it should be {' or '.join(MODES)}")
        self.config = config
        items = read_items(Path(config.path).expanduser() if config.path else _ITEMS)[: config.limit]
        people: list[tuple[Persona | None, dict[str, float]]] = [(None, {})]
        if config.personas:
            people = list(read_personas(Path(config.personas).expanduser()))
        self._asked: dict[str, tuple[Item, dict[str, float]]] = {}
        self._samples = []
        for persona, traits in people:
            for item in items:
                id = item.id if persona is None else f"{persona.id}-{item.id}"
                self._asked[id] = item, traits
                messages = ITEM.messages(statement=item.text)
                self._samples.append(Sample(id, messages, persona=persona, options=SCALE, task=item.trait))
        self._clustered = len(people) > 1
        self.metrics = {
            "keyed": Metric(description="mean answer in the direction of the item's trait, 1 to 5: read it by trait"),
            **{trait: Metric(description=f"{name}: mean keyed answer, 1 to 5") for trait, name in TRAITS.items()},
            "acquiescence": Metric(
                aggregate="group_mean",
                columns=("excess", "reverse"),
                classes=2,
                description="answer minus 3 whatever the item says, items keyed either way weighing alike; 0 is none",
            ),
        }
        if any(traits for _, traits in people):
            self.metrics["as_described"] = Metric(
                description="keyed answer in the direction of the persona's own trait, -1 to 1; 0 is no trace of it"
            )

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        """The persona, where there are several; else the item."""
        return sample.persona.id if self._clustered and sample.persona else sample.id

    def groups(self, sample: Sample) -> Mapping[str, str]:
        trait = {"trait": f"{sample.task} {TRAITS[sample.task]}"}
        return trait | ({"persona and trait": f"{sample.persona.id} {sample.task}"} if sample.persona else {})

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        item, traits = self._asked[sample.id]
        answer, raw = await self._answer(sample, roles)
        value = keyed(answer, item.reverse)
        values = {"keyed": value, item.trait: value, "excess": answer - MIDDLE, "reverse": float(item.reverse)}
        if own := traits.get(item.trait):
            values["as_described"] = (1 if own > 0 else -1) * (value - MIDDLE) / 2
        return Score(values, raw=raw)

    async def _answer(self, sample: Sample, roles: Roles) -> tuple[float, str]:
        """A number from 1 to 5, and what the model said. Raises Unscored."""
        sampling = Sampling(self.config.max_new_tokens, seed=self.config.seed)
        request = Request(sample.messages, sample.persona, sampling, options=sample.options)
        if self.config.mode == "likelihood":
            shares = softmax(np.array(await roles.model.choose(request), dtype=np.float64))
            said = ", ".join(f"{number}: {share:.3f}" for number, share in zip(SCALE, shares, strict=True))
            return float(shares @ np.arange(1, 6)), said
        reply = (await roles.model.respond(request)).text
        try:
            return float(parse_integer(reply, 1, 5)), reply
        except Unreadable as error:
            raise Unscored(str(error), raw=reply) from None

    def constant(self, sample: Sample) -> str:
        """The middle of the scale."""
        return f"{MIDDLE:g}"

    def chance(self, sample: Sample, rng: random.Random) -> str:
        return rng.choice(SCALE)


def build(config: BigFiveInventoryConfig) -> BigFiveInventory:
    """The benchmark of a config. Raises UserError for a file that is missing or malformed."""
    return BigFiveInventory(config)
