"""PersonaMem: which of four replies fits the user as they are now, after a long history of conversations?

Jiang et al. 2025, arXiv 2504.14225. The history stands at the start of the prompt (`context: true`) or is left to the
personalizers that are measured (`context: false`): they find the user's own messages as the persona's history and the
dataset's description of the user as its description. Without any personalizer, `context: false` is the baseline that
knows nothing, which should always be reported beside (personamem note 8): answers leak through the options.

Read on: answers out of replies, questions and contexts on disk, scores of stated answers, the benchmark.
"""

from __future__ import annotations

import ast
import asyncio
import csv
import hashlib
import logging
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import orjson

from persona.benchmarks import FileBenchmarkConfig
from persona.benchmarks.personaeval import official_file
from persona.data.base import plain_task, register
from persona.data.rows import first_few, open_file
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark, Unscored
from persona.evaluation.judges.parsing import Unreadable, parse_choice, strip_reasoning
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Conversation, HistoryItem, Message, Persona, Request, Sample, Sampling, Score

log = logging.getLogger(__name__)

SIZES = ("32k", "128k", "1M")  # of the contexts in tokens: 10, 20 and 60 sessions
MODES = ("discriminative", "generative")
LETTERS = "abcd"
COLUMNS = (
    "persona_id", "question_id", "question_type", "topic", "distance_to_ref_in_blocks", "user_question_or_message",
    "correct_answer", "all_options", "shared_context_id", "end_index_in_shared_context",
)  # fmt: skip
TYPES = (
    "recall_user_shared_facts",
    "suggest_new_ideas",
    "acknowledge_latest_user_preferences",
    "track_full_preference_evolution",
    "revisit_reasons_behind_preference_updates",
    "provide_preference_aligned_recommendations",
    "generalize_to_new_scenarios",
)
# Labels of earlier releases, which the released files still hold (personamem note 3.1). Published figures keep the two
# labels of facts in the 32k file apart, and call recall_user_shared_facts there "Acknowledge Latest User Preference"
# and recalling_facts_mentioned_by_the_user "Recall User Shared Facts" (the authors' issue 29): compare by label.
ALIASES = {
    "recalling_facts_mentioned_by_the_user": TYPES[0],
    "identifying_new_things_not_mentioned_by_the_user": TYPES[1],
    "recalling_the_latest_user_preferences": TYPES[2],
    "acknowledge_latest_preferences": TYPES[2],
    "tracking_the_full_sequence_of_preference_updates": TYPES[3],
    "recalling_the_reasons_behind_previous_updates": TYPES[4],
    "recommendation_aligned_with_users_latest_preferences": TYPES[5],
    "generalizing_past_reasons_in_memory_to_new_scenarios": TYPES[6],
    "generalizing_to_new_scenarios": TYPES[6],
}

_HERE = Path(__file__).parent
_SAMPLE = _HERE / "samples" / "personamem"
QUESTION = Prompt.load(_HERE / "prompts" / "personamem" / "question.md")
_INSTRUCTION = QUESTION.text.split("{{ question }}")[1].split("{{ options }}")[0].strip()

# What a personalizer searches the user's messages for is the question, not the instruction and the options behind it.
TASK = register(replace(plain_task("personamem"), query_text=lambda prompt: prompt.split(_INSTRUCTION)[0].strip()))


# ---- answers out of replies ----------------------------------------------------------------------------------------


def _letters(text: str) -> set[str]:
    """The letters a published reading finds: all "(a)" to "(d)", or else all of these letters that are words."""
    return set(re.findall(r"\(([a-d])\)", text.lower())) or set(re.findall(r"\b([a-d])\b", text.lower()))


def _published(reply: str, gold: str) -> tuple[bool, bool]:
    tail = reply.rpartition("<final_answer>")[2].strip().removesuffix("</final_answer>").strip()
    readings = [_letters(tail), _letters(reply)]
    return {gold} in readings, all(len(found) != 1 for found in readings)


