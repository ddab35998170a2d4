"""Third stage: rows that say whether a statement bears on a query, and what a reply does to it, labelled by a judge.

The judge is what GPT-4 was (reference/apc.md 3.3). Counts per statement as published: 3 own queries and 5 others for
relevance; for each own query three replies and 3 of other statements for NLI. Every reply is labelled, also one that
was written to a label.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.evaluation.judges import apc as judging
from persona.evaluation.judges.judging import Unreadable, Unscored
from persona.evaluation.judges.parsing import parse_json
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.methods.apc.characters import Character
from persona.methods.apc.config import APCConfig, DiscriminatorConfig
from persona.methods.statements import Statements
from persona.types import Request, Sampling

RESPONSES = Prompt.load(Path(__file__).parent / "prompts" / "responses.md")
TRAIN, DEV, HELD_OUT = "train", "dev", "held_out"
SHOWN_BESIDE = 4  # further statements in the prompt of a sampled reply


@dataclass(frozen=True)
class Item:
    """A statement of a character and a query, and perhaps a reply."""

    character: str  # id
    name: str
    statement: str
    query: str
    response: str = ""


def split_of(statement: str, config: DiscriminatorConfig, seed: int) -> str:
    """Which split the rows of a statement ("owner/statement") belong to, by its hash: no statement is in two."""
    place = seed_of(seed, "held out", statement) / 2**31
    return HELD_OUT if place < config.held_out else DEV if place < config.held_out + config.dev else TRAIN


# ---- relevance -----------------------------------------------------------------------------------------------------


def relevance_items(
    character: Character, queries: Mapping[str, Sequence[str]], config: APCConfig, seed: int
) -> list[tuple[str, Item]]:
    """What the judge is asked about relevance, by name. `queries`: those of each statement.

    Queries that were written for a statement are not asked about. Queries of the data belong to no statement: each
    statement meets `queries_per_statement` + `others` of them.
    """
    statements = list(queries)
    found = []
    for number, statement in enumerate(statements):
        rng = random.Random(seed_of(seed, "relevance", character.id, statement))
        if config.queries == "data":
            count = min(len(character.questions), config.queries_per_statement + config.others)
            asked = rng.sample(character.questions, count)
        else:
            others = [other for other in statements if other != statement and queries[other]]
            chosen = rng.sample(others, min(len(others), config.others))
            asked = list(dict.fromkeys(rng.choice(list(queries[other])) for other in chosen))
        found += [
            (f"{character.id}/{number}/{place}", Item(character.id, character.name, statement, query))
            for place, query in enumerate(asked)
        ]
    return found


async def judge_relevance(item: Item, roles: Roles) -> Mapping[str, Any]:
    """The judge's "yes" or "no". Raises Unscored where it cannot be read."""
    (verdict,) = await roles.judge(judging.RELEVANCE, character=item.name, statement=item.statement, query=item.query)
    if verdict.value is None:
        raise Unscored(verdict.reason, verdict.raw)
    return {"of": item.character, **_about(item), "relevant": verdict.value}


def _about(item: Item) -> dict[str, str]:
    return {"character": item.name, "statement": item.statement, "query": item.query}


# ---- replies -------------------------------------------------------------------------------------------------------


def own_queries(
    character: Character,
    queries: Mapping[str, Sequence[str]],
    relevance: Sequence[Mapping[str, Any]],
    config: APCConfig,
) -> list[tuple[str, Item]]:
    """(statement, query) pairs that replies are made for, by name: queries written for the statement, or, of the
    data's own, those that the judge found relevant."""
    found = []
    for number, statement in enumerate(queries):
        own: Sequence[str] = queries[statement]
        if config.queries == "data":
            own = [r["query"] for r in relevance if r["statement"] == statement and r["relevant"] == "yes"]
        found += [
            (f"{character.id}/{number}/{place}", Item(character.id, character.name, statement, query))
            for place, query in enumerate(own[: config.queries_per_statement])
        ]
    return found


async def write_responses(item: tuple[str, Item], roles: Roles, seed: int) -> Mapping[str, Any]:
    """An entailed, a neutral and a contradicted reply, as the teacher writes them."""
    name, about = item
    slots = {"character": about.name, "statement": about.statement, "query": about.query}
    sampling = Sampling(512, temperature=1.0, seed=seed_of(seed, "responses", name))
    reply = await roles.model.respond(Request(RESPONSES.messages(**slots), sampling=sampling))
    try:
        written = parse_json(reply.text)
    except Unreadable as error:
        raise Unscored(str(error), reply.text) from error
    responses = [written.get(label) for label in judging.NLI_LABELS]
    if not all(isinstance(response, str) and response.strip() for response in responses):
        raise Unscored(f"the JSON does not give a text for each of {', '.join(judging.NLI_LABELS)}", reply.text)
    return {"of": about.character, **_about(about), "responses": responses}


