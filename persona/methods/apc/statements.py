"""First two stages: what is known about a character as single statements, and queries that each statement answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona.data.biography import check_names, names, paragraphs
from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.evaluation.judges.judging import Unscored
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.methods.apc.characters import Character
from persona.methods.apc.config import APCConfig
from persona.types import Request, Sampling

_PROMPTS = Path(__file__).parent / "prompts"
STATEMENTS = Prompt.load(_PROMPTS / "statements.md")
QUERIES = Prompt.load(_PROMPTS / "queries.md")

# ---- statements ----------------------------------------------------------------------------------------------------


def told(character: Character) -> list[dict[str, str]]:
    """Rows of the statements that the data gives. Raises UserError for one that does not name the character."""
    check_names(character.persona.statements, character.name, f"character {character.id}")
    return [{"character": character.name, "passage": "", "statement": s} for s in character.persona.statements]


def passages(character: Character) -> list[str]:
    """What statements have to be taken out of: the description's paragraphs. Raises UserError where there are none."""
    found = paragraphs(character.persona.description)
    if not found:
        raise UserError(f"character {character.id} has no statements and no text to take them from")
    return found


async def take(item: tuple[Character, str], roles: Roles) -> Mapping[str, Any]:
    """A passage → the statements that the model lists; those that do not name the character go, counted."""
    character, text = item[0].name, item[1]
    messages = STATEMENTS.messages(character=character, passage=text)
    reply = await roles.model.respond(Request(messages, sampling=Sampling(max_new_tokens=1024)))
    listed = bullets(reply.text)
    if not listed:
        raise Unscored("no line of the reply begins with a dash", reply.text)
    kept = [statement for statement in listed if names(statement, character)]
    return {"of": item[0].id, "passage": text, "statements": kept, "nameless": len(listed) - len(kept)}


def bullets(text: str) -> list[str]:
    """The lines that begin with "- ", each once."""
    lines = (re.fullmatch(r"\s*[-*•]\s+(.*\S)\s*", line) for line in text.splitlines())
    return list(dict.fromkeys(line[1] for line in lines if line))


# ---- queries -------------------------------------------------------------------------------------------------------


async def ask(item: tuple[Character, str], roles: Roles, config: APCConfig, seed: int) -> Mapping[str, Any]:
    """A statement → queries of a user that only the statement answers."""
    character, statement = item
    messages = QUERIES.messages(character=character.name, statement=statement, count=config.queries_per_statement)
    sampling = Sampling(256, temperature=1.0, seed=seed_of(seed, "queries", character.id, statement))
    reply = await roles.model.respond(Request(messages, sampling=sampling))
    queries = quoted(reply.text)[: config.queries_per_statement]
    if not queries:
        raise Unscored("the reply holds no query in double quotes", reply.text)
    return {"of": character.id, "statement": statement, "queries": queries}


def quoted(text: str) -> list[str]:
    """What stands in double quotes, each once."""
    found = (first or second for first, second in re.findall(r'"([^"\n]+)"|“([^”\n]+)”', text))
    return list(dict.fromkeys(query.strip() for query in found if query.strip()))


def from_data(all_characters: Sequence[Character]) -> None:
    """Raise UserError for a character whose questions are to be the data's own, and that has none."""
    for character in all_characters:
        if not character.questions:
            raise UserError(
                f"method.queries=data takes the questions of the train split, but {character.id} has none there "
                "(a biography gets them from data.train_questions)"
            )
