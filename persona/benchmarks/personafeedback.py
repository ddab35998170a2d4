"""PersonaFeedback: of two answers to a user's question, which one suits this user better, as people judged?

Tao et al. 2025, arXiv 2506.12915. The model that is measured chooses, every pair in both orders. No code was
published; what `compat: reference` reproduces is the only public loader, which asks once and puts the better answer
first in every other row (personafeedback note 5), so that whoever counts along is always right.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from persona.benchmarks import FileBenchmarkConfig
from persona.benchmarks.personaeval import official_file
from persona.data.rows import field, first_few, read_jsonl
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark, Unscored
from persona.evaluation.judges.parsing import Unreadable, parse_choice
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Conversation, Message, Persona, Request, Sample, Sampling, Score

log = logging.getLogger(__name__)

FOLDERS = {"general": "general", "specific": "spedific"}  # question type -> folder, misspelt in the official files
TIERS = ("easy", "medium", "hard")
OFFICIAL_PAIRS = 8298
SECTIONS = ("Demographics", "Personality", "Preference", "Bias")
MODES = ("answer", "likelihood", "reward")
ACCESS = ("profile", "none")
LETTERS = ("A", "B")

_HERE = Path(__file__).parent
_SAMPLE = _HERE / "samples" / "personafeedback"
CHOICE = Prompt.load(_HERE / "prompts" / "personafeedback" / "choice.md")
REPLY = Prompt.load(_HERE / "prompts" / "personafeedback" / "reply.md")


# ---- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """One row: two answers to a user's question. `row` counts from 0 over all six files, in the loader's order."""

    id: str
    type: str
    tier: str
    row: int
    user: str
    question: str
    chosen: str
    rejected: str


def render_profile(profile: Mapping[str, Any]) -> str:
    """A persona's nested JSON as text: sections as headings, entries as bullets, lists of plain values on one line.

    Empty values are left out, underscores in keys become spaces.
    """
    lines: list[str] = []
    for key, value in profile.items():
        if isinstance(value, Mapping | list) and not _plain(value):
            inside = _bullets(value, 0)
            lines += [f"{_key(key)}:", *inside] if inside else []
        elif text := _plain(value):
            lines.append(f"{_key(key)}: {text}")
    return "\n".join(lines)


def _key(text: str) -> str:
    return str(text).replace("_", " ").strip()


def _plain(value: Any) -> str:
    """A value that fits on a line; empty for one that has parts of its own, and for one that is empty."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | float):
        return str(value).strip()
    if isinstance(value, list) and not any(isinstance(entry, Mapping | list) for entry in value):
        texts = [text for text in map(_plain, value) if text]
        return ("; " if any("," in text for text in texts) else ", ").join(texts)
    return ""


def _bullets(value: Any, depth: int) -> list[str]:
    entries = value.items() if isinstance(value, Mapping) else ((None, entry) for entry in value)
    lines = []
    for key, entry in entries:
        start = "  " * depth + "- " + ("" if key is None else f"{_key(key)}: ")
        if text := _plain(entry):
            lines.append(start + text)
        elif isinstance(entry, Mapping | list) and (inside := _bullets(entry, depth + (key is not None))):
            lines += inside if key is None else [start.rstrip(), *inside]
    return lines


def read_profiles(path: Path | str) -> dict[str, str]:
    """Rendered personas by user id, which is the number of the line, counted from 1.

    Raises UserError naming the line for a missing section or an empty persona.
    """
    profiles = {}
    for number, row, _ in read_jsonl(Path(path)):
        where = f"{path}, line {number}"
        if missing := [key for key in ("Name", *SECTIONS) if key not in row]:
            raise UserError(f"{where} has no {', '.join(missing)}; its fields are {', '.join(row) or '(none)'}")
        profiles[str(number)] = render_profile(row)
        if not profiles[str(number)]:
            raise UserError(f"{where} is a persona without any content")
    if not profiles:
        raise UserError(f"{path} holds no personas")
    return profiles


