"""RMTBench: whole role-play conversations in English or Chinese, a judge on every reply, and how replies wear off.

The user's turns are fixed; the model answers each with its own earlier replies before it, never another's (rmtbench
§3). The paper's judge prompts and scales are not published: rubrics and scales here are ours (rmtbench §3, proposal).
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from persona.benchmarks import FileBenchmarkConfig
from persona.benchmarks.personaeval import official_file
from persona.data.rows import field, read_json
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.judging import Rubric, require
from persona.evaluation.judges.parsing import parse_integer
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import Curve, Row, write_curves
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Estimate, Metric, estimate
from persona.types import Message, Persona, Request, Sample, Sampling, Score, Verdict

LANGUAGES = ("en", "zh")
_PROMPTS = Path(__file__).parent / "prompts" / "rmtbench"
_SAMPLES = Path(__file__).parent / "samples" / "rmtbench"
SYSTEM = {language: Prompt.load(_PROMPTS / f"system_{language}.md") for language in LANGUAGES}


def _scale(reply: str) -> float:
    return float(parse_integer(reply, 1, 5, after="final score"))


def _binary(reply: str) -> float:
    return float(parse_integer(reply, 0, 1, after="final score"))


@dataclass(frozen=True)
class Dimension:
    """One of the paper's seven: its rubric, and what it asks, for the report."""

    rubric: Rubric
    description: str

    def points(self, value: float) -> float:
        """A verdict on 0–100: (x - 1) / 4 · 100 for 1–5, 100 x for 0 and 1."""
        low, *_, high = map(float, self.rubric.answers)
        return 100 * (value - low) / (high - low)


def _dimension(file: str, description: str, scale: bool = False) -> Dimension:
    parse, answers = (_scale, (1, 2, 3, 4, 5)) if scale else (_binary, (0, 1))
    rubric = Rubric.load(_PROMPTS / f"{file}.md", parse, answers, example="Final score: {answer}")
    return Dimension(rubric, description)


DIMENSIONS = {
    "EE": _dimension("emotional_expression", "emotional expression: a living feeling in the character's manner", True),
    "EC": _dimension("emotional_comprehension", "emotional comprehension: what the user feels is taken up", True),
    "PA": _dimension("plot_advancement", "plot advancement: the conversation is moved on", True),
    "CU": _dimension("character_understanding", "character understanding: right for this character"),
    "CM": _dimension("character_maintenance", "character maintenance: stays in the role"),
    "SEC": _dimension("security", "security: safe where the user asks for what is not"),
    "UPA": _dimension("preference_awareness", "user preference awareness: what the user told is applied later"),
}
# A scenario of the files, and what is judged in it. The last one ("poison") is withheld from the published files.
SCENARIOS = {
    "character_understanding": ("CU",),
    "character_maintenance": ("CM",),
    "implicit_motivations": ("EE", "EC", "PA"),
    "user_preference": ("UPA",),
    "security": ("SEC",),
}


# ---- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """The reply to turn `turn` (counted from 0) is examined on `question`; `answer` is what is expected of it."""

    turn: int
    question: str
    answer: str


@dataclass(frozen=True)
class Block:
    """The user's turns of one dialogue."""

    turns: tuple[str, ...]
    probes: tuple[Probe, ...] = ()

    def __add__(self, other: Block) -> Block:
        """One dialogue after the other, as one."""
        moved = tuple(Probe(probe.turn + len(self.turns), probe.question, probe.answer) for probe in other.probes)
        return Block(self.turns + other.turns, self.probes + moved)


@dataclass(frozen=True)
class Character:
    """`name` may be empty: abstract characters have traits only. `id`: the place in the file, from 1, and the name."""

    id: str
    name: str
    description: str
    blocks: Mapping[str, tuple[Block, ...]]


def read_characters(path: Path) -> list[Character]:
    """The characters of an RMTBench file, a JSON list of records (rmtbench §4).

    A block is the list of the user's turns; in `user_preference` it is {question, answer, chat}, with question and
    answer a text or a list of texts each. A probe belongs to the turn that holds its question, else to the last one.
    Raises UserError naming file, record and block for anything else.
    """
    return [_character(record, number, path) for number, record, _ in read_json(path, "item")]


