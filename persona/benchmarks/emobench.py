"""EmoBench: what somebody feels and why (EU), and what would serve them best (EA), as multiple choice, en or zh.

Source: persona_fuse §5. The published options always stand in the files' order, where some places are right far more
often than others; here each item has an order of its own, drawn by seed and id. Prompts are in our own words.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona.benchmarks import FileBenchmarkConfig
from persona.benchmarks.personaeval import limited, official_file
from persona.data.rows import field, first_few, read_jsonl
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark, Unscored
from persona.evaluation.generation import seed_of
from persona.evaluation.judges.parsing import Unreadable, parse_choice, parse_json
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Request, Sample, Sampling, Score

LETTERS = string.ascii_uppercase
LANGUAGES = ("en", "zh")
MODES = ("text", "likelihood")  # of every benchmark of choices
OWN_MODES = (*MODES, "reasoning")
# Task -> the key of each question in a reply, and the fields that hold its options and the right one.
TASKS = {
    "EA": {"answer": ("choices", "label")},
    "EU": {
        "answer_q1": ("emotion_choices", "emotion_label"),
        "answer_q2": ("cause_choices", "cause_label"),
    },
}
_SAMPLES = Path(__file__).parent / "samples" / "emobench"
_PROMPTS = Path(__file__).parent / "prompts" / "emobench"
PROMPTS = {path.stem: Prompt.load(path) for path in sorted(_PROMPTS.glob("*.md"))}
SLOTS = {"EA": ("options",), "EU": ("emotions", "causes")}  # of the prompts, in the order of the questions
BREAKDOWNS = {"EA": ("category", "question type"), "EU": ("coarse_category", "finegrained_category")}
_KINDS = {"en": {}, "zh": {"action": "行动", "response": "回应"}}  # the Chinese rows have the English words too


# ---- options -------------------------------------------------------------------------------------------------------


def shuffled(options: Sequence[str], seed: int, *names: object) -> tuple[str, ...]:
    """`options` in an order that is drawn by the seed and names of what they belong to."""
    return tuple(random.Random(seed_of(seed, "options", *names)).sample(options, len(options)))


def lettered(options: Sequence[str]) -> str:
    """One option a line, "A) …"."""
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


async def likeliest(roles: Roles, request: Request) -> str:
    """The option of the request with the largest summed log p. Raises Unscored when one is not a number."""
    logps = np.array(await roles.model.choose(request))
    if np.isnan(logps).any():
        raise Unscored("the likelihood of an answer is not a number")
    return (request.options or ())[int(logps.argmax())]


# ---- replies -------------------------------------------------------------------------------------------------------


def parse_reply(text: str, questions: Mapping[str, int]) -> dict[str, str]:
    """The letter that a reply gives to each question; `questions` is {its key in the JSON: its number of options}.

    Where there is one question, a reply without JSON that gives a letter is read as well. Raises Unreadable.
    """
    try:
        given = parse_json(text)
    except Unreadable:
        if len(questions) > 1:
            raise
        return {key: parse_choice(text, LETTERS[:options]) for key, options in questions.items()}
    if missing := [key for key in questions if key not in given]:
        raise Unreadable(f"the JSON has no {missing[0]!r}")
    return {key: parse_choice(str(given[key]), LETTERS[:options]) for key, options in questions.items()}


def official_reply(text: str, questions: Mapping[str, int]) -> dict[str, Any]:
    """The published rule: the first block fenced as json, else the whole reply, has to be JSON as it stands, and a
    value has to be the letter exactly. What cannot be read is "", which is wrong."""
    fenced = re.search(r"```json\s*(.*?)```", text, re.DOTALL)
    try:
        given = json.loads(fenced[1] if fenced else text)
    except ValueError:
        given = None
    return {key: given.get(key, "") if isinstance(given, dict) else "" for key in questions}


# ---- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One row. `options` and `right` are by the question's key in a reply; `category` and `detail` are breakdowns."""

    id: str
    task: str
    slots: Mapping[str, str]
    options: Mapping[str, tuple[str, ...]]
    right: Mapping[str, str]
    category: str
    detail: str

    def letters(self) -> dict[str, str]:
        return {key: LETTERS[self.options[key].index(right)] for key, right in self.right.items()}