def read_pairs(path: Path | str, type: str, tier: str, start: int = 0) -> list[Pair]:
    """The pairs of one file; `start` is the row that its first one is. Raises UserError naming line and field."""
    pairs: list[Pair] = []
    for number, row, _ in read_jsonl(Path(path)):
        where = f"{path}, line {number}"
        names = ("user_id", "question", "chosen", "reject")
        if missing := [name for name in names if name not in row]:
            raise UserError(f"{where} has no field {', '.join(missing)}; its fields are {', '.join(row) or '(none)'}")
        user, question, chosen, rejected = (field(row, name, where).strip() for name in names)
        for name, text in zip(names, (user, question, chosen, rejected), strict=True):
            if not text:
                raise UserError(f"{where} has an empty {name}")
        id, place = f"{type}-{tier}-{number}", start + len(pairs)
        pairs.append(Pair(id, type, tier, place, user, question, chosen, rejected))
    if not pairs:
        raise UserError(f"{path} holds no rows")
    return pairs


def read_folder(place: str) -> tuple[list[Pair], dict[str, str]]:
    """All pairs and rendered personas of a folder, or a data set of the hub, in the official layout.

    Raises UserError for a user id without persona, and as the readers of its files do; a number of pairs that is not
    the official one is a warning that names what there is.
    """
    pairs: list[Pair] = []
    profiles = read_profiles(official_file(place, "persona/all_personas.jsonl"))
    for type, folder in FOLDERS.items():
        for tier in TIERS:
            pairs += read_pairs(official_file(place, f"data/{folder}/{tier}.jsonl"), type, tier, len(pairs))
    if unknown := [pair for pair in pairs if pair.user not in profiles]:
        named = first_few([f"{pair.user} in {pair.id}" for pair in unknown])
        raise UserError(
            f"{place} has pairs of users without persona: {named}; a user id is the number of a line of "
            f"persona/all_personas.jsonl, which has {len(profiles)}"
        )
    if same := [pair.id for pair in pairs if pair.chosen == pair.rejected]:
        log.warning("%s holds %d pairs of two equal answers: %s", place, len(same), first_few(same))
    if place != str(_SAMPLE) and len(pairs) != OFFICIAL_PAIRS:
        counts = Counter(f"{pair.type} {pair.tier}" for pair in pairs)
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        log.warning("%s holds %d pairs (%s); the official data have %d", place, len(pairs), found, OFFICIAL_PAIRS)
    return pairs, profiles


# ---- choices -------------------------------------------------------------------------------------------------------


def chosen_first(pair: Pair, seed: int, compat: str | None = None) -> bool:
    """Whether the better answer is shown first: drawn by the pair's id, so that places follow no pattern.

    compat="reference": in every other row.
    """
    if compat == "reference":
        return pair.row % 2 == 0
    return hashlib.sha256(f"{seed}-{pair.id}".encode()).digest()[0] % 2 == 0


def read_choice(reply: str) -> str | None:
    """ "A", "B", or None where the reply cannot be read."""
    try:
        return parse_choice(reply, LETTERS)
    except Unreadable:
        return None


def preferred(first: float, second: float) -> str:
    """ "A" or "B" for the larger of two scores, "tie" for equal ones. Raises Unscored when one is not a number."""
    if math.isnan(first) or math.isnan(second):
        raise Unscored("the likelihood of an answer is not a number")
    return "A" if first > second else "B" if second > first else "tie"


