"""Queries with what their situation calls for, trait by trait: what PersonaFuse learns from (arXiv 2509.07370).

One file, sft.jsonl, one JSON object per line (reference/persona_fuse.md section 4; the format is ours):

    {"id": "q1", "messages": [{"role": "user", "content": "..."}], "response": "...", "cot": null,
     "traits": {"O": 0, "C": 1, "E": 0, "A": -1, "N": 0}, "expert_vector": [0, 0, 1, 0, 0, 0, 0, 1, 0, 0],
     "source": "...", "split": "train"}

A trait is 1 (its high pole is called for), -1 (its low pole) or 0. `expert_vector` has a weight of 0 to 1 for each
of POLES: above 0 exactly for the poles that `traits` calls for. A query without any is neutral. `cot`, how the traits
were found, is kept beside the response and is never learned from. `split` is train, dev or test.

`data=town_situations` (persona/data/town.py) hands out the same without a file. A file of bare queries, rows of no
more than id, messages and source, is the pool that PersonaFuse's stage "synthesis" annotates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.data.base import SPLITS, People, plain_task, register
from persona.data.rows import field, read_jsonl
from persona.errors import UserError
from persona.types import Message, Sample

TRAITS = {"O": "openness", "C": "conscientiousness", "E": "extraversion", "A": "agreeableness", "N": "neuroticism"}
POLES = tuple(f"{trait}{sign}" for trait in TRAITS for sign in "+-")  # the order of every expert vector
KEYS = ("id", "messages", "response", "cot", "traits", "expert_vector", "source", "split")
QUERY_KEYS = ("id", "messages", "source")
ROLES = ("system", "user", "assistant")
TASK = register(plain_task("situation"))


@dataclass
class SituationsConfig:
    """`path`: a file of the form above. `limit`: read only the first so many samples of each split."""

    name: str = "situations"
    path: str | None = None
    limit: int | None = None


# ---- what a sample is annotated with -------------------------------------------------------------------------------


def expert_vector(traits: Mapping[str, float]) -> tuple[float, ...]:
    """Weights of POLES, [10]: a level v of -1 to 1 gives max(v, 0) to the high pole and max(-v, 0) to the low one."""
    return tuple(float(max(sign * traits.get(trait, 0), 0)) for trait in TRAITS for sign in (1, -1))


def metadata(traits: Mapping[str, int], vector: Sequence[float], source: str) -> dict[str, str]:
    """How a sample carries its annotation (`Sample.metadata` holds strings)."""
    return {"traits": json.dumps(dict(traits)), "expert_vector": json.dumps(list(vector)), "source": source}


def traits_of(sample: Sample) -> dict[str, int]:
    """The sample's traits, letter -> -1, 0 or 1. Raises UserError for a sample that nobody has annotated."""
    return json.loads(_annotation(sample, "traits"))


def expert_vector_of(sample: Sample) -> tuple[float, ...]:
    """The sample's weights of POLES, [10]. Raises UserError for a sample that nobody has annotated."""
    return tuple(json.loads(_annotation(sample, "expert_vector")))


def annotated(sample: Sample) -> bool:
    """Whether it is known what the sample calls for."""
    return "expert_vector" in sample.metadata


def _annotation(sample: Sample, key: str) -> str:
    if not annotated(sample):
        raise UserError(
            f"sample {sample.id} does not say which traits it calls for: choose data=situations data.path=sft.jsonl "
            "or data=town_situations"
        )
    return sample.metadata[key]


# ---- the reader ----------------------------------------------------------------------------------------------------