async def sample_responses(
    item: tuple[str, Item],
    roles: Roles,
    character: Character,
    statements: Sequence[str],
    prompter: Statements,
    config: APCConfig,
    seed: int,
) -> Mapping[str, Any]:
    """Three replies of the LM: with the statement among others in the prompt, with others alone, and with none."""
    name, about = item
    rng = random.Random(seed_of(seed, "shown", name))
    others = [statement for statement in statements if statement != about.statement]
    beside = rng.sample(others, min(len(others), SHOWN_BESIDE))
    place = rng.randint(0, len(beside))
    shown = ((*beside[:place], about.statement, *beside[place:]), tuple(beside), ())
    responses = []
    for number, some in enumerate(shown):
        sampling = Sampling(config.max_new_tokens, config.temperature, seed=seed_of(seed, "responses", name, number))
        request = Request(character.ask(about.query), replace(character.persona, statements=some), sampling)
        (prompted,) = prompter.prompt([request])
        responses.append((await roles.model.respond(prompted)).text.strip())
    return {"of": about.character, **_about(about), "responses": responses}


# ---- inference -----------------------------------------------------------------------------------------------------


def nli_items(
    rows: Sequence[Mapping[str, Any]], bare: Sequence[Item], count: int, seed: int
) -> list[tuple[str, Item]]:
    """What the judge is asked about replies, by name: those made for a (statement, query), and `count` others.

    `rows` are those of replies; `bare` are (statement, query) pairs that got none, and meet others' alone. Half of the
    others answer the same query, where others were asked it: the hardest to tell apart. The rest is drawn at random.
    """
    replies = [(row["query"], response) for row in rows for response in row["responses"] if response]
    same: dict[str, list[tuple[str, str]]] = {}
    for pair in replies:
        same.setdefault(pair[0], []).append(pair)
    found: list[tuple[str, Item]] = []
    own = [(Item(r["of"], r["character"], r["statement"], r["query"]), r["responses"]) for r in rows]
    for item, responses in (*own, *((item, []) for item in bare)):
        rng = random.Random(seed_of(seed, "others", item.character, item.statement, item.query))
        pairs = [(item.query, response) for response in responses]
        alike = [pair for pair in dict.fromkeys(same.get(item.query, ())) if pair not in pairs]
        drawn = rng.sample(alike, min(len(alike), (count + 1) // 2))
        drawn += rng.sample(replies, min(len(replies), 2 * count + len(pairs)))
        elsewhere = [pair for pair in dict.fromkeys(drawn) if pair not in pairs]
        asked = [pair for pair in dict.fromkeys((*pairs, *elsewhere[:count])) if pair[1]]
        found += [
            (f"{item.character}/{item.statement}/{item.query}/{n}", replace(item, query=query, response=response))
            for n, (query, response) in enumerate(asked)
        ]
    return found


async def judge_nli(item: Item, roles: Roles) -> Mapping[str, Any]:
    """The judge's label. Raises Unscored where it cannot be read."""
    (verdict,) = await roles.judge(
        judging.NLI, character=item.name, statement=item.statement, query=item.query, response=item.response
    )
    if verdict.value is None:
        raise Unscored(verdict.reason, verdict.raw)
    return {"of": item.character, **_about(item), "response": item.response, "label": verdict.value}


# ---- as scoring meets them -----------------------------------------------------------------------------------------


def natural_items(
    character: Character, statements: Sequence[str], rows: Sequence[Mapping[str, Any]], config: APCConfig, seed: int
) -> list[tuple[str, Item]]:
    """For each statement that no discriminator is trained on, `natural` replies of the same character to any query,
    drawn at random: shares of classes are what they are where replies are scored against all statements."""
    own = [(row["query"], response) for row in rows if row["of"] == character.id for response in row["responses"]]
    replies = sorted({pair for pair in own if pair[1]})
    found = []
    for statement in statements:
        if split_of(f"{character.id}/{statement}", config.discriminator, seed) == TRAIN:
            continue
        rng = random.Random(seed_of(seed, "natural", character.id, statement))
        found += [
            (f"{character.id}/{statement}/{n}", Item(character.id, character.name, statement, query, response))
            for n, (query, response) in enumerate(rng.sample(replies, min(len(replies), config.natural)))
        ]
    return found


async def judge_natural(item: Item, roles: Roles) -> Mapping[str, Any]:
    """Both of the judge's labels. Raises Unscored where one cannot be read."""
    relevance, label = await asyncio.gather(judge_relevance(item, roles), judge_nli(item, roles))
    return {**relevance, **label}


def readable(rows: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The rows that could be read, without their ids. Raises UserError when there were rows and none can be."""
    kept = [{key: value for key, value in row.items() if key != "id"} for row in rows if "reason" not in row]
    if rows and not kept:
        raise UserError(
            f"none of {len(rows)} replies {what} could be read: {rows[0]['reason']} "
            f"(the first is {rows[0]['raw']!r:.120})"
        )
    return kept


def one_judge(judges: Sequence[Any]) -> list[Any]:
    """Raise UserError unless there is exactly one judge."""
    if len(judges) != 1:
        told = "none is given: choose one with judge=endpoint, say" if not judges else f"{len(judges)} are given"
        raise UserError(f"rows for the discriminators of method apc are labelled by one judge, but {told}")
    return list(judges)