def read_answer(reply: str) -> str:
    """The letter a reply gives. Raises Unreadable where it gives none, or several.

    What stands in the last <final_answer> counts, and nothing behind its closing tag; where it holds no answer, the
    whole reply does. Reasoning is left aside, the article "a" is no letter.
    """
    reply = strip_reasoning(reply)
    opened = list(re.finditer(r"<final_answer>", reply, flags=re.I))
    if opened:
        final = re.split(r"</final_answer>", reply[opened[-1].end() :], flags=re.I)[0]
        if final.strip(" \t\n.*"):
            return _one_letter(final)
    return _one_letter(re.sub(r"</?final_answer>", " ", reply, flags=re.I))


def _one_letter(text: str) -> str:
    bracketed = set(re.findall(r"(?<!not )\(([a-d])\)", text.lower()))
    if len(bracketed) == 1:
        return bracketed.pop()  # as the options are written: nobody means anything else by it
    if re.fullmatch(r"(?:\W*\b[a-d]\b)+\W*", text.lower()) and len(_letters(text)) > 1:
        raise Unreadable(f"several letters and nothing else: {text.strip()!r:.40}")
    return parse_choice(text, LETTERS)


def grade(reply: str, gold: str, compat: str | None = None) -> tuple[bool, bool]:
    """Whether a reply is right, and whether it cannot be read (which counts as wrong). `gold` is a bare letter.

    compat="reference" (personamem note 5): right is a reply whose text behind the last <final_answer>, or else whose
    whole text, holds the gold letter and no other. Hence "A good pick is c" is wrong, as it holds an a; and the second
    reading can turn a wrong final answer into a right one.
    """
    if compat == "reference":
        return _published(reply, gold)
    try:
        return read_answer(reply) == gold, False
    except Unreadable:
        return False, True


def likeliest(scores: Sequence[tuple[float, int]], compat: str | None = None) -> int:
    """Which option is the likeliest, from (summed log p, tokens) of each: by the mean per token, the first of equals.

    compat="reference": by the sum, as the published script has it, which favours short options. Raises Unscored when
    a value is not a number.
    """
    values = [total if compat == "reference" else total / tokens for total, tokens in scores]
    if any(math.isnan(value) for value in values):
        raise Unscored(f"the log p of an option is not a number: {values}")
    return max(range(len(values)), key=values.__getitem__)  # max keeps the first of equals


