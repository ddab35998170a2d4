"""PersonaGym: personas answer questions of five tasks, judges grade from 1 to 5; PersonaScore is the mean of tasks.

Samuel et al. 2024, arXiv 2407.18416. By default each question is graded by itself, with example replies for each score
where somebody plays the reference. `compat: reference` grades five questions at a time and averages as the published
code does, whose example replies were lost on the way (docs/errata.md).
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import json
import logging
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import orjson
from filelock import AsyncFileLock

from persona.benchmarks import FileBenchmarkConfig
from persona.data.rows import check_folder
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.judging import Rubric, Unscored, require
from persona.evaluation.judges.parsing import Unreadable, parse_integer, strip_reasoning
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import Row
from persona.evaluation.roles import Roles, Speaker
from persona.evaluation.statistics import Metric
from persona.files import atomic_write, inside
from persona.types import Conversation, Message, Persona, Request, Sample, Sampling, Score, Verdict

log = logging.getLogger(__name__)

TASKS = ("Expected Action", "Toxicity", "Linguistic Habits", "Persona Consistency", "Action Justification")
ALIASES = {"Toxicity Control": "Toxicity"}  # the published scores' name for it
SCALE = (1, 2, 3, 4, 5)
GROUP = 5  # questions graded in one prompt by the published code
TRIES = 5

_HERE = Path(__file__).parent
_SAMPLE = _HERE / "samples" / "personagym"
_WRITING_TOKENS = 2048


def _prompt(name: str) -> Prompt:
    return Prompt.load(_HERE / "prompts" / "personagym" / f"{name}.md")


ANSWER, OUTLINE, EXAMPLES = _prompt("answer"), _prompt("rubric"), _prompt("examples")
ENVIRONMENTS, QUESTIONS = _prompt("environments"), _prompt("questions")


@dataclass
class PersonaGymConfig(FileBenchmarkConfig):
    """`path` is a folder of <persona>.json files. With `personas`, a file of descriptions, questions that the folder
    lacks are written into it by the reference: `questions` for each task, set in some of the `environments` (a file of
    them; null takes ours). Replies are sampled, and their scores averaged over `seeds` replies to each question."""

    name: str = "personagym"
    max_new_tokens: int = 512
    temperature: float = 0.9
    top_p: float = 0.9
    seeds: int = 1
    personas: str | None = None
    environments: str | None = None
    questions: int = 10


# ---- scores --------------------------------------------------------------------------------------------------------


def persona_score(scores: Mapping[str, float]) -> float:
    """PersonaScore: the unweighted mean of the five tasks' scores (personagym note 5).

    `scores` has each task once, "Toxicity" also as "Toxicity Control"; entries "PersonaScore" and "PersonaScore SD"
    are passed over, so that the content of a scores.json can be given. Raises UserError for any other set of tasks.
    """
    values = [
        (ALIASES.get(name, name), value) for name, value in scores.items() if not name.startswith("PersonaScore")
    ]
    if sorted(task for task, _ in values) != sorted(TASKS):
        given = ", ".join(task for task, _ in values) or "none"
        raise UserError(f"a PersonaScore is over {', '.join(TASKS)}, each once; given are {given}")
    return sum(value for _, value in values) / len(TASKS)


def persona_scores(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """{persona: {task: mean over its scored rows, "PersonaScore": mean of the tasks}}, in the rows' order.

    A task without a scored row is None, and so is then the PersonaScore.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        task = values.setdefault(row.persona, {task: [] for task in TASKS})[row.task]
        task.extend([row.values["persona_score"]] if row.values else [])
    result: dict[str, dict[str, float | None]] = {}
    for persona, tasks in values.items():
        means = {task: statistics.fmean(found) if found else None for task, found in tasks.items()}
        whole = [mean for mean in means.values() if mean is not None]
        result[persona] = {**means, "PersonaScore": sum(whole) / len(TASKS) if len(whole) == len(TASKS) else None}
    return result


