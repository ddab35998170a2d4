"""Fifth stage: of several replies to one query, which is preferred, and how strongly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.evaluation.judges.apc import RELEVANCE, judged
from persona.evaluation.judges.judging import Unscored
from persona.evaluation.roles import Roles
from persona.lm import BaseLM
from persona.methods.apc.characters import Character
from persona.methods.apc.config import APCConfig
from persona.methods.statements import Statements
from persona.metrics.apc import Probabilities, Question
from persona.types import Message, Request, Sampling


class Preference(NamedTuple):
    """Positions: of the query, and of the two replies among its own. `gap` is the difference of their scores."""

    query: int
    chosen: int
    rejected: int
    gap: float


def preference_pairs(scores: Sequence[Sequence[float]], *, gap: float = 0.2) -> list[Preference]:
    """Of each query's replies with these scores the best against the worst, where they differ by more than `gap`.

    One pair per query at most; of equal scores the earlier reply is taken (reference/apc.md 3.6: two replies, V_APC
    over all statements, |difference| > 0.2). Queries with fewer than two replies give none.
    """
    found = []
    for query, own in enumerate(scores):
        if len(own) < 2:
            continue
        best, worst = int(np.argmax(own)), int(np.argmin(own))
        difference = float(own[best]) - float(own[worst])
        if difference > gap:
            found.append(Preference(query, best, worst, difference))
    return found


def statement_weights(found: Probabilities, chosen: int, rejected: int) -> tuple[float, float]:
    """Of the per-statement objective (paper, eq. 8-9) the weight that `chosen` is better, and that `rejected` is.

    Statement by statement, a reply is preferred as far as it satisfies the statement and the other one does not: an
    active one (weight Pg) is satisfied with Pe, a passive one (1 - Pg) with 1 - Pc. The two weights differ by exactly
    the gap in APC.
    """
    pg = found.relevance
    active, passive = found.entailment, 1 - found.contradiction

    def over(one: int, other: int) -> float:
        kept = pg * active[one] * (1 - active[other]) + (1 - pg) * passive[one] * (1 - passive[other])
        return float(kept.sum())

    return over(chosen, rejected), over(rejected, chosen)


async def sample_replies(
    item: tuple[str, str],
    roles: Roles,
    character: Character,
    bearing: Sequence[str],
    prompter: Statements,
    config: APCConfig,
    seed: int,
) -> Mapping[str, Any]:
    """(name, query) → `samples` replies of the LM that is to be trained, and `told` ones of the teacher, who is the
    reference and has the statements `bearing` on the query in its prompt."""
    name, query = item
    informed = replace(character.persona, statements=tuple(bearing))

    async def one(number: int) -> str:
        sampling = Sampling(config.max_new_tokens, config.temperature, seed=seed_of(seed, "replies", name, number))
        request = Request(character.ask(query), character.persona, sampling, task=character.task)
        if number < config.samples:
            return (await roles.model.respond(request)).text.strip()
        assert roles.reference is not None
        (prompted,) = prompter.prompt([replace(request, persona=informed)])
        return (await roles.reference.respond(prompted)).text.strip()

    replies = await asyncio.gather(*(one(number) for number in range(config.samples + config.told)))
    return {"of": character.id, "query": query, "replies": list(replies)}


async def judge_relevance(query: str, roles: Roles, character: Character) -> Mapping[str, Any]:
    """The statements that bear on the query, as the judge says. Raises Unscored where nothing can be read."""
    statements, slots = character.persona.statements, {"character": character.name, "query": query}
    verdicts = await asyncio.gather(*(roles.judges[0].ask(RELEVANCE, statement=s, **slots) for s in statements))
    if not any(verdict.value for verdict in verdicts):
        raise Unscored(verdicts[0].reason, verdicts[0].raw, failed=any(verdict.failed for verdict in verdicts))
    return {"bearing": [s for s, verdict in zip(statements, verdicts, strict=True) if verdict.value == "yes"]}


async def judge_replies(question: Question, roles: Roles) -> Mapping[str, Any]:
    """The judge's probabilities, 0 or 1, of the replies `kept`: those whose verdicts can all be read. Raises Unscored
    where these are fewer than two, and where a call has failed."""
    found = [each.found for each in await judged(roles.judges[0], question)]
    unread = [one for one in found if isinstance(one, Unscored)]
    known = [(place, one) for place, one in enumerate(found) if isinstance(one, Probabilities)]
    if unread and (len(known) < 2 or any(one.failed for one in unread)):
        raise max(unread, key=lambda one: one.failed)
    return {
        "kept": [place for place, _ in known],
        "relevance": known[0][1].relevance.tolist(),
        "entailment": [one.entailment[0].tolist() for _, one in known],
        "contradiction": [one.contradiction[0].tolist() for _, one in known],
    }


def probabilities(row: Mapping[str, Any]) -> Probabilities:
    """A row of `judge_replies` as arrays."""
    return Probabilities(*(np.array(row[key]) for key in ("relevance", "entailment", "contradiction")))


def drawn(character: Character, queries: Mapping[str, Sequence[str]], config: APCConfig, seed: int) -> list[str]:
    """At most `max_queries` of the queries of a character's statements, or of the data's questions, each once."""
    pool = character.questions if config.queries == "data" else [q for own in queries.values() for q in own]
    known = list(dict.fromkeys(pool))
    rng = random.Random(seed_of(seed, "queries drawn", character.id))
    return rng.sample(known, min(len(known), config.max_queries))


def published(base: BaseLM, row: Mapping[str, Any]) -> dict[str, str]:
    """A pair as published files hold it: prompt and replies in the chat's own control tokens, end of turn included."""
    messages = tuple(Message(**message) for message in row["messages"])
    prompt = base.text(messages)
    return {
        "prompt": prompt,
        **{side: base.text(messages, row[side])[len(prompt) :] for side in ("chosen", "rejected")},
    }


def none_left(scores: Sequence[Sequence[float]], gap: float) -> UserError:
    """What to say when no pair survives."""
    widest = max((float(np.ptp(own)) for own in scores if len(own) > 1), default=0.0)
    return UserError(
        f"no preference pair survives: over {len(scores)} queries the widest gap between two replies is {widest:.3g}, "
        f"and method.gap={gap:g} has to be exceeded; draw more replies (method.samples) or lower the gap"
    )
