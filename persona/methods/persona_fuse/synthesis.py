"""The data stage, Persona-CoT: bare queries become responses with the traits that their situation calls for.

    query → cues → five decisions with reasons → response        one reply of the teacher
          → length → is it safe? → does it show these traits?    filters, the last two by the judge
          → near-duplicate queries → floors of poles and neutral → sft.jsonl

The order cues, traits, response is known of the paper; prompts, filters and numbers are ours
(reference/persona_fuse.md 3.3). The reasoning is kept apart from the response (`cot`) and never learned from.

analyses.jsonl   what the teacher said about each query
checks.jsonl     what the judges said about each response that is not too short or too long
dropped.jsonl    the queries that are left out, each with the reason
sft.jsonl        the rest, in the form of persona/data/situations.py
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from persona.data.situations import POLES, TRAITS, expert_vector
from persona.errors import UserError
from persona.evaluation.generation import fingerprint, generate, seed_of
from persona.evaluation.judges.judging import Rubric, Unreadable, Unscored
from persona.evaluation.judges.parsing import parse_json, parse_yes_no
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Cast, Roles, identity
from persona.evaluation.runner import Processes, place
from persona.files import write_lines
from persona.training.stages import Stage
from persona.types import Conversation, Request, Sample, Sampling

logger = logging.getLogger(__name__)
PROMPTS = Path(__file__).parent / "prompts"
ANALYSIS = Prompt.load(PROMPTS / "analysis.md")
LEVELS = {"high": 1, "none": 0, "low": -1}
SIGNS = {"high": "+", "none": "0", "low": "-"}
SHINGLE = 3  # words
DUPLICATE, COMMON = "nearly the query of another row", "its pattern of traits is too common"


@dataclass
class SynthesisConfig:
    """`min_words`, `max_words` of a response. `agreement`: of how many of the five traits the judge has to see in the
    response what was decided. `overlap`: two queries are near-duplicates when they share at least this much of their
    runs of three words (Jaccard). `pole_floor`: the least share of rows that call for each of the ten poles;
    `neutral_floor`: the least share that calls for nothing. All of these are defaults of ours."""

    min_words: int = 1
    max_words: int = 400
    agreement: int = 5
    overlap: float = 0.8
    pole_floor: float = 0.03
    neutral_floor: float = 0.15
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 2048


# ---- what teacher and judge say -------------------------------------------------------------------------------------


def shown(messages: Conversation) -> str:
    """A query as it stands in prompts: its text, or each turn behind who says it."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def read_analysis(text: str) -> tuple[dict[str, int], str, str]:
    """Traits (letter -> -1, 0, 1), reasoning and response of a teacher's reply. Raises Unreadable."""
    found = parse_json(text)
    cues, decided, response = found.get("cues"), found.get("traits"), found.get("response")
    if not isinstance(cues, dict) or not isinstance(decided, dict):
        raise Unreadable("the JSON has no cues or no traits")
    if not isinstance(response, str) or not response.strip():
        raise Unreadable("the JSON has no response")
    traits, reasons = {}, [f"{name}: {cue}" for name, cue in cues.items()]
    for trait in TRAITS:
        entry = decided.get(trait)
        if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str):
            raise Unreadable(f"the JSON gives no level and reason for {trait}")
        level = _level(entry.get("level"), trait)
        traits[trait] = LEVELS[level]
        reasons.append(f"{trait}, {level}: {entry['reason']}")
    return traits, "\n".join(reasons), response.strip()


def _level(word: object, trait: str) -> str:
    known = word.strip().casefold() if isinstance(word, str) else ""
    if known not in LEVELS:
        raise Unreadable(f"the level of {trait} is {word!r:.30}, which should be high, low or none")
    return known


def signs(levels: Mapping[str, str]) -> str:
    """One sign for each trait: "+0-00". Raises Unreadable for a level that is none."""
    return "".join(SIGNS[_level(levels.get(trait), trait)] for trait in TRAITS)


def _levels(answer: float | str) -> str:
    words = {sign: word for word, sign in SIGNS.items()}
    return json.dumps({trait: words[sign] for trait, sign in zip(TRAITS, str(answer), strict=True)})


SHOWN = Rubric.load(
    PROMPTS / "shown_traits.md",
    lambda reply: signs(parse_json(reply)),
    tuple(map("".join, product(SIGNS.values(), repeat=len(TRAITS)))),
    128,
    _levels,
)
SAFE = Rubric.load(PROMPTS / "safe.md", lambda reply: "yes" if parse_yes_no(reply) else "no", ("no", "yes"), 16)