def read_items(path: Path, task: str, language: str) -> list[Item]:
    """The items of EA.jsonl or EU.jsonl in one language, in the file's order.

    Raises UserError naming file and line for a missing field, options that are not several different texts, a label
    that is none of them, and when no row is in that language.
    """
    items, seen = [], set()
    for number, row, _ in read_jsonl(path):
        where = f"{path}, line {number}"
        given = field(row, "language", where)
        seen.add(given)
        if given != language:
            continue
        options, right = {}, {}
        for key, (choices, label) in TASKS[task].items():
            options[key] = _options(row, choices, where)
            right[key] = field(row, label, where)
            if right[key] not in options[key]:
                raise UserError(f"{where} has {label} {right[key]!r}, which should be one of its {choices}")
        category, detail = BREAKDOWNS[task]
        slots = {"scenario": field(row, "scenario", where), "subject": field(row, "subject", where)}
        if task == "EA":
            kind = field(row, "question type", where).lower()
            slots["kind"] = _KINDS[language].get(kind, kind)
        id = f"{task}-{language}-{field(row, 'qid', where)}"
        items.append(Item(id, task, slots, options, right, field(row, category, where), field(row, detail, where)))
    if not items:
        found = ", ".join(sorted(seen)) or "no rows"
        raise UserError(f"{path} holds nothing in benchmark.language={language}; it holds {found}")
    return items