def parse_score(reply: str) -> int:
    """The score of one evaluation: what stands after "final score is". Raises Unreadable, also off the scale."""
    return parse_integer(reply, SCALE[0], SCALE[-1], after="final score is")


def reference_scores(reply: str) -> list[int]:
    """The published parser: one number for each "(i) Evaluation:" block, 0 for a block that it cannot read.

    Only the literal sentence counts, "4.5" is 4 and "45" is 45 (personagym note 5, defect 5).
    """
    blocks = re.split(r"\(\d+\) Evaluation:", reply)[1:]
    found = [re.search(r"Therefore, the final score is\s*(\d+)", block) for block in blocks]
    return [int(match.group(1)) if match else 0 for match in found]


def reference_mean(reply: str) -> float:
    """One judge's score of a group as published: the mean of those that are not 0; 0 where none is left."""
    read = [score for score in reference_scores(reply) if score]
    return sum(read) / len(read) if read else 0.0


def parse_examples(reply: str) -> dict[int, str]:
    """Example replies by score from lines "Score k: Response - ...", each with all lines up to the next one.

    Raises Unreadable unless each score from 1 to 5 is there once, with a text.
    """
    mark = r"^[ \t>#*_-]*Score[ \t]*([0-9]+)[ \t*_]*[:：][ \t*_]*(?:Response[ \t*_]*[-–—:：][ \t*_]*)?"
    _, *parts = re.split(mark, strip_reasoning(reply), flags=re.MULTILINE | re.IGNORECASE)
    bodies = [body.strip().strip('"“”').strip() for body in parts[1::2]]
    scores = [int(score) for score in parts[::2]]
    if sorted(scores) != list(SCALE) or not all(bodies):
        raise Unreadable(f"examples for the scores {', '.join(map(str, scores)) or 'none'}, where 1 to 5 belong")
    return dict(sorted(zip(scores, bodies, strict=True)))


_FINAL = "Therefore, the final score is {answer}."
_FRAME = _prompt("grade").text
# The definitions stand inside the prompt, so that its hash covers them.
GRADE = Rubric(
    Prompt("grade", _FRAME.replace("{{ rubric }}", OUTLINE.text.strip())), parse_score, SCALE, example=_FINAL
)
GRADE_GROUP = Rubric(
    _prompt("grade_group"),
    reference_mean,
    (1.0, 5.0),
    max_new_tokens=3000,
    example="\n".join(f"({number}) Evaluation: {_FINAL}" for number in range(1, GROUP + 1)),
)


# ---- files ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise UserError(
            f"{path} holds broken JSON in line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error


def read_questions(path: Path, whole: bool = True) -> dict[str, list[str]]:
    """{task: questions} of one persona's file, in the order of TASKS. Raises UserError for anything else in it, and,
    with `whole`, for a missing task."""
    content = _read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is {content!r:.60}, where an object of five tasks should be")
    tasks: dict[str, list[str]] = {}
    for name, questions in content.items():
        task = ALIASES.get(name, name)
        if task not in TASKS:
            raise UserError(f"{path} has a task {name!r}, which is none of {', '.join(TASKS)}")
        if task in tasks:
            raise UserError(f"{path} has the task {task} twice: as {task!r} and by its other name")
        if not isinstance(questions, list) or not questions:
            raise UserError(f"{path}, task {task}, is {questions!r:.60}, where a list of questions should be")
        for number, question in enumerate(questions, start=1):
            if not isinstance(question, str) or not question.strip():
                raise UserError(f"{path}, task {task}, question {number} is {question!r:.60}, which should be a text")
        tasks[task] = questions
    missing = [task for task in TASKS if task not in tasks]
    if whole and missing:
        raise UserError(f"{path} lacks the tasks {', '.join(missing)}; it has {', '.join(content) or 'none'}")
    return {task: tasks[task] for task in TASKS if task in tasks}