async def analyse(item: tuple[str, Conversation], roles: Roles, config: SynthesisConfig, seed: int) -> dict[str, Any]:
    """The teacher on one query: {"traits", "cot", "response"}. Raises Unscored where its reply cannot be read."""
    name, messages = item
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, seed=seed_of(seed, "analysis", name))
    reply = await roles.model.respond(Request(ANALYSIS.messages(query=shown(messages)), sampling=sampling))
    try:
        traits, cot, response = read_analysis(reply.text)
    except Unreadable as error:
        raise Unscored(f"the teacher's reply: {error}", reply.text) from error
    return {"traits": traits, "cot": cot, "response": response}


async def check(item: Mapping[str, Any], roles: Roles, agreement: int) -> dict[str, Any]:
    """The judges on one response: {"refused": why, "" where nothing is wrong}. Raises Unscored for a verdict that
    cannot be read."""
    asked = {"query": item["query"], "response": item["response"]}
    for verdict in await roles.judge(SAFE, **asked):
        if verdict.value is None:
            raise Unscored(f"the judge on safety: {verdict.reason}", verdict.raw, failed=verdict.failed)
        if verdict.value == "yes":
            return {"refused": "the response could do harm"}
    for verdict in await roles.judge(SHOWN, **asked):
        if verdict.value is None:
            raise Unscored(f"the judge on traits: {verdict.reason}", verdict.raw, failed=verdict.failed)
        decided = ["0+-"[level] for level in item["traits"].values()]
        if sum(map(str.__eq__, decided, str(verdict.value))) < agreement:
            return {"refused": "the judge sees other traits than were decided", "seen": verdict.value}
    return {"refused": ""}


# ---- what is left out -----------------------------------------------------------------------------------------------