def order_values(choices: Sequence[str | None], truths: Sequence[str]) -> dict[str, float]:
    """What one pair earns from its choices ("A", "B", "tie" or None for unreadable), given where the better answer
    stood each time. One order, or both: `truths` are then ("A", "B") or ("B", "A").

    accuracy: mean over orders, a tie is half right, unreadable is wrong. invalid: share of unreadable replies. With
    both orders: accuracy_one_order (the first), strict_accuracy (right in both), and where both could be read and
    neither was a tie, consistency (the same answer in both), always_first and always_second (the same place in both).
    """
    right = [0.5 if choice == "tie" else float(choice == truth) for choice, truth in zip(choices, truths, strict=True)]
    values = {"accuracy": sum(right) / len(right), "invalid": choices.count(None) / len(choices)}
    if len(choices) == 2:
        values |= {"accuracy_one_order": right[0], "strict_accuracy": float(right == [1.0, 1.0])}
        if set(choices) <= set(LETTERS):
            same_place = choices[0] == choices[1]
            values |= {
                "consistency": float(not same_place),
                "always_first": float(same_place and choices[0] == "A"),
                "always_second": float(same_place and choices[0] == "B"),
            }
    return values


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass
class PersonaFeedbackConfig(FileBenchmarkConfig):
    """`path`: a folder with data/<type>/<tier>.jsonl and persona/all_personas.jsonl, or the hub's data set
    PersonalAILab/PersonaFeedback. `limit` takes rows of all six files in turn. `seed` draws the orders.

    `mode`: "answer" reads the letter that the model writes, "likelihood" compares log p of the letters, "reward"
    compares the mean log p per token of the two answers as replies to the question. `access`: whether the prompt holds
    the persona (profile) or leaves it to the personalizers that are measured (none).
    """

    name: str = "personafeedback"
    max_new_tokens: int = 512
    mode: str = "answer"
    access: str = "profile"