def read_texts(path: Path | str, key: str) -> list[str]:
    """The texts of a file: a JSON list of strings (.json), or one text per line. Raises UserError naming `key` where
    there are none, or one is no text or there twice."""
    path = Path(path)
    if path.suffix == ".json":
        texts = _read(path)
    else:
        try:
            texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key} {path} could not be read: {error}") from error
    if not isinstance(texts, list) or not texts:
        raise UserError(f"{key} {path} holds {texts!r:.60}, where a list of texts should be")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{key} {path}, text {number} is {text!r:.60}, which should be a text")
        if texts.index(text) != number - 1:
            raise UserError(f"{key} {path}, text {number} is the same as text {texts.index(text) + 1}: {text!r:.60}")
    return texts


def _check_names(personas: Sequence[str], path: str) -> None:
    for persona in personas:
        if Path(persona).name != persona or len(f"{persona}.json".encode()) > 255:
            raise UserError(
                f"personas {path}: {persona!r:.80} cannot name a file; it should be short and hold no slash"
            )


# ---- questions by the reference ------------------------------------------------------------------------------------


def parse_list(reply: str) -> list[str]:
    """The texts of a JSON or Python list, whatever stands around it. Raises Unreadable."""
    text = strip_reasoning(reply)
    inside = text[text.find("[") : text.rfind("]") + 1]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(inside)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list) and found and all(isinstance(entry, str) and entry.strip() for entry in found):
            return [entry.strip() for entry in found]
    raise Unreadable("no list of texts")


async def _try(
    reference: Speaker, messages: Conversation, seed: int, accept: Callable[[str], list[str]], wanted: str
) -> list[str]:
    """The first of five tries that `accept` takes (it raises Unreadable). Raises Unscored when it takes none."""
    reason, raw = "", ""
    for number in range(TRIES):
        sampling = Sampling(_WRITING_TOKENS, temperature=0.9, top_p=0.9, seed=draw(seed, number))
        raw = (await reference.respond(Request(messages, sampling=sampling))).text
        try:
            return accept(raw)
        except Unreadable as error:
            reason = str(error)
    raise Unscored(f"the reference gave no {wanted} in {TRIES} tries; the last one: {reason}", raw)


async def choose_environments(persona: str, environments: Sequence[str], reference: Speaker, seed: int) -> list[str]:
    """Those of `environments` that `reference` names as relevant, in their order; it may name others, which do not
    count. Raises Unscored when five tries name none."""

    def accept(reply: str) -> list[str]:
        named = {text.casefold() for text in parse_list(reply)}
        if not (chosen := [environment for environment in environments if environment.casefold() in named]):
            raise Unreadable("none of the environments")
        return chosen

    messages = ENVIRONMENTS.messages(persona=persona, environments=_bullets(environments))
    return await _try(reference, messages, draw(seed, persona), accept, "list of environments")