def _character(record: Any, number: int, path: Path) -> Character:
    where = f"{path}, record {number}"
    name, description = field(record, "name", where).strip(), field(record, "description", where).strip()
    if not description:
        raise UserError(f"{where} has an empty description, where the character should be told")
    odd = [key for key, value in record.items() if isinstance(value, list) and key not in SCENARIOS]
    if odd:
        raise UserError(f"{where} has a list under {odd[0]!r}, which is no scenario: {', '.join(SCENARIOS)}")
    blocks = {}
    for scenario in (key for key in SCENARIOS if key in record):
        if not isinstance(record[scenario], list):
            raise UserError(f"{where} has {record[scenario]!r:.60} as {scenario}, which should be a list of blocks")
        places = enumerate(record[scenario], start=1)
        blocks[scenario] = tuple(_block(block, scenario, f"{where}, {scenario} block {i}") for i, block in places)
    if not any(blocks.values()):
        raise UserError(f"{where} has no dialogues; its scenarios should be among {', '.join(SCENARIOS)}")
    return Character(f"{number}-{name}" if name else str(number), name, description, blocks)


def _block(block: Any, scenario: str, where: str) -> Block:
    if scenario != "user_preference":
        return Block(_turns(block, where))
    if not isinstance(block, dict) or (missing := [key for key in ("question", "answer", "chat") if key not in block]):
        found = f"has no {missing[0]}" if isinstance(block, dict) else f"is {block!r:.60}"
        raise UserError(f"{where} {found}; it should be an object of question, answer and chat")
    turns = _turns(block["chat"], f"{where}, chat")
    questions, answers = (_texts(block[key], f"{where}, {key}") for key in ("question", "answer"))
    if len(questions) != len(answers):
        raise UserError(f"{where} has {len(questions)} questions and {len(answers)} answers; there should be as many")
    asked = zip(questions, answers, strict=True)
    return Block(turns, tuple(Probe(_turn_of(question, turns), question, answer) for question, answer in asked))


def _turns(block: Any, where: str) -> tuple[str, ...]:
    if not isinstance(block, list) or not block:
        raise UserError(f"{where} is {block!r:.60}, which should be a list of the user's turns")
    for turn in block:
        if not isinstance(turn, str) or not turn.strip():
            raise UserError(f"{where} holds {turn!r:.60}, which should be a turn of the user, as text")
    return tuple(block)


def _texts(value: Any, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where} is {value!r:.60}, which should be a text or a list of texts")
    return texts


def _turn_of(question: str, turns: Sequence[str]) -> int:
    asked = [i for i, turn in enumerate(turns) if _plain(question) in _plain(turn)]
    return asked[-1] if asked else len(turns) - 1


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass
class RMTBenchConfig(FileBenchmarkConfig):
    """`path`: a folder with rmtbench_claude_en.json and rmtbench_claude_zh.json, or one file, such as a claude45 one,
    or the hub's data set xiangh/RMTBENCH (whose terms have to be accepted there first). `chain` makes one extra-long
    dialogue of all blocks that a character has in a scenario. `limit` draws dialogues by `seed`.
    """

    name: str = "rmtbench"
    max_new_tokens: int = 256
    language: str = "en"
    chain: bool = False


@dataclass(frozen=True)
class _Asked:
    """One question to the judges: what one dimension says of the reply to one turn."""

    turn: int
    dimension: str
    slots: Mapping[str, object]