class PersonaFeedback(Benchmark):
    """The prompt of a sample is the first of its two orders. A personalizer finds the rendered persona as description
    of the sample's persona, whatever `access` is."""

    name = "personafeedback"
    version = "1"
    primary = "accuracy"
    prompts = (CHOICE, REPLY)

    def __init__(self, config: PersonaFeedbackConfig) -> None:
        for key, value, known in (("mode", config.mode, MODES), ("access", config.access, ACCESS)):
            if value not in known:
                raise UserError(f"benchmark.{key}={value} is unknown; it should be one of {', '.join(known)}")
        self.config = config
        pairs, profiles = read_folder(str(_SAMPLE) if config.path is None else config.path)
        files: dict[tuple[str, str], list[Pair]] = {}
        for pair in pairs:
            files.setdefault((pair.type, pair.tier), []).append(pair)
        if config.limit is not None:  # of every file about as many, rather than all of the first one
            in_turn = [pair for rows in zip_longest(*files.values()) for pair in rows if pair is not None]
            pairs = sorted(in_turn[: config.limit], key=lambda pair: pair.row)
        self._pairs = {pair.id: pair for pair in pairs}
        self._counts = Counter((pair.type, pair.tier) for pair in pairs)
        self._personas = {user: Persona(user, description=text) for user, text in profiles.items()}
        self.metrics = self._metrics()
        self._samples = [self._sample(pair) for pair in pairs]

    def _metrics(self) -> dict[str, Metric]:
        both = self.config.compat != "reference" and self.config.mode != "reward"
        shown = {"accuracy": Metric(description="share of choices of the better answer; a tie is half right")}
        if both:
            shown |= {
                "accuracy_one_order": Metric(description="accuracy in the first of the two orders alone"),
                "strict_accuracy": Metric(description="share of pairs with the better answer in both orders"),
                "consistency": Metric(description="share of readable pairs with the same answer in both orders"),
                "always_first": Metric(
                    higher_is_better=False, description="share of readable pairs with the first place in both orders"
                ),
                "always_second": Metric(
                    higher_is_better=False, description="share of readable pairs with the second place in both orders"
                ),
            }
        if self.config.mode == "answer":
            shown["invalid"] = Metric(
                higher_is_better=False, description="share of replies that name no letter, or both; they are wrong"
            )
        for type in dict.fromkeys(type for type, _ in self._counts):
            shown[f"{type}_avg_macro"] = Metric(
                aggregate="ratio",
                columns=(f"{type}_weighted", f"{type}_weight"),
                description=f"accuracy on {type} questions, mean over tiers (a pair: 1 / pairs of its tier)",
            )
            shown[f"{type}_avg_micro"] = Metric(
                columns=(f"{type}_accuracy",), description=f"accuracy on {type} questions, mean over pairs"
            )
        return shown

    def _choice(self, pair: Pair, better_first: bool) -> Conversation:
        first, second = (pair.chosen, pair.rejected) if better_first else (pair.rejected, pair.chosen)
        persona = self._personas[pair.user].description if self.config.access == "profile" else ""
        return CHOICE.messages(persona=persona, question=pair.question, first=first, second=second)

    def _sample(self, pair: Pair) -> Sample:
        better_first = chosen_first(pair, self.config.seed, self.config.compat)
        persona = self._personas[pair.user]
        if self.config.mode != "reward":
            target = LETTERS[0 if better_first else 1]
            return Sample(pair.id, self._choice(pair, better_first), target, persona, LETTERS)
        if self.config.access == "profile":
            messages = REPLY.messages(persona=persona.description, question=pair.question)
        else:
            messages = (Message("user", pair.question),)
        options = (pair.chosen, pair.rejected) if better_first else (pair.rejected, pair.chosen)
        return Sample(pair.id, messages, pair.chosen, persona, options)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def groups(self, sample: Sample) -> Mapping[str, str]:
        pair = self._pairs[sample.id]
        return {"type": pair.type, "tier": pair.tier, "type and tier": f"{pair.type} {pair.tier}"}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        pair = self._pairs[sample.id]
        if self.config.mode == "reward":
            values, raw = await self._reward(sample, roles)
        else:
            orders = [sample.target == "A"]
            if self.config.compat != "reference":
                orders.append(not orders[0])
            asked = (self._ask(pair, better_first, roles) for better_first in orders)
            choices, replies = zip(*await asyncio.gather(*asked), strict=True)
            values = order_values(choices, ["A" if better_first else "B" for better_first in orders])
            raw = "\n\n[the other order]\n".join(replies)
        if self.config.mode != "answer":
            del values["invalid"]
        weight = 1 / self._counts[pair.type, pair.tier]
        averages = {
            f"{pair.type}_accuracy": values["accuracy"],
            f"{pair.type}_weighted": values["accuracy"] * weight,
            f"{pair.type}_weight": weight,
        }
        return Score(values | averages, raw=raw)

    async def _ask(self, pair: Pair, better_first: bool, roles: Roles) -> tuple[str | None, str]:
        """The choice in one order, and what the model said."""
        messages, persona = self._choice(pair, better_first), self._personas[pair.user]
        if self.config.mode == "likelihood":
            logps = await roles.model.choose(Request(messages, persona, options=LETTERS))
            choice = preferred(*logps)
            return choice, f"{choice} (log p {logps[0]:.4g}, {logps[1]:.4g})"
        reply = (await roles.model.respond(Request(messages, persona, Sampling(self.config.max_new_tokens)))).text
        return read_choice(reply), reply

    async def _reward(self, sample: Sample, roles: Roles) -> tuple[dict[str, float], str]:
        request = Request(sample.messages, sample.persona, options=sample.options)
        options = sample.options or ()
        if roles.model.likelihoods:
            found = await asyncio.gather(*(roles.model.loglikelihood(request, option) for option in options))
            scores = [total / tokens for total, tokens in found]
        else:  # a constant or random answer can still choose; an endpoint says why it cannot
            scores = await roles.model.choose(request)
        choice = preferred(scores[0], scores[1])
        values = order_values([choice], ["A" if options[0] == sample.target else "B"])
        return values, choice if choice == "tie" else options[LETTERS.index(choice)]


def build(config: PersonaFeedbackConfig) -> PersonaFeedback:
    return PersonaFeedback(config)