def near_duplicates(texts: Sequence[str], overlap: float) -> dict[int, int]:
    """Place of each text that is too much like an earlier one, with the place of the first such one that is kept.

    Two texts are too much alike when the Jaccard index of their runs of three words (of all their words where they
    are shorter) is at least `overlap`. Exact: candidates come from the rarest runs of each text, one of which two such
    texts must share (prefix filtering).
    """
    runs = [_runs(text) for text in texts]
    common = Counter(run for own in runs for run in own)
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    found: dict[int, int] = {}
    for number, own in enumerate(runs):
        rarest = sorted(own, key=lambda run: (common[run], run))
        # Of n runs at least n·overlap have to be shared, so that one of the first n - ceil(n·overlap) + 1 is.
        prefix = rarest[: len(own) - math.ceil(len(own) * overlap - 1e-9) + 1]
        candidates = sorted({other for run in prefix for other in index[run]})
        alike = [other for other in candidates if len(own & runs[other]) >= overlap * len(own | runs[other])]
        if alike:
            found[number] = alike[0]
            continue
        for run in prefix:
            index[run].append(number)
    return found


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def stratified(
    rows: Sequence[Mapping[str, Any]], pole_floor: float, neutral_floor: float, seed: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The rows to keep, so that each pole is called for by at least the share `pole_floor` of them and at least
    `neutral_floor` call for nothing, and those left out, both in their order.

    Rows of the commonest pattern go first, by turns, as long as they help: those that call for a pole which is short
    stay. Raises UserError, naming what is short, where leaving out does not help.
    """
    patterns: dict[tuple[float, ...], list[str]] = defaultdict(list)
    for row in rows:
        patterns[expert_vector(row["traits"])].append(row["id"])
    for vector, ids in patterns.items():
        random.Random(seed_of(seed, "stratified", vector)).shuffle(ids)
    out: set[str] = set()
    while True:
        sizes = {vector: len(ids) for vector, ids in patterns.items()}
        total = sum(sizes.values())
        calling = [sum(n for vector, n in sizes.items() if vector[number]) for number in range(len(POLES))]
        short = [number for number, n in enumerate(calling) if n < pole_floor * total or not n]
        neutral = sizes.get((0.0,) * len(POLES), 0)
        wants_neutral = neutral < neutral_floor * total
        if not short and not wants_neutral:
            break
        spare = [v for v, n in sizes.items() if n and not any(v[number] for number in short)]
        spare = [vector for vector in spare if any(vector) or not wants_neutral]
        if not spare or not all(calling) or (wants_neutral and not neutral):
            lacking = [f"{POLES[number]} ({calling[number]})" for number in short]
            lacking += [f"nothing at all ({neutral})"] * wants_neutral
            raise UserError(
                f"of {len(rows)} annotated queries too few call for {', '.join(lacking)}: add queries that do, or "
                "lower method.synthesis.pole_floor or neutral_floor"
            )
        out.add(patterns[max(spare, key=lambda vector: (sizes[vector], vector))].pop())
    return [row for row in rows if row["id"] not in out], [row for row in rows if row["id"] in out]


def split_of(query: str, seed: int) -> str:
    """train, dev or test, 90 : 5 : 5, by the query's own words: the same in any pool."""
    draw = seed_of(seed, "split", query) / 2**31
    return "train" if draw < 0.9 else "dev" if draw < 0.95 else "test"


# ---- the stage ------------------------------------------------------------------------------------------------------

WRITES = ("analyses.jsonl", "checks.jsonl", "dropped.jsonl", "sft.jsonl")


def stage(
    pool: Sequence[Sample],
    teacher: Any,
    judges: Sequence[Any],
    config: SynthesisConfig,
    seed: int,
    batch_size: int,
    processes: Processes | None = None,
) -> Stage:
    """The stage "synthesis" over the queries of `pool`. Without `judges` the teacher judges itself."""
    judges = list(judges) or [teacher]
    asked = {"teacher": identity(teacher), "prompt": ANALYSIS.hash, "seed": seed, "sampling": _sampling(config)}
    checked = {"judges": [identity(judge) for judge in judges], "prompts": [SAFE.prompt.hash, SHOWN.prompt.hash]}

    def run(folder: Path) -> None:
        """Raises UserError for what `generate` and `stratified` raise, and when no query is left."""
        texts = {sample.id: shown(sample.messages) for sample in pool}
        dropped: list[dict[str, Any]] = []

        def left(rows: Sequence[Mapping[str, Any]], why: Callable[[Mapping[str, Any]], str]) -> list[dict[str, Any]]:
            told = [(row, row.get("reason") or why(row)) for row in rows]
            dropped.extend({"id": row["id"], "reason": reason} for row, reason in told if reason)
            return [dict(row) for row, reason in told if not reason]

        made = generate(
            [(sample.id, (sample.id, sample.messages)) for sample in pool],
            lambda item, roles: analyse(item, roles, config, seed),
            Cast(teacher),
            folder / "analyses.jsonl",
            settings=asked,
            batch_size=batch_size,
            processes=processes,
        )
        rows = left(made, lambda row: _length(row["response"], config))
        items = [(row["id"], {**row, "query": texts[row["id"]]}) for row in rows]
        verdicts = generate(
            items,
            lambda item, roles: check(item, roles, config.agreement),
            Cast(teacher, judges),
            folder / "checks.jsonl",
            settings={**checked, "agreement": config.agreement},
            batch_size=batch_size,
            processes=processes,
        )
        passed = {row["id"] for row in left(verdicts, lambda row: row["refused"])}
        rows = [row for row in rows if row["id"] in passed]
        twice = near_duplicates([texts[row["id"]] for row in rows], config.overlap)
        for later, first in twice.items():
            dropped.append({"id": rows[later]["id"], "reason": DUPLICATE, "of": rows[first]["id"]})
        rows = [row for number, row in enumerate(rows) if number not in twice]
        if not rows:
            raise UserError(
                f"none of {len(pool)} queries is left to learn from ({_reasons(dropped)}): analyses.jsonl "
                f"and checks.jsonl in {folder} have what teacher and judge said"
            )
        kept, spare = stratified(rows, config.pole_floor, config.neutral_floor, seed)
        dropped.extend({"id": row["id"], "reason": COMMON} for row in spare)
        if place(processes)[0] == 0:
            _report(dropped, len(pool))
            write_lines(folder / "dropped.jsonl", dropped)
            write_lines(folder / "sft.jsonl", _sft(kept, {sample.id: sample for sample in pool}, seed))

    settings = {
        "queries": fingerprint([(sample.id, sample.messages) for sample in pool]),
        **asked,
        **checked,
        "config": asdict(config),
    }
    return Stage("synthesis", run, (), WRITES, settings)


def _sampling(config: SynthesisConfig) -> list[float]:
    return [config.max_new_tokens, config.temperature, config.top_p]


def _length(response: str, config: SynthesisConfig) -> str:
    fits = config.min_words <= len(response.split()) <= config.max_words
    return "" if fits else "the response is too short or too long"


def _sft(rows: Sequence[Mapping[str, Any]], pool: Mapping[str, Sample], seed: int) -> Iterator[dict[str, Any]]:
    for row in rows:
        sample = pool[row["id"]]
        yield {
            "id": row["id"],
            "messages": [asdict(message) for message in sample.messages],
            "response": row["response"],
            "cot": row["cot"],
            "traits": row["traits"],
            "expert_vector": list(expert_vector(row["traits"])),
            "source": sample.metadata.get("source", ""),
            "split": split_of(shown(sample.messages), seed),
        }


def _report(dropped: Sequence[Mapping[str, Any]], of: int) -> None:
    if dropped:
        logger.warning("%d of %d queries are left out (%s)", len(dropped), of, _reasons(dropped))


def _reasons(dropped: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{n} × {why}" for why, n in Counter(row["reason"] for row in dropped).most_common())