# ---- questions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a questions file. `label` is its type as written there, `type` the same under its present name.

    `gold` is a bare letter; `options` the texts of (a) to (d) without the letters, `shown` as they stand in the file.
    The user has said the first `end` messages of `context` when they ask. Without options and context (a list of
    results) a question can be scored, not asked.
    """

    id: str
    persona: str
    label: str
    topic: str
    text: str
    gold: str
    blocks: int | None = None
    options: tuple[str, ...] = ()
    shown: str = ""
    context: str = ""
    end: int = 0

    @property
    def type(self) -> str:
        return ALIASES.get(self.label, self.label)


def distance_bucket(blocks: int) -> str:
    """Sessions between a question and what it refers to, as the paper's figure groups them: 0–2, 3–6, 7–10, …

    (The last group of the 128k contexts, which have 20 sessions, is called 19–22 here.)
    """
    low = 0 if blocks < 3 else blocks - (blocks - 3) % 4
    return f"{low}–{low + (2 if low == 0 else 3)}"


def parse_options(text: str, where: str) -> tuple[str, ...]:
    """The four options, (a) to (d), of a stringified list, without their letters. Raises UserError naming `where`."""
    try:
        parts = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        parts = re.split(r"(?=\([a-d]\) )", text)[1:]
    parts = parts if isinstance(parts, list) else []
    found = [re.fullmatch(r"\s*\(([a-d])\)\s*(.*\S)\s*", str(part), flags=re.S) for part in parts]
    options = {match[1]: match[2] for match in found if match}
    if len(found) != len(LETTERS) or sorted(options) != list(LETTERS):
        raise UserError(
            f"{where} has as all_options {text!r:.80}, which should be a list of four texts that begin with (a) to (d)"
        )
    return tuple(options[letter] for letter in LETTERS)


def _gold(text: str, where: str) -> str:
    match = re.fullmatch(r"\(?([a-d])\)?", text.strip().lower())
    if match is None:
        raise UserError(f"{where} has the correct answer {text!r:.40}, which should be one of (a), (b), (c) and (d)")
    return match[1]


def _whole(text: str, column: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{where} has {text!r:.40} as {column}, which should be a whole number") from None


def read_questions(path: Path | str) -> list[Question]:
    """The questions of an official CSV, or of a JSON list of results ("results" over personas, each with "details").

    Raises UserError naming file, row (counted from 1, without the header) and column for what is wrong, and for ids
    that occur twice.
    """
    path = Path(path)
    questions = _from_results(path) if path.suffix == ".json" else _from_csv(path)
    if not questions:
        raise UserError(f"{path} holds no questions")
    twice = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise UserError(f"{path} holds questions with the same question_id: {first_few(twice)}")
    if unknown := Counter(question.label for question in questions if question.type not in TYPES):
        log.warning("%s holds question types of other names, kept as they are: %s", path, dict(unknown))
    return questions


def _from_csv(path: Path) -> list[Question]:
    csv.field_size_limit(1 << 30)  # columns that are not read here may be longer than the module's 128 KiB
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or ())
            if missing := [name for name in COLUMNS if name not in columns]:
                found = ", ".join(columns) or "(none)"
                raise UserError(f"{path} has no column {', '.join(missing)}; its columns are {found}")
            return [_question(row, f"{path}, row {number}") for number, row in enumerate(reader, start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} could not be read as CSV in UTF-8: {error}") from error


def _question(row: Mapping[str, str | None], where: str) -> Question:
    if None in row or None in row.values():
        raise UserError(f"{where} has not as many fields as the file has columns")
    cell = {name: str(row[name]).strip() for name in COLUMNS}
    if empty := [name for name in COLUMNS if not cell[name] and name != "distance_to_ref_in_blocks"]:
        raise UserError(f"{where} has an empty {empty[0]}")
    blocks = cell["distance_to_ref_in_blocks"]
    return Question(
        id=cell["question_id"],
        persona=cell["persona_id"],
        label=cell["question_type"],
        topic=cell["topic"],
        text=cell["user_question_or_message"],
        gold=_gold(cell["correct_answer"], where),
        blocks=_whole(blocks, "distance_to_ref_in_blocks", where) if blocks else None,
        options=parse_options(cell["all_options"], where),
        shown=cell["all_options"],
        context=cell["shared_context_id"],
        end=_whole(cell["end_index_in_shared_context"], "end_index_in_shared_context", where),
    )


def _from_results(path: Path) -> list[Question]:
    try:
        with open_file(path) as stream:
            content = orjson.loads(stream.read())
        rows = [(str(part["persona_id"]), row) for part in content["results"] for row in part["details"]]
        return [
            Question(
                id=row["question_id"],
                persona=persona,
                label=row["question_type"],
                topic=row["topic"],
                text=row["question"],
                gold=_gold(row["ground_truth"], f"{path}, question {row['question_id']}"),
            )
            for persona, row in rows
        ]
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} holds broken JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} should hold results[].details[] with question_id, question, question_type, topic and "
            f"ground_truth, but: {error!r}"
        ) from error


# ---- contexts ------------------------------------------------------------------------------------------------------

_ROLES = ("system", "user", "assistant")
_SPEAKER = re.compile(r"^(?:User|Patient): ")  # the released texts begin with who is speaking
_KEPT = 4  # parsed contexts in memory: questions come context by context


@dataclass(frozen=True)
class _Entry:
    """Where a context is, a hash of its bytes, and of its messages only what samples need before they are asked."""

    offset: int
    length: int
    digest: str
    messages: int
    said: tuple[int, ...]  # positions of the user's messages
    descriptions: tuple[tuple[int, str], ...]  # system messages and where they stand


class Contexts:
    """A file of shared contexts (up to a million tokens each), one `{id: [{role, content}, ...]}` per line.

    Reads the file once, line by line, and keeps where each of the `wanted` contexts lies; a context is read when it is
    asked for, and the last few stay in memory. Raises UserError naming file and line for a line of another form, and
    naming the contexts that are not there.
    """

    def __init__(self, path: Path | str, wanted: Sequence[str]) -> None:
        self.path = Path(path)
        self._entries: dict[str, _Entry] = {}
        self._parsed: OrderedDict[str, Conversation] = OrderedDict()
        needed, offset, spare = set(wanted), 0, 0
        with open_file(self.path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    id, messages = self._parse(line, f"{self.path}, line {number}")
                    if id in self._entries:
                        raise UserError(f"{self.path}, line {number} holds the context {id:.16} once more")
                    if id in needed:
                        self._entries[id] = _Entry(
                            offset,
                            len(line),
                            hashlib.sha256(line.strip()).hexdigest()[:16],
                            len(messages),
                            tuple(i for i, message in enumerate(messages) if message.role == "user"),
                            tuple((i, m.content) for i, m in enumerate(messages) if m.role == "system"),
                        )
                    else:
                        spare += 1
                offset += len(line)
        if missing := [id for id in dict.fromkeys(wanted) if id not in self._entries]:
            raise UserError(f"{self.path} lacks contexts that questions refer to: {first_few(missing)}")
        if spare:
            log.info("%s holds %d contexts that no question refers to", self.path, spare)

    @staticmethod
    def _parse(line: bytes, where: str) -> tuple[str, Conversation]:
        try:
            ((id, messages),) = orjson.loads(line).items()
            read = tuple(Message(message["role"], message["content"]) for message in messages)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{where} holds broken JSON, column {error.colno}: {error.msg}") from error
        except (AttributeError, KeyError, TypeError, ValueError):
            found = line[:60].decode(errors="replace")
            raise UserError(f"{where} should be {{context id: [{{role, content}}, ...]}}, but is {found!r}") from None
        for number, message in enumerate(read):
            if message.role not in _ROLES or not isinstance(message.content, str):
                raise UserError(
                    f"{where}, message {number} (counted from 0) has the role {message.role!r} and a content of type "
                    f"{type(message.content).__name__}; it should have one of {', '.join(_ROLES)} and a string"
                )
        return id, read

    def entry(self, id: str) -> _Entry:
        """What is kept of a context in memory."""
        return self._entries[id]

    def messages(self, id: str) -> Conversation:
        """All messages of a context."""
        if id not in self._parsed:
            entry = self._entries[id]
            with open_file(self.path) as stream:
                stream.seek(entry.offset)
                line = stream.read(entry.length)
            if hashlib.sha256(line.strip()).hexdigest()[:16] != entry.digest:
                raise UserError(f"{self.path} changed while it was in use; start again")
            self._parsed[id] = self._parse(line, f"{self.path}, byte {entry.offset}")[1]
            while len(self._parsed) > _KEPT:
                self._parsed.popitem(last=False)
        self._parsed.move_to_end(id)
        return self._parsed[id]


class Said(Sequence[HistoryItem]):
    """What the user said in the first `end` messages of a context, oldest first, without "User: " in front of it.

    A lazy view: its length is known, its texts are read from the file when they are asked for.
    """

    def __init__(self, contexts: Contexts, context: str, end: int) -> None:
        self._contexts, self._context = contexts, context
        self._places = [place for place in contexts.entry(context).said if place < end]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> HistoryItem: ...
    @overload
    def __getitem__(self, index: slice) -> list[HistoryItem]: ...
    def __getitem__(self, index: int | slice) -> HistoryItem | list[HistoryItem]:
        messages = self._contexts.messages(self._context)
        if isinstance(index, slice):
            return [self._item(messages, place) for place in self._places[index]]
        return self._item(messages, self._places[index])

    def __iter__(self) -> Iterator[HistoryItem]:
        return iter(self[:])

    @staticmethod
    def _item(messages: Conversation, place: int) -> HistoryItem:
        return HistoryItem(str(place), _SPEAKER.sub("", messages[place].content))


def merged(messages: Conversation) -> Conversation:
    """For models without system messages (personamem note 3.3): they open the next message, and messages of one role
    in a row become one."""
    result: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.role == "system":
            waiting.append(f"[System]: {message.content}")
            continue
        content = "\n".join([*waiting, message.content])
        waiting = []
        if result and result[-1].role == message.role:
            result[-1] = Message(message.role, f"{result[-1].content}\n{content}")
        else:
            result.append(Message(message.role, content))
    return (*result, *(Message("user", text) for text in waiting))


# ---- scores of stated answers --------------------------------------------------------------------------------------


def score(
    predictions: Mapping[str, str], questions: Sequence[Question], compat: str | None = None
) -> dict[str, float | dict[str, dict[str, float]]]:
    """Scores of `{question id: letter or whole reply}`: `accuracy` over all questions, `macro_accuracy` (the mean over
    types), `invalid` (share of replies that cannot be read), `missing` (share of questions without a prediction), and
    `type`, `label`, `topic`, `distance`: for each value its `n` and its `accuracy`.

    Unreadable and missing answers are wrong. compat="reference" reads replies as `grade` says, leaves questions
    without a prediction out, as the published loop does with calls that failed, and takes the mean over labels as
    they stand in the file, which is what the authors give as accuracy (their issues 28 and 29). Raises UserError for
    ids that no question has, and when nothing is left to score.
    """
    known = {question.id for question in questions}
    if spare := [id for id in predictions if id not in known]:
        raise UserError(f"{len(spare)} predictions belong to no question: {first_few(spare)}")
    counted = [q for q in questions if compat != "reference" or q.id in predictions]
    if not counted:
        raise UserError("there is nothing to score: no predictions, or no questions")
    grades = {
        q.id: grade(predictions[q.id], q.gold, compat) if q.id in predictions else (False, False) for q in counted
    }

    def share(values: Sequence[bool]) -> float:
        return sum(values) / len(values)

    result: dict[str, Any] = {
        "n": len(counted),
        "accuracy": share([right for right, _ in grades.values()]),
        "invalid": share([invalid for _, invalid in grades.values()]),
        "missing": share([q.id not in predictions for q in counted]),
    }
    for name in ("type", "label", "topic", "distance"):
        rows: dict[str, list[bool]] = {}
        for question in counted:
            value = _groups(question).get(name)
            if value is not None:
                rows.setdefault(value, []).append(grades[question.id][0])
        result[name] = {value: {"n": len(hits), "accuracy": share(hits)} for value, hits in sorted(rows.items())}
    kinds = [part["accuracy"] for part in result[_kind(compat)].values()]
    return result | {"macro_accuracy": sum(kinds) / len(kinds)}


def _kind(compat: str | None) -> str:
    """The group that macro_accuracy is a mean over."""
    return "label" if compat == "reference" else "type"


def _groups(question: Question) -> dict[str, str]:
    groups = {"type": question.type, "label": question.label, "topic": question.topic}
    return groups if question.blocks is None else groups | {"distance": distance_bucket(question.blocks)}


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass
class PersonaMemConfig(FileBenchmarkConfig):
    """`path`: a folder with questions_<size>.csv and shared_contexts_<size>.jsonl, or the hub's data set
    bowen-upenn/PersonaMem. `limit` takes the first questions of the file.

    `mode`: "discriminative" shows the options and reads a letter, "generative" takes the option of the highest mean
    log p per token. `context`: whether the model sees the conversations. `merge` writes them without system messages,
    for models that have none.
    """

    name: str = "personamem"
    max_new_tokens: int = 1024
    size: str = "32k"
    mode: str = "discriminative"
    context: bool = True
    merge: bool = False


class PersonaMem(Benchmark):
    """A sample holds the question alone; the context in front of it is read when it is asked, and its hash is part of
    the persona's id, hence of the data's fingerprint. Questions come context by context, so that what a prompt has in
    common with the next one is its beginning."""

    name = "personamem"
    version = "1"
    primary = "accuracy"
    prompts = (QUESTION,)

    def __init__(self, config: PersonaMemConfig) -> None:
        for key, value, known in (("size", config.size, SIZES), ("mode", config.mode, MODES)):
            if value not in known:
                raise UserError(f"benchmark.{key}={value} is unknown; it should be one of {', '.join(known)}")
        self.config = config
        self.metrics = {
            "accuracy": Metric(description="share of questions whose best reply was picked"),
            "macro_accuracy": Metric(
                aggregate="ratio",
                columns=("weighted_accuracy", "weight"),
                description="mean over question types of their accuracy (a question: 1 / questions of its type)",
            ),
        }
        if config.mode == "discriminative":
            self.metrics["invalid"] = Metric(
                higher_is_better=False, description="share of replies that give no letter, or several; they are wrong"
            )
        place = str(_SAMPLE) if config.path is None else config.path
        if Path(place).is_file():
            raise UserError(f"benchmark.path={place} is a file; it should be the folder of questions and contexts")
        path = official_file(place, f"questions_{config.size}.csv")
        questions = read_questions(path)[: config.limit]
        self.contexts = Contexts(
            official_file(place, f"shared_contexts_{config.size}.jsonl"), [question.context for question in questions]
        )
        for question in questions:
            there = self.contexts.entry(question.context).messages
            if not 0 < question.end <= there:
                raise UserError(
                    f"{path}, question {question.id} ends at message {question.end} of its context, "
                    f"which has {there} messages: do questions and contexts belong together?"
                )
        first = {context: place for place, context in reversed(list(enumerate(q.context for q in questions)))}
        questions.sort(key=lambda question: (first[question.context], question.end))
        self._questions = {question.id: question for question in questions}
        self._counts = Counter(_groups(question)[_kind(config.compat)] for question in questions)
        self._personas: dict[tuple[str, str, int], Persona] = {}
        self._samples = [self._sample(question) for question in questions]

    def _persona(self, question: Question) -> Persona:
        key = (question.persona, question.context, question.end)
        if key not in self._personas:
            entry = self.contexts.entry(question.context)
            told = [text for place, text in entry.descriptions if place < question.end]
            self._personas[key] = Persona(
                id=f"{question.persona}/{entry.digest}/{question.end}",
                description=told[-1] if told else "",
                history=Said(self.contexts, question.context, question.end),
            )
        return self._personas[key]

    def _sample(self, question: Question) -> Sample:
        if self.config.mode == "generative":
            messages: Conversation = (Message("user", question.text),)
            options = question.options
        else:
            lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, question.options, strict=True)]
            shown = question.shown if self.config.compat == "reference" else "\n".join(lines)
            messages = QUESTION.messages(question=question.text, options=shown)
            options = tuple(f"({letter})" for letter in LETTERS)
        target = options[LETTERS.index(question.gold)]
        return Sample(question.id, messages, target, self._persona(question), options, TASK.name)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        """The persona: its contexts differ in the order of sessions only, and its questions share facts."""
        return self._questions[sample.id].persona

    def groups(self, sample: Sample) -> Mapping[str, str]:
        """`type` under its present name, `label` as the file has it, topic, and sessions back to what is asked for."""
        return _groups(self._questions[sample.id])

    def conversation(self, sample: Sample) -> Conversation:
        """All that the model is shown: the context up to the question (with `context`), then the question."""
        question = self._questions[sample.id]
        before = self.contexts.messages(question.context)[: question.end] if self.config.context else ()
        return merged((*before, *sample.messages)) if self.config.merge else (*before, *sample.messages)

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        gold = self._questions[sample.id].gold
        weight = 1 / self._counts[self.groups(sample)[_kind(self.config.compat)]]
        sampling = Sampling(self.config.max_new_tokens)
        request = Request(self.conversation(sample), sample.persona, sampling, task=TASK.name)
        if self.config.mode == "discriminative":
            reply = (await roles.model.respond(request)).text
            right, invalid = grade(reply, gold, self.config.compat)
            values = {"accuracy": float(right), "invalid": float(invalid)}
            return Score(values | {"weighted_accuracy": right * weight, "weight": weight}, raw=reply)
        options = sample.options or ()
        if roles.model.likelihoods:
            asked = (roles.model.loglikelihood(request, option) for option in options)
            place = likeliest(await asyncio.gather(*asked), self.config.compat)
        else:  # a constant or random answer can still choose; an endpoint says why it cannot
            chosen = await roles.model.choose(replace(request, options=options))
            place = likeliest([(value, 1) for value in chosen])
        right = LETTERS[place] == gold
        values = {"accuracy": float(right), "weighted_accuracy": right * weight, "weight": weight}
        return Score(values, raw=options[place])


def build(config: PersonaMemConfig) -> PersonaMem:
    return PersonaMem(config)