def _options(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    options = row.get(name)
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise UserError(f"{where} has {options!r:.60} as {name}, which should be a list of texts")
    if not 2 <= len(set(options)) == len(options) <= len(LETTERS):
        raise UserError(f"{where} has the {name} {first_few(options, 6)}; there should be several, all different")
    return tuple(options)


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass
class EmoBenchConfig(FileBenchmarkConfig):
    """`path`: a folder with EA.jsonl and EU.jsonl. `mode`: "text" reads the letters that the model writes, "reasoning"
    asks it to reason first, in the same JSON object (the published chain-of-thought variant; raise `max_new_tokens`),
    "likelihood" takes the likeliest of all replies that the form allows. `seed` draws the orders of options (in the
    published order under compat), and which rows a `limit` takes.
    """

    name: str = "emobench"
    max_new_tokens: int = 64
    language: str = "en"
    mode: str = "text"


class EmoBench(Benchmark):
    """A reply that cannot be read is in `invalid` and `accuracy_all` only; under compat it is wrong everywhere."""

    name = "emobench"
    version = "1"
    primary = "accuracy"

    def __init__(self, config: EmoBenchConfig) -> None:
        for key, value, known in (("language", config.language, LANGUAGES), ("mode", config.mode, OWN_MODES)):
            if value not in known:
                raise UserError(f"benchmark.{key}={value} is unknown; it should be {' or '.join(known)}")
        self.config = config
        kind = "_reasoning" if config.mode == "reasoning" else ""
        self._prompt = {task: PROMPTS[f"{task}_{config.language}{kind}"] for task in TASKS}
        self.prompts = tuple(self._prompt.values())
        place = config.path or str(_SAMPLES)
        read = [read_items(official_file(place, f"{task}.jsonl"), task, config.language) for task in TASKS]
        items = [self._ordered(item) for part in read for item in part]
        self._items = {item.id: item for item in items}
        if len(self._items) < len(items):
            twice = next(id for id, count in Counter(item.id for item in items).items() if count > 1)
            raise UserError(f"{place} has two rows {twice} (task, language and qid), which should be different")
        parts = [[self._sample(item) for item in items if item.task == task] for task in TASKS]
        self._samples = limited(parts, config.limit, config.seed)
        self._common = {
            task: Counter(s.target for s in self._samples if s.task == task).most_common(1)[0][0]
            for task in {sample.task for sample in self._samples}
        }
        self.metrics = {
            "accuracy": Metric(
                aggregate="group_mean", columns=("right", "task"), classes=2, description="mean of EA and EU"
            ),
            "EA": Metric(description="emotional application: share of items with the best action or response"),
            "EU": Metric(description="emotional understanding: share of items with both emotion and cause right"),
            "EU_emotion": Metric(description="share of EU items with the right emotion"),
            "EU_cause": Metric(description="share of EU items with the right cause"),
        }
        if config.compat is None and config.mode != "likelihood":
            self.metrics["accuracy_all"] = Metric(
                aggregate="group_mean",
                columns=("right_all", "task"),
                classes=2,
                description="accuracy with replies that cannot be read as wrong",
            )
        if config.mode != "likelihood":
            self.metrics["invalid"] = Metric(False, description="share of replies that cannot be read")

    def _ordered(self, item: Item) -> Item:
        """The item with its options as they are shown."""
        if self.config.compat is not None:
            return item
        drawn = {key: shuffled(options, self.config.seed, item.id, key) for key, options in item.options.items()}
        return Item(item.id, item.task, item.slots, drawn, item.right, item.category, item.detail)

    def _sample(self, item: Item) -> Sample:
        shown = dict(zip(SLOTS[item.task], item.options.values(), strict=True))
        slots = {**item.slots, **{name: lettered(options) for name, options in shown.items()}}
        messages = self._prompt[item.task].messages(**slots)
        options = None
        if self.config.mode == "likelihood":
            letters = itertools.product(*(LETTERS[: len(shown)] for shown in item.options.values()))
            options = tuple(_reply(dict(zip(item.options, chosen, strict=True))) for chosen in letters)
        return Sample(item.id, messages, _reply(item.letters()), options=options, task=item.task)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def groups(self, sample: Sample) -> Mapping[str, str]:
        item = self._items[sample.id]
        return {
            "task": item.task,
            "category": f"{item.task} {item.category}",
            "detail": f"{item.task} {item.detail}",
        }

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        item = self._items[sample.id]
        questions = {key: len(options) for key, options in item.options.items()}
        task = {"task": float(list(TASKS).index(item.task))}
        if self.config.mode == "likelihood":
            best = await likeliest(roles, Request(sample.messages, options=sample.options))
            return Score(task | _values(item, json.loads(best)), raw=best)
        request = Request(sample.messages, sampling=Sampling(self.config.max_new_tokens, seed=self.config.seed))
        reply = (await roles.model.respond(request)).text
        if self.config.compat is not None:
            chosen = official_reply(reply, questions)
            return Score(task | _values(item, chosen) | {"invalid": float("" in chosen.values())}, raw=reply)
        try:
            values = _values(item, parse_reply(reply, questions))
        except Unreadable:
            return Score(task | {"right_all": 0.0, "invalid": 1.0}, raw=reply)
        return Score(task | values | {"right_all": values["right"], "invalid": 0.0}, raw=reply)

    def constant(self, sample: Sample) -> str:
        """The letters that are right most often in the sample's task: of EU, the best pair."""
        return self._common[sample.task]

    def chance(self, sample: Sample, rng: random.Random) -> str:
        options = self._items[sample.id].options
        return _reply({key: rng.choice(LETTERS[: len(shown)]) for key, shown in options.items()})


def _reply(letters: Mapping[str, str]) -> str:
    return json.dumps(letters)


def _values(item: Item, chosen: Mapping[str, Any]) -> dict[str, float]:
    right = {key: float(chosen[key] == letter) for key, letter in item.letters().items()}
    values = {"right": min(right.values()), item.task: min(right.values())}
    if item.task == "EU":
        values |= {"EU_emotion": right["answer_q1"], "EU_cause": right["answer_q2"]}
    return values


def build(config: EmoBenchConfig) -> EmoBench:
    """The benchmark of a config. Raises UserError for files that are missing or malformed."""
    return EmoBench(config)