def load(config: SituationsConfig) -> People:
    """The samples of a file by split. Raises UserError with file and line for the first row with anything wrong in it
    (`_sample`), for an id that occurs twice, for a query in two splits or twice with one response, and for a file
    without train rows."""
    if config.path is None:
        raise UserError("data.path has no value: data.path=… names an sft.jsonl (persona/data/situations.py)")
    path = Path(config.path).expanduser()
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    ids: dict[str, int] = {}
    queries: dict[tuple[Message, ...], tuple[str, int]] = {}
    pairs: dict[tuple[tuple[Message, ...], str], int] = {}
    for line, row, _ in read_jsonl(path):
        where = f"{path}, line {line}"
        sample, split = _query(row, where) if set(row) <= set(QUERY_KEYS) else _sample(row, where)
        if (first := ids.setdefault(sample.id, line)) != line:
            raise UserError(f"{where} repeats the id {sample.id!r} of line {first}; every id should occur once")
        if (first := pairs.setdefault((sample.messages, sample.target), line)) != line:
            raise UserError(f"{where} repeats query and response of line {first}; every row should be another")
        other, first = queries.setdefault(sample.messages, (split, line))
        if other != split:
            raise UserError(
                f"{where} has the query of line {first} in split {split!r}, there it is in {other!r}; all rows of one "
                "query should be in one split"
            )
        splits[split].append(sample)
    if not splits["train"]:
        raise UserError(f"{path} has no row of split 'train' to learn from")
    known = {annotated(sample): sample.id for samples in splits.values() for sample in samples}
    if len(known) > 1:
        raise UserError(
            f"{path} holds annotated rows (id {known[True]}) and bare queries (id {known[False]}): put them into two "
            "files"
        )
    cut = {split: tuple(samples[: config.limit]) for split, samples in splits.items()}
    return People(f"situations/{path.stem}", {TASK.name: TASK}, cut["train"], cut["dev"], cut["test"])


def _query(row: Mapping[str, Any], where: str) -> tuple[Sample, str]:
    """A query of which nothing is known yet; all of them are of the train split."""
    id = field(row, "id", where)
    notes = {"source": field(row, "source", where)} if "source" in row else {}
    return Sample(id, _messages(row.get("messages"), f"{where} (id {id})"), task=TASK.name, metadata=notes), "train"


def _sample(row: Mapping[str, Any], where: str) -> tuple[Sample, str]:
    """One row as a sample, and its split."""
    id = field(row, "id", where)
    where = f"{where} (id {id})"
    if unknown := [key for key in row if key not in KEYS]:
        raise UserError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(KEYS)}")
    split = field(row, "split", where)
    if split not in SPLITS:
        raise UserError(f"{where} is of split {split!r}, which should be one of {', '.join(SPLITS)}")
    if not isinstance(row.get("cot"), str | None):
        raise UserError(f"{where} has {row['cot']!r:.60} as 'cot', which should be a string or null")
    response = field(row, "response", where)
    if not response.strip():
        raise UserError(f"{where} has an empty response; it should be what is to be said")
    traits, vector = _traits(row.get("traits"), where), _vector(row.get("expert_vector"), where)
    for pole, weight, called in zip(POLES, vector, expert_vector(traits), strict=True):
        if (weight > 0) != (called > 0):
            raise UserError(
                f"{where} has weight {weight:g} for {pole} in 'expert_vector', but {pole[0]} is {traits[pole[0]]} in "
                "'traits'; a weight should be above 0 exactly for the poles that are called for"
            )
    notes = metadata(traits, vector, field(row, "source", where))
    return Sample(id, _messages(row.get("messages"), where), response, task=TASK.name, metadata=notes), split


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} has {value!r:.60} as 'messages', which should be a list of {{role, content}}")
    messages = tuple(Message(field(entry, "role", where), field(entry, "content", where)) for entry in value)
    if wrong := [message.role for message in messages if message.role not in ROLES]:
        raise UserError(f"{where} has a message of role {wrong[0]!r}, which should be one of {', '.join(ROLES)}")
    if messages[-1].role != "user":
        raise UserError(f"{where} ends in a message of role {messages[-1].role!r}; the last one should be the user's")
    return messages


def _traits(value: Any, where: str) -> dict[str, int]:
    if not isinstance(value, dict) or set(value) != set(TRAITS):
        raise UserError(f"{where} has {value!r:.60} as 'traits', which should have exactly {', '.join(TRAITS)}")
    for trait, level in value.items():
        if isinstance(level, bool) or level not in (-1, 0, 1):
            raise UserError(f"{where} has {level!r:.20} for trait {trait}, which should be -1, 0 or 1")
    return {trait: int(value[trait]) for trait in TRAITS}


def _vector(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != len(POLES):
        found = f"{len(value)} entries" if isinstance(value, list) else f"{value!r:.60}"
        raise UserError(
            f"{where} has {found} as 'expert_vector', which should be {len(POLES)} numbers, one for each of "
            f"{', '.join(POLES)}"
        )
    for pole, weight in zip(POLES, value, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise UserError(f"{where} has {weight!r:.20} for {pole} in 'expert_vector', which should be 0 to 1")
    return tuple(map(float, value))
