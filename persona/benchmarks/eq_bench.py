"""EQ-Bench v2: how strongly does a character in a dialogue feel each of four emotions? Numbers against a reference.

Source: persona_fuse §5. As in v2.1 a reply is one set of scores; `revise` asks as the prompts do, for a first set, a
critique and a second one. A score is read against what constants earn: 3 for every emotion gives 38.89 of 100.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from persona.benchmarks import FileBenchmarkConfig
from persona.data.rows import field, read_json
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.parsing import Unreadable, strip_markdown, strip_reasoning
from persona.evaluation.results import Row
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.files import write_json
from persona.types import Message, Request, Sample, Sampling, Score

log = logging.getLogger(__name__)

SCALE = range(11)  # what may be given to one emotion
PARSABLE = 0.8333  # a run with a smaller share of parsable replies is called failed by the published code
_SAMPLE = Path(__file__).parent / "samples" / "eq_bench" / "questions.json"

# ---- scores --------------------------------------------------------------------------------------------------------


def score_item(answer: Mapping[str, Any], reference: Mapping[str, Any]) -> float | None:
    """The score of one question, at most 10 (random numbers earn about 0, opposite ones much less than that).

    Both are {emotion: number}; numbers may be written as text. None unless `answer` holds exactly the reference's
    emotions, each with a finite number. The distance d of an emotion costs 6.5 / (1 + exp(-1.2 (d - 4))) up to 5 and d
    beyond, nothing where it is 0; the score is 10 - 0.7477 times the sum (persona_fuse §5).
    """
    if set(answer) != set(reference):
        return None
    try:
        distances = [abs(float(answer[emotion]) - float(reference[emotion])) for emotion in reference]
    except (TypeError, ValueError):
        return None
    if not all(map(math.isfinite, distances)):
        return None
    return 10 - 0.7477 * sum(map(_cost, distances))


def _cost(distance: float) -> float:
    if distance == 0:
        return 0.0
    return 6.5 / (1 + math.exp(-1.2 * (distance - 4))) if distance <= 5 else distance


def constant_total(references: Sequence[Mapping[str, float]], value: float) -> float:
    """What a model scores, of 100, that gives `value` to every emotion of every question."""
    return 10 * fmean(score_item(dict.fromkeys(reference, value), reference) or 0.0 for reference in references)


def official_total(first: Sequence[float | None], revised: Sequence[float | None]) -> dict[str, float | bool]:
    """The published total of a run from its questions' scores (None: unparsable, and left out of the mean).

    The revised scores count when their mean is no less than the first ones' and nearly as many (.95) are parsable.
    Returns first_pass, revised, score (a mean of nothing is 0), parsable (the share of those that count) and failed.
    """
    passes = [[value for value in values if value is not None] for values in (first, revised)]
    before, after = (fmean(values) if values else 0.0 for values in passes)
    better = after >= before and len(passes[1]) >= 0.95 * len(passes[0])
    parsable = len(passes[better]) / len(first)
    score = after if better else before
    return {
        "first_pass": before, "revised": after, "score": score, "parsable": parsable, "failed": parsable < PARSABLE,
    }  # fmt: skip


# ---- replies -------------------------------------------------------------------------------------------------------

_NUMBER = r"(?P<number>[-+]?\d+(?:\.\d+)?)(?![\d.,]*\d)(?:\s*/\s*(?P<of>\d+))?(?!\s*[-–~]\s*\d)"


def parse_reply(text: str, emotions: Sequence[str]) -> dict[str, float]:
    """The number that a reply gives to each of `emotions`, in any order and case, on the scale from 0 to 10.

    Markdown, "7/10", quotes and full-width colons are looked through; lines about anything else are passed over.
    Raises Unreadable for an emotion without a number, with several different ones, or with one off the scale.
    """
    text = strip_markdown(strip_reasoning(text)).replace("：", ":")
    return {emotion: _number(text, emotion) for emotion in emotions}


def _number(text: str, emotion: str) -> float:
    found = list(re.finditer(rf"(?<!\w){re.escape(emotion)}[\"']?\s*[:=]\s*[\"']?{_NUMBER}", text, flags=re.I))
    values = {float(match["number"]) for match in found}
    if len(values) != 1:
        raise Unreadable(f"{emotion} has {'several different numbers' if values else 'no number'}")
    (value,) = values
    if not 0 <= value <= SCALE[-1] or any(match["of"] not in (None, "10") for match in found):
        raise Unreadable(f"{emotion} has {found[0]['number']}, which is not on the scale from 0 to 10")
    return value


def passes(text: str) -> tuple[str, str]:
    """The parts of a reply with the first scores (up to the critique) and the revised ones, which may be empty."""
    first, _, revised = re.sub(r"revised scores", "\0", text, flags=re.I).partition("\0")
    return re.split(r"critique\W*:", first, flags=re.I)[0], revised.replace("\0", "")


def official_reply(text: str, revise: bool) -> tuple[dict[str, str], dict[str, str]]:
    """First and revised scores by the published rule: each word, colon, space and whole number, the last of a word."""
    pair = re.compile(r"(\w+):\s+(\d+)")
    if not revise:
        return dict(pair.findall(text)), {}
    first = re.search(r"First pass scores:(.*?)Revised scores:", text, re.DOTALL)
    revised = re.search(r"Revised scores:(.*)$", text, re.DOTALL)
    return dict(pair.findall(first[1] if first else "")), dict(pair.findall(revised[1] if revised else ""))


# ---- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """`reference`: emotion → its number, 0 to 10."""

    id: str
    prompt: str
    reference: Mapping[str, float]


def read_questions(path: Path) -> list[Question]:
    """The questions of a v2 file: {id: {prompt, reference_answer_fullscale: {emotion1, emotion1_score, …}}}.

    Raises UserError naming file and question for anything else, and for a number off the scale.
    """
    for _, value, _ in read_json(path, ""):
        if not isinstance(value, dict) or not value:
            raise UserError(f"{path} holds {value!r:.60}, which should be an object of questions by their ids")
        return [_question(id, entry, f"{path}, question {id}") for id, entry in value.items()]
    raise UserError(f"{path} is empty")


def _question(id: str, entry: Any, where: str) -> Question:
    prompt = field(entry, "prompt", where)
    reference = entry.get("reference_answer_fullscale")
    if not isinstance(reference, dict):
        raise UserError(f"{where} has no reference_answer_fullscale; the questions of v2 have one")
    numbers: dict[str, float] = {}
    for i in range(1, 5):
        emotion, given = (field(reference, name, where) for name in (f"emotion{i}", f"emotion{i}_score"))
        try:
            numbers[emotion] = float(given)
        except ValueError:
            numbers[emotion] = math.nan
        if not 0 <= numbers[emotion] <= SCALE[-1]:
            raise UserError(f"{where} has {given!r} as emotion{i}_score, which should be a number from 0 to 10")
    if len(numbers) < 4:
        raise UserError(f"{where} has the emotions {', '.join(numbers)}; there should be four different ones")
    return Question(id, prompt, numbers)


def single_pass(prompt: str) -> str:
    """A prompt of the official form without its critique and revised scores, as v2.1 asks."""
    if "Revised scores:" not in prompt:
        return prompt
    prompt = re.sub(r"\s*Then critique\b.*?\brevised scores\.", "", prompt, flags=re.DOTALL)
    prompt = re.sub(r"Critique:.*?(?=\[End of answer\])", "", prompt, flags=re.DOTALL)
    return prompt.replace("First pass scores:\n", "").rstrip() + "\n\nYour answer:"


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass
class EQBenchConfig(FileBenchmarkConfig):
    """`path`: a file like eq_bench_v2_questions_171.json. `revise` asks for a critique and a second set of scores,
    which then counts; `max_new_tokens` should be about 1000 for that. `limit` takes the first questions.
    """

    name: str = "eq_bench"
    max_new_tokens: int = 60
    revise: bool = False


class EQBench(Benchmark):
    """Replies that cannot be read are in `unparsable` and `score_all` only. Under compat they are read by the
    published rule, and published.json has the published total."""

    name = "eq_bench"
    version = "1"
    primary = "score"

    def __init__(self, config: EQBenchConfig) -> None:
        self.config = config
        path = Path(config.path).expanduser() if config.path else _SAMPLE
        questions = read_questions(path)[: config.limit]
        self._references = {question.id: question.reference for question in questions}
        self._best = max(SCALE, key=lambda value: constant_total(list(self._references.values()), value))
        self._samples = [self._sample(question) for question in questions]
        first: dict[str, str] = {}
        self._dialogues = {question.id: first.setdefault(_opening(question), question.id) for question in questions}
        self.metrics = {
            "score": Metric(description="mean of the questions' scores, of 100; random numbers earn about 0"),
            "score_all": Metric(description="score with replies that cannot be read as 0"),
            "unparsable": Metric(False, description="share of replies that cannot be read"),
        }
        if config.revise:
            self.metrics["first_pass"] = Metric(description="score of the first set of numbers, before the critique")

    def _sample(self, question: Question) -> Sample:
        prompt = question.prompt if self.config.revise else single_pass(question.prompt)
        target = _written({emotion: f"{number:g}" for emotion, number in question.reference.items()})
        return Sample(question.id, (Message("user", prompt.strip()),), target)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        """Several questions ask about one dialogue, cut at other places: they share its first line."""
        return self._dialogues[sample.id]

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        sampling = Sampling(self.config.max_new_tokens, seed=self.config.seed)
        reply = (await roles.model.respond(Request(sample.messages, sampling=sampling))).text
        first, revised = self._read(reply, self._references[sample.id])
        counts = revised if self.config.revise else first
        values = {"score_all": counts or 0.0, "unparsable": float(counts is None)}
        read = {"score": counts, "first_pass": first, "revised": revised}
        return Score(values | {name: value for name, value in read.items() if value is not None}, raw=reply)

    def _read(self, reply: str, reference: Mapping[str, float]) -> tuple[float | None, float | None]:
        """The scores of the first and the revised numbers, of 100; None for what cannot be read."""
        if self.config.compat is not None:
            items = [score_item(given, reference) for given in official_reply(reply, self.config.revise)]
        else:
            parts = passes(strip_reasoning(reply)) if self.config.revise else (reply, "")
            items = [_item(part, reference) for part in parts]
        first, revised = (None if item is None else 10 * item for item in items)
        return first, revised

    def constant(self, sample: Sample) -> str:
        """The one number for every emotion of every question that scores best."""
        return self._answer(dict.fromkeys(self._references[sample.id], self._best))

    def chance(self, sample: Sample, rng: random.Random) -> str:
        return self._answer({emotion: rng.choice(SCALE) for emotion in self._references[sample.id]})

    def _answer(self, numbers: Mapping[str, int]) -> str:
        scores = _written(numbers)
        return f"First pass scores:\n{scores}\n\nRevised scores:\n{scores}" if self.config.revise else scores

    def write_artifacts(self, rows: Sequence[Row], folder: Path) -> None:
        """published.json under compat: `official_total`, with a warning where that calls the run failed."""
        if self.config.compat is None:
            return
        total = official_total(*([row.values.get(name) for row in rows] for name in ("first_pass", "revised")))
        if total["failed"]:
            said = "%.1f %% of replies are parsable: the published code calls a run under %.2f %% failed"
            log.warning(said, 100 * total["parsable"], 100 * PARSABLE)
        write_json(Path(folder) / "published.json", total)


def _opening(question: Question) -> str:
    """The instruction and the first line of the dialogue."""
    return "\n".join([line for line in question.prompt.splitlines() if line.strip()][:2])


def _item(text: str, reference: Mapping[str, float]) -> float | None:
    try:
        return score_item(parse_reply(text, list(reference)), reference)
    except Unreadable:
        return None


def _written(numbers: Mapping[str, object]) -> str:
    return "\n".join(f"{emotion}: {number}" for emotion, number in numbers.items())


def build(config: EQBenchConfig) -> EQBench:
    """The benchmark of a config. Raises UserError for a file that is missing or malformed."""
    return EQBench(config)
