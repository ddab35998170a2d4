"""ToMBench: what do people in short stories believe, want, feel and mean? 20 tasks of multiple choice, en or zh.

Source: persona_fuse §5. An item is asked several times, its options in another order each time, and the readable
replies vote. Prompts are in our own words.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from persona.benchmarks import FileBenchmarkConfig
from persona.benchmarks.emobench import LANGUAGES, MODES, lettered, likeliest, shuffled
from persona.benchmarks.personaeval import limited
from persona.data.rows import field, read_jsonl
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.parsing import Unreadable, parse_choice
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Request, Sample, Sampling, Score

LETTERS = "ABCD"
ABILITY, ANSWER = "能力\nABILITY", "答案\nANSWER"
KEYS = {"en": ("STORY", "QUESTION", "OPTION-"), "zh": ("故事", "问题", "选项")}
_SAMPLES = Path(__file__).parent / "samples" / "tombench"
PROMPTS = {name: Prompt.load(Path(__file__).parent / "prompts" / "tombench" / f"{name}.md") for name in LANGUAGES}


# ---- replies and votes ---------------------------------------------------------------------------------------------


def parse_reply(text: str, letters: Sequence[str]) -> str | None:
    """The one of `letters` that a reply gives ("[[B]]", "B", "the answer is B"); None where it gives none or two."""
    try:
        return parse_choice(text, letters)
    except Unreadable:
        return None


def official_reply(text: str) -> str:
    """The published rule: the first of A to D in double brackets anywhere, else in single ones, else the last such
    capital of the reply, inside a word too, else "A"."""
    for bracketed in ("[[{}]]", "[{}]"):
        for letter in LETTERS:
            if bracketed.format(letter) in text:
                return letter
    return next((character for character in reversed(text) if character in LETTERS), "A")


def vote(given: Sequence[str | None], right: str) -> float | None:
    """Whether the most frequent readable answer is `right`: 1 or 0, and 1 / n where it is one of n as frequent ones.
    None when no answer is readable."""
    counts = Counter(answer for answer in given if answer is not None)
    if not counts:
        return None
    most = [answer for answer, count in counts.items() if count == max(counts.values())]
    return (right in most) / len(most)


# ---- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """`options`: letter in the file → text, of those that are there. `ability` is the broad one of `detail`."""

    id: str
    task: str
    ability: str
    detail: str
    story: str
    question: str
    options: Mapping[str, str]
    right: str


def read_task(path: Path, language: str, compat: str | None = None) -> list[Item]:
    """The items of one task file (its stem is the task's name), rows counted from 1.

    An option that is absent, null, NaN or blank is missing; the mark of its own letter before a text ("A. ") goes. A
    label may have marks around its letter. Abilities that differ in case or spaces only are one.
    compat="reference": only "A. " goes, labels and abilities are taken as they stand.

    Raises UserError naming file and line for a missing field, fewer than two options, and a label that is no option.
    """
    items = [_item(row, path, number, language, compat) for number, row, _ in read_jsonl(path, json.loads)]
    if not items:
        raise UserError(f"{path} holds no rows")
    return items


def _item(row: Mapping[str, Any], path: Path, number: int, language: str, compat: str | None) -> Item:
    where = f"{path}, line {number}"
    story, question, option = KEYS[language]
    options = {letter: _option(row, option + letter, letter, where, compat) for letter in LETTERS}
    options = {letter: text for letter, text in options.items() if text}
    label, ability = field(row, ANSWER, where), field(row, ABILITY, where)
    letter = re.fullmatch(r"\W*([A-D])\W*", label)
    if len(options) < 2 or letter is None or letter[1] not in options:
        there = ", ".join(options) or "none"
        raise UserError(f"{where} has the answer {label!r} and the options {there}; it should be one of at least two")
    if compat is None:
        label = next(same for same in options if options[same] == options[letter[1]])  # two rows have an option twice
        ability = " ".join(ability.split())
        ability = ability[:1].upper() + re.sub(r"^[^:]*", lambda broad: broad[0].lower(), ability)[1:]
    return Item(
        id=f"{path.stem}-{language}-{number}", task=path.stem, ability=ability.partition(":")[0], detail=ability,
        story=field(row, story, where), question=field(row, question, where), options=options, right=label,
    )  # fmt: skip


def _option(row: Mapping[str, Any], name: str, letter: str, where: str, compat: str | None) -> str:
    text = row.get(name)
    if text is None or text != text:  # null, or NaN
        return ""
    text = field(row, name, where)
    if compat is not None:
        return text.replace(f"{letter}. ", "")
    return re.sub(rf"^\s*{letter}\s*[.．、:：)）]\s*", "", text).strip()


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass
class ToMBenchConfig(FileBenchmarkConfig):
    """`path`: a folder of task files (<task>.jsonl). `tries`: how often an item is asked, in orders drawn by `seed`.

    `mode`: "text" reads the letter that the model writes, "likelihood" takes the likeliest of the letters in brackets.
    `limit` takes of all tasks about as many, drawn by `seed`.
    """

    name: str = "tombench"
    max_new_tokens: int = 32
    language: str = "en"
    mode: str = "text"
    tries: int = 5


class ToMBench(Benchmark):
    """An item without a readable try is in `invalid` and `accuracy_all` only. Under compat every reply is read as some
    letter (`official_reply`), and of answers that are as frequent the first one given is the vote."""

    name = "tombench"
    version = "1"
    primary = "accuracy"
    prompts = tuple(PROMPTS.values())

    def __init__(self, config: ToMBenchConfig) -> None:
        for key, value, known in (("language", config.language, LANGUAGES), ("mode", config.mode, MODES)):
            if value not in known:
                raise UserError(f"benchmark.{key}={value} is unknown; it should be {' or '.join(known)}")
        self.config = config
        folder = Path(config.path).expanduser() if config.path else _SAMPLES
        if not (paths := sorted(folder.glob("*.jsonl"))):
            raise UserError(f"benchmark.path={folder} holds no .jsonl files; it should be a folder of task files")
        tasks = [read_task(path, config.language, config.compat) for path in paths]
        self._items = {item.id: item for task in tasks for item in task}
        self._samples = limited([[self._sample(item) for item in task] for task in tasks], config.limit, config.seed)
        first: dict[str, str] = {}
        self._stories = {item.id: first.setdefault(item.story, item.id) for item in self._items.values()}
        self._places = {task: float(place) for place, task in enumerate(dict.fromkeys(s.task for s in self._samples))}
        self._best = max("AB", key=lambda letter: fmean(self._right_by(sample, letter) for sample in self._samples))
        self.metrics = {
            "accuracy": Metric(description="share of items whose vote is right; a tie between n options is 1 / n"),
            "accuracy_by_task": Metric(
                aggregate="group_mean",
                columns=("accuracy", "task"),
                classes=len(self._places),
                description="accuracy, mean over tasks, which weigh alike",
            ),
            "agreement": Metric(description="share of an item's readable tries that are for the most frequent option"),
        }
        if config.compat is None and config.mode == "text":
            self.metrics["accuracy_all"] = Metric(description="accuracy, items without a readable try as wrong")
            self.metrics["invalid"] = Metric(False, description="share of tries that cannot be read")

    def _orders(self, item: Item) -> list[tuple[str, ...]]:
        """For each try the letters in the file, in the order in which their options are shown."""
        return [shuffled(list(item.options), self.config.seed, item.id, i) for i in range(self.config.tries)]

    def _request(self, item: Item, order: Sequence[str]) -> Request:
        shown = lettered([item.options[letter] for letter in order])
        slots = {"story": item.story, "question": item.question, "options": shown}
        options = tuple(f"[[{letter}]]" for letter in LETTERS[: len(order)])
        sampling = Sampling(self.config.max_new_tokens, seed=self.config.seed)
        return Request(PROMPTS[self.config.language].messages(**slots), sampling=sampling, options=options)

    def _sample(self, item: Item) -> Sample:
        """As in the first try."""
        order = self._orders(item)[0]
        request = self._request(item, order)
        target = f"[[{LETTERS[order.index(item.right)]}]]" if item.right in order else item.right
        return Sample(item.id, request.messages, target, options=request.options, task=item.task)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        """Items about one story."""
        return self._stories[sample.id]

    def groups(self, sample: Sample) -> Mapping[str, str]:
        item = self._items[sample.id]
        return {"task": item.task, "ability": item.ability, "ability in detail": item.detail}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        item = self._items[sample.id]
        orders = self._orders(item)
        replies = await asyncio.gather(*(self._ask(self._request(item, order), roles) for order in orders))
        raw = "\n\n[another order]\n".join(replies)
        return Score(self._values(item, orders, replies) | {"task": self._places[item.task]}, raw=raw)

    async def _ask(self, request: Request, roles: Roles) -> str:
        if self.config.mode == "likelihood":
            return await likeliest(roles, request)
        return (await roles.model.respond(request)).text

    def _values(self, item: Item, orders: Sequence[Sequence[str]], replies: Sequence[str]) -> dict[str, float]:
        given: list[str | None] = []
        for order, reply in zip(orders, replies, strict=True):
            # Of options with one text the first stands for all, as published.
            texts = {text: letter for letter, text in reversed(list(item.options.items()))}
            shown = {place: texts[item.options[letter]] for place, letter in zip(LETTERS, order, strict=False)}
            if self.config.compat is None:
                letter = parse_reply(reply, list(shown))
                given.append(shown[letter] if letter else None)
            else:
                given.append(shown.get(official_reply(reply), ""))
        readable = Counter(answer for answer in given if answer is not None)
        values = {"invalid": 1 - readable.total() / len(given), "accuracy_all": 0.0}
        if not readable:
            return values
        (most, count), *_ = readable.most_common()
        right = vote(given, item.right) or 0.0
        if self.config.compat is not None:
            right = float(most == item.right)
        return values | {"accuracy": right, "accuracy_all": right, "agreement": count / readable.total()}

    def _right_by(self, sample: Sample, letter: str) -> float:
        """What a model scores that always gives `letter`."""
        item = self._items[sample.id]
        return self._values(item, self._orders(item), [f"[[{letter}]]"] * self.config.tries)["accuracy_all"]

    def constant(self, sample: Sample) -> str:
        """A or B, whichever is right more often."""
        return f"[[{self._best}]]"


def build(config: ToMBenchConfig) -> ToMBench:
    """The benchmark of a config. Raises UserError for files that are missing or malformed."""
    return ToMBench(config)