async def write_questions(
    persona: str, task: str, environments: Sequence[str], number: int, reference: Speaker, seed: int
) -> list[str]:
    """Exactly `number` questions of one task. Raises Unscored when no list of five tries has that length: no other
    task's questions stand in for it, nor does a list of another length (personagym note 5, defect 7)."""

    def accept(reply: str) -> list[str]:
        questions = parse_list(reply)
        if len(questions) != number:
            raise Unreadable(f"a list of {len(questions)}")
        return questions

    messages = QUESTIONS.messages(persona=persona, task=task, environments=_bullets(environments), number=number)
    return await _try(reference, messages, draw(seed, persona, task), accept, f"list of {number} {task} questions")


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def draw(*parts: object) -> int:
    """A seed that depends on the parts only."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """What one sample asks: some questions (by place) of one task; None where the reference writes them first."""

    persona: str
    task: str
    places: tuple[int, ...]
    questions: tuple[str, ...] | None


class PersonaGym(Benchmark):
    """A sample is one question, or under `compat: reference` up to five questions of one persona and task.

    Samples come question by question, over all personas and tasks, so that any `limit` weighs the tasks alike.
    """

    name = "personagym"
    version = "1"
    primary = "persona_score"

    def __init__(self, config: PersonaGymConfig):
        self.config, self.grouped = config, config.compat == "reference"
        for key in ("seeds", "questions"):
            if getattr(config, key) < 1:
                raise UserError(f"benchmark.{key}={getattr(config, key)} has to be at least 1")
        self.folder = Path(config.path) if config.path else _SAMPLE / "questions"
        self.needs = ("judge", "reference") if config.personas else ("judge",)
        self.environments = read_texts(config.environments or _SAMPLE / "environments.json", "environments")
        self.personas = self._personas()
        self._items = dict(self._list_items()[: config.limit])
        self._writing: dict[str, asyncio.Task[dict[str, list[str]]]] = {}
        self._failed: dict[tuple[str, str], Unscored] = {}
        self._warned = False
        said = "mean score from 1 to 5 over questions, each task weighing alike"
        of_tasks = Metric(
            aggregate="group_mean", columns=("persona_score", "task"), classes=len(TASKS), description=said
        )
        self.metrics = {"persona_score": of_tasks}
        if self.grouped:
            self.prompts: Sequence[Prompt] = (ANSWER, OUTLINE, GRADE_GROUP.prompt)
            said = (
                "share of scores that no judge's reply gave (they count as published: left out, or 0 where all fail)"
            )
            self.metrics["unparsed"] = Metric(higher_is_better=False, description=said)
        else:
            self.prompts = (ANSWER, GRADE.prompt, OUTLINE, EXAMPLES)
            said = "share of questions graded with example replies for each score (0 without a reference)"
            self.metrics["with_examples"] = Metric(description=said)
        if config.personas:
            self.prompts = (*self.prompts, ENVIRONMENTS, QUESTIONS)

    # -- samples

    def _personas(self) -> list[str]:
        if self.config.personas:
            if not self.config.path:
                raise UserError("benchmark.personas needs benchmark.path, the folder that keeps the questions written")
            personas = read_texts(self.config.personas, "personas")
            _check_names(personas, self.config.personas)
            return personas
        check_folder(self.folder, "path", "a folder with a file <persona>.json for each persona")
        personas = sorted(path.stem for path in self.folder.glob("*.json"))
        if not personas:
            raise UserError(f"path {self.folder} holds no <persona>.json file")
        return personas

    def _list_items(self) -> list[tuple[str, _Item]]:
        size = GROUP if self.grouped else 1
        found = []
        for number, persona in enumerate(self.personas, start=1):
            tasks: dict[str, list[str]] | None = None
            if not self.config.personas:
                tasks = read_questions(self._file(persona))
            for order, task in enumerate(TASKS):
                count = len(tasks[task]) if tasks else self.config.questions
                for start in range(0, count, size):
                    places = tuple(range(start, min(start + size, count)))
                    questions = tuple(tasks[task][place] for place in places) if tasks else None
                    shown = f"{places[0] + 1}" + (f"-{places[-1] + 1}" if self.grouped else "")
                    name = f"{number:03}/{task}/{shown}"
                    found.append(((start, number, order), (name, _Item(persona, task, places, questions))))
        return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]

    def _file(self, persona: str) -> Path:
        return inside(self.folder, f"{persona}.json")

    def samples(self) -> Sequence[Sample]:
        return [self._sample(name, item) for name, item in self._items.items()]

    def _sample(self, name: str, item: _Item) -> Sample:
        # Not the text of questions that are still to be written: samples are the same before and after.
        unwritten = [f"(question {place + 1} of {item.task} in {self.folder})" for place in item.places]
        messages = (_system(item.persona), *(Message("user", text) for text in item.questions or unwritten))
        return Sample(name, messages, persona=_person(item.persona), task=item.task)

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return {"task": sample.task}

    def constant(self, sample: Sample) -> str:
        return "I am not sure what to say to that."

    def chance(self, sample: Sample, rng: random.Random) -> str:
        """Somebody says who they are: one of the personas, mostly another one."""
        return f"I am this person: {rng.choice(self.personas)}."

    # -- an episode

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        item = self._items[sample.id]
        questions = item.questions or await self._written(item, roles)
        told, examples = await asyncio.gather(
            asyncio.gather(*(self._answers(sample, item, questions, n, roles) for n in range(self.config.seeds))),
            self._examples(item, questions, roles),
        )
        judged = await asyncio.gather(*(self._judge(item, questions, replies, examples, roles) for replies in told))
        said = [reply for replies in told for reply in replies]
        kept = Score(
            raw=said[0] if len(said) == 1 else "\n\n".join(f"({n}) {reply}" for n, reply in enumerate(said, start=1)),
            verdicts=tuple(verdict for verdicts in judged for verdict in verdicts),
            transcript=_transcript(item.persona, questions, told) if len(said) > 1 or not item.questions else (),
        )
        # One score for each seed: the mean of its readable verdicts.
        means = [statistics.fmean(values) for verdicts in judged if (values := _numbers(verdicts))]
        if not means:
            return replace(kept, reason="no judge gave a score that can be read")
        scores = {"persona_score": statistics.fmean(means), "task": float(TASKS.index(item.task))}
        if self.grouped:
            scores["unparsed"] = statistics.fmean(_unparsed(verdict.raw, len(questions)) for verdict in kept.verdicts)
        else:
            scores["with_examples"] = float(bool(examples))
        return replace(kept, values=scores)

    async def _answers(
        self, sample: Sample, item: _Item, questions: Sequence[str], number: int, roles: Roles
    ) -> list[str]:
        """One reply to each question; no question sees another one."""
        config, requests = self.config, []
        for place, question in zip(item.places, questions, strict=True):
            seed = draw(config.seed, item.persona, item.task, place, number)
            sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, seed=seed)
            messages = (_system(item.persona), Message("user", question))
            requests.append(Request(messages, sample.persona, sampling))
        return [reply.text for reply in await asyncio.gather(*map(roles.model.respond, requests))]

    async def _examples(self, item: _Item, questions: Sequence[str], roles: Roles) -> str:
        """An example reply for each score, as it stands in the judge's prompt; empty where there is none."""
        if self.grouped:
            return ""
        if roles.reference is None:
            if not self._warned:
                log.warning("personagym: there is no reference, so replies are graded without examples for each score")
            self._warned = True
            return ""
        (question,) = questions
        outline = _outline(item, question, None, "")
        request = Request(EXAMPLES.messages(outline=outline), sampling=Sampling(_WRITING_TOKENS))
        try:
            reply = await roles.reference.respond(request)
            return "\n\n".join(f"Score {score}: {text}" for score, text in parse_examples(reply.text).items())
        except (Unreadable, Unscored):
            return ""  # with_examples tells how many there are

    async def _judge(
        self, item: _Item, questions: Sequence[str], replies: Sequence[str], examples: str, roles: Roles
    ) -> list[Verdict]:
        if not self.grouped:
            slots = {"task": item.task, "persona": item.persona, "question": questions[0], "response": replies[0]}
            return await roles.judge(GRADE, **slots, examples=examples)
        # As published: question i gets the i-th character of "Score 1: ..." for its examples, and the blocks stand in
        # the prompt as a Python list does.
        pairs = zip("Score", questions, replies, strict=False)
        blocks = [_outline(item, question, reply, letter) for letter, question, reply in pairs]
        return await roles.judge(GRADE_GROUP, rubrics=repr(blocks), number=len(blocks))

    # -- questions that are not there yet

    async def _written(self, item: _Item, roles: Roles) -> tuple[str, ...]:
        """The item's questions from the persona's file, which is written first where it lacks the task."""
        persona = item.persona
        if persona not in self._writing:  # one episode writes, the others wait for it
            self._writing[persona] = asyncio.ensure_future(self._write(persona, roles.reference))
            self._writing[persona].add_done_callback(lambda _: self._writing.pop(persona))
        tasks = await asyncio.shield(self._writing[persona])
        if item.task not in tasks:
            failure = self._failed[persona, item.task]
            raise Unscored(failure.reason, failure.raw, failed=failure.failed)
        found, wanted = len(tasks[item.task]), self.config.questions
        if found != wanted:
            where = f"{self._file(persona)} has {found} {item.task} questions"
            raise UserError(f"{where}, where benchmark.questions={wanted}")
        return tuple(tasks[item.task][place] for place in item.places)

    async def _write(self, persona: str, reference: Speaker | None) -> dict[str, list[str]]:
        path, seed = self._file(persona), self.config.seed
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"path {self.folder} cannot be made: {error.strerror}") from error
        # Several processes may share the folder; what is written once is the same for all, and after a kill.
        async with AsyncFileLock(self.folder / f".{draw(persona)}.lock"):
            tasks = read_questions(path, whole=False) if path.exists() else {}
            missing = [task for task in TASKS if task not in tasks and (persona, task) not in self._failed]
            if not missing:
                return tasks
            assert reference is not None  # in `needs`
            try:
                chosen = await choose_environments(persona, self.environments, reference, seed)
            except Unscored as error:
                self._failed |= {(persona, task): error for task in missing}
                return tasks
            number = self.config.questions
            written = await asyncio.gather(
                *(write_questions(persona, task, chosen, number, reference, seed) for task in missing),
                return_exceptions=True,
            )
            for task, result in zip(missing, written, strict=True):
                if isinstance(result, Unscored):
                    self._failed[persona, task] = result
                elif isinstance(result, BaseException):
                    raise result
                else:
                    tasks[task] = result
            tasks = {task: tasks[task] for task in TASKS if task in tasks}
            if tasks:
                with atomic_write(path) as temporary:
                    temporary.write_bytes(orjson.dumps(tasks, option=orjson.OPT_INDENT_2))
            return tasks

    # -- results

    def write_artifacts(self, rows: Sequence[Row], folder: Path) -> None:
        """persona_scores.json with every persona's scores, and scores.json with the model's (as published: means over
        personas, and the PersonaScore's standard deviation over them); null where a task has no scored question."""
        each = persona_scores(rows)
        means: dict[str, float | None] = {}
        for name in (*TASKS, "PersonaScore"):
            known = [value for scores in each.values() if (value := scores[name]) is not None]
            means[name] = statistics.fmean(known) if known else None
        means["PersonaScore SD"] = statistics.stdev(known) if len(known) > 1 else None
        for name, content in (("scores.json", means), ("persona_scores.json", each)):
            with atomic_write(folder / name) as temporary:
                temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _person(text: str) -> Persona:
    return Persona(text, text)


@cache
def _system(persona: str) -> Message:
    return ANSWER.messages(persona=persona)[0]


def _outline(item: _Item, question: str, response: str | None, examples: str) -> str:
    slots = {"persona": item.persona, "question": question, "response": response, "examples": examples}
    return OUTLINE.messages(task=item.task, **slots)[0].content


def _transcript(persona: str, questions: Sequence[str], told: Sequence[Sequence[str]]) -> Conversation:
    """Every question with its reply, one after the other (each was a conversation of its own), for each seed."""
    pairs = [pair for replies in told for pair in zip(questions, replies, strict=True)]
    turns = [(Message("user", question), Message("assistant", reply)) for question, reply in pairs]
    return (_system(persona), *(message for turn in turns for message in turn))


def _numbers(verdicts: Sequence[Verdict]) -> list[float]:
    return [float(value) for value in require(verdicts)]


def _unparsed(reply: str, number: int) -> float:
    """Share of a group's `number` scores that the published parser does not find in a judge's reply."""
    return max(0, number - sum(1 for score in reference_scores(reply) if score)) / number


def build(config: PersonaGymConfig) -> PersonaGym:
    return PersonaGym(config)