class RMTBench(Benchmark):
    """One episode is one dialogue. Characters weigh alike in every metric but `drift` and `unjudged`."""

    name = "rmtbench"
    version = "1"
    primary = "average"
    needs = ("judge",)
    prompts = (*SYSTEM.values(), *(dimension.rubric.prompt for dimension in DIMENSIONS.values()))

    def __init__(self, config: RMTBenchConfig) -> None:
        if config.language not in LANGUAGES:
            raise UserError(f"benchmark.language={config.language} is unknown; it should be {' or '.join(LANGUAGES)}")
        if config.compat is not None:
            raise UserError(f"benchmark.compat={config.compat}: no code of RMTBench was published to agree with")
        self.config = config
        place = config.path or str(_SAMPLES)
        one = Path(place).expanduser()
        path = one if one.is_file() else official_file(place, f"rmtbench_claude_{config.language}.json")
        other = next(language for language in LANGUAGES if language != config.language)
        if path.stem.endswith(f"_{other}"):
            raise UserError(f"benchmark.path={place} is in another language than benchmark.language={config.language}")
        dialogues = list(self._dialogues(read_characters(path)))
        if not dialogues:
            raise UserError(f"{path} holds no characters; it should be a JSON list of them")
        if config.limit is not None and config.limit < len(dialogues):
            kept = random.Random(config.seed).sample(range(len(dialogues)), config.limit)
            dialogues = [dialogues[i] for i in sorted(kept)]
        self._samples = [sample for sample, _, _ in dialogues]
        self._characters = {sample.id: character for sample, character, _ in dialogues}
        self._blocks = {sample.id: block for sample, _, block in dialogues}
        self._weights = self._weigh()
        asked = [name for name in DIMENSIONS if any(name in SCENARIOS[sample.task] for sample in self._samples)]
        absent = ", ".join(name for name in DIMENSIONS if name not in asked)
        means = f"mean of {', '.join(asked)}" + (f"; absent, as no dialogue asks for it: {absent}" if absent else "")
        # A dimension that no dialogue asks for stays listed, and has no number.
        self.metrics = {
            "average": Metric(aggregate="ratio", columns=("average_sum", "average_weight"), description=means),
            **{
                name: Metric(aggregate="ratio", columns=(f"{name}_sum", f"{name}_weight"), description=of.description)
                for name, of in DIMENSIONS.items()
            },
            "drift": Metric(description="a dialogue's second half minus its first half, in points; preferences aside"),
            "unjudged": Metric(
                higher_is_better=False,
                aggregate="ratio",
                columns=("unread", "questions"),
                description="share of questions to which no judge's answer could be read",
            ),
        }

    def _dialogues(self, characters: Sequence[Character]) -> Iterator[tuple[Sample, Character, Block]]:
        for character in characters:
            for scenario, blocks in character.blocks.items():
                if self.config.chain and blocks:
                    blocks = (sum(blocks[1:], start=blocks[0]),)
                for number, block in enumerate(blocks, start=1):
                    place = "chain" if self.config.chain else str(number)
                    yield self._sample(character, scenario, place, block), character, block

    def _sample(self, character: Character, scenario: str, place: str, block: Block) -> Sample:
        """The sample holds the whole script; the truth, which only judges see, stands in its target."""
        prompt = SYSTEM[self.config.language]
        script = prompt.messages(name=character.name, description=character.description)
        script += tuple(Message("user", turn) for turn in block.turns)
        id = f"{self.config.language}-{character.id}-{scenario}-{place}"
        truth = "\n".join(f"{probe.question} → {probe.answer}" for probe in block.probes)
        attributes = {"name": character.name} if character.name else {}
        persona = Persona(character.id, character.description, attributes=attributes)
        return Sample(id, script, truth, persona, task=scenario)

    def _questions(self, sample: Sample) -> list[tuple[int, str, dict[str, object]]]:
        """(turn, dimension, what only this dimension is told) of all that is asked about a dialogue."""
        block = self._blocks[sample.id]
        if sample.task == "user_preference":
            return [(p.turn, "UPA", {"question": p.question, "answer": p.answer}) for p in block.probes]
        return [(turn, name, {}) for turn in range(len(block.turns)) for name in SCENARIOS[sample.task]]

    def _weigh(self) -> dict[tuple[str, str], float]:
        """(character, dimension) → the weight of one question: a character's questions in a dimension weigh 1 over the
        number of characters, all of them together, so that sums of weighted points are means of characters' means."""
        counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for sample in self._samples:
            for _, name, _ in self._questions(sample):
                counts[name][self.cluster(sample)] += 1
        return {
            (character, name): 1 / (len(of) * count) for name, of in counts.items() for character, count in of.items()
        }

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return {"scenario": sample.task, "language": self.config.language}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        system, *turns = sample.messages
        said = [system]
        for turn in turns:
            said.append(turn)
            sampling = Sampling(self.config.max_new_tokens, seed=self.config.seed)
            reply = await roles.model.respond(Request(tuple(said), sample.persona, sampling))
            said.append(Message("assistant", reply.text))
        questions = [_Asked(*question) for question in self._questions(sample)]
        answers = await asyncio.gather(*(self._ask(sample, question, said, roles) for question in questions))
        verdicts = tuple(verdict for answer in answers for verdict in answer)
        record: dict[str, Any] = {"raw": said[-1].content, "verdicts": verdicts, "transcript": tuple(said)}
        read = [
            (question, DIMENSIONS[question.dimension].points(fmean(map(float, values))))
            for question, answer in zip(questions, answers, strict=True)
            if (values := require(answer))
        ]
        if not read:
            reason = f"no verdict on any of {len(questions)} questions could be read, the first: {verdicts[0].reason}"
            return Score(reason=reason, **record)
        return Score(self._values(sample, read, len(questions)), **record)

    async def _ask(self, sample: Sample, asked: _Asked, said: Sequence[Message], roles: Roles) -> list[Verdict]:
        rubric, place = DIMENSIONS[asked.dimension].rubric, 1 + 2 * asked.turn
        character = self._characters[sample.id]
        slots = {
            "card": f"{character.name}: {character.description}" if character.name else character.description,
            "dialogue": "\n\n".join(map(_line, said[1:place])) or "(nothing yet)",
            "message": said[place].content,
            "reply": said[place + 1].content,
            **asked.slots,
        }
        return await roles.judge(rubric, **slots)

    def _values(self, sample: Sample, read: Sequence[tuple[_Asked, float]], questions: int) -> dict[str, float]:
        values: dict[str, float] = {"questions": float(questions), "unread": float(questions - len(read))}
        for name in SCENARIOS[sample.task]:
            points = [value for asked, value in read if asked.dimension == name]
            if points:
                weight = self._weights[self.cluster(sample), name]
                values |= {name: fmean(points), f"{name}_sum": weight * sum(points)}
                values[f"{name}_weight"] = weight * len(points)
        for column in ("sum", "weight"):
            values[f"average_{column}"] = sum(values.get(f"{name}_{column}", 0.0) for name in SCENARIOS[sample.task])
        if sample.task == "user_preference":
            return values  # probes stand where the file puts them: the mean of a round would be that of other rounds
        by_turn = defaultdict(list)
        for asked, value in read:
            by_turn[asked.turn].append(value)
        means = {turn: fmean(points) for turn, points in sorted(by_turn.items())}
        values |= {f"round_{turn + 1}": mean for turn, mean in means.items()}
        n = len(sample.messages) - 1
        early = [mean for turn, mean in means.items() if turn < n // 2]
        late = [mean for turn, mean in means.items() if turn >= n - n // 2]  # an odd one in the middle is in neither
        return values | ({"drift": fmean(late) - fmean(early)} if early and late else {})

    def constant(self, sample: Sample) -> str:
        """What can be said to anybody at any time."""
        return "我明白。请接着说。" if self.config.language == "zh" else "I see. Do go on."

    def chance(self, sample: Sample, rng: random.Random) -> str:
        """A turn of the user from some dialogue."""
        return rng.choice(rng.choice(self._samples).messages[1:]).content

    def write_artifacts(self, rows: Sequence[Row], folder: Path) -> None:
        """curves.json: the degradation curve of all scenarios together and of each (see `rounds`)."""
        scenarios = [name for name in SCENARIOS if name != "user_preference"]
        curves = [Curve("score", "round", rounds(rows))] + [
            Curve(f"score in {name}", "round", rounds([row for row in rows if row.task == name])) for name in scenarios
        ]
        write_curves(folder, curves)


def _line(message: Message) -> str:
    return f"{'User' if message.role == 'user' else 'Character'}: {message.content}"


def rounds(rows: Sequence[Row]) -> dict[int, Estimate]:
    """Round, from 1 → its mean score over dialogues, 0–100, with an interval by character.

    Dialogues differ in length, so late rounds are of fewer of them (`n`); `drift` compares each dialogue with itself.
    """
    values, clusters = [row.values for row in rows], [row.cluster for row in rows]
    judged = sorted({int(key.removeprefix("round_")) for row in values for key in row if key.startswith("round_")})
    found = {number: estimate(values, clusters, f"round_{number}", Metric()) for number in judged}
    return {number: point for number, point in found.items() if point is not None}


def build(config: RMTBenchConfig, people: None = None) -> RMTBench:
    """The benchmark of a config. Raises UserError for a file that is missing or malformed."""
    return RMTBench(config)
