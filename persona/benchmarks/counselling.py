"""Counselling: the next reply of a counsellor in given conversations, rated 1 to 5 on four dimensions by judges.

A reconstruction. The PersonaFuse paper names mental-health counselling as an application (persona_fuse §5, abstract);
its conversations, its metrics and its judge were not found. Dimensions, scales and prompts here are ours, and its
figures cannot be compared with these. Conversations of one's own are a file; a few of ours come with the package.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from persona.benchmarks import FileBenchmarkConfig
from persona.data.rows import field, read_jsonl
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.judging import Rubric, require
from persona.evaluation.judges.parsing import parse_integer
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Conversation, Message, Request, Sample, Sampling, Score

_HERE = Path(__file__).parent
_SAMPLES = _HERE / "samples" / "counselling" / "dialogues.jsonl"
COUNSELLOR = Prompt.load(_HERE / "prompts" / "counselling" / "counsellor.md")


def rubric(path: Path) -> Rubric:
    """A prompt file with the slots context, reply and dimension that asks for a final score from 1 to 5."""

    def parse(reply: str) -> float:
        return float(parse_integer(reply, 1, 5, after="final score"))

    return Rubric.load(path, parse, (1, 2, 3, 4, 5), example="Final score: {answer}")


class RatedReplies(Benchmark):
    """One reply a sample, rated by every judge on every dimension.

    A dimension's value is the mean of the verdicts that can be read; a reply without any is unscored. Subclasses name
    the prompts; `contexts` is what judges are shown beside the reply.
    """

    version = "1"
    primary = "overall"
    needs = ("judge",)
    rubric: Rubric
    dimensions: Mapping[str, str]  # name → what it asks, for the report
    plain: str  # what can be said to anybody

    def __init__(self, config: FileBenchmarkConfig, samples: Sequence[Sample], contexts: Mapping[str, str]) -> None:
        if config.compat is not None:
            raise UserError(f"benchmark.compat={config.compat}: there is no published code to agree with")
        self.config = config
        self._samples, self._contexts = list(samples)[: config.limit], contexts
        self.metrics = {
            "overall": Metric(description="mean of the dimensions, 1 to 5"),
            **{name: Metric(description=f"{asks}, 1 to 5") for name, asks in self.dimensions.items()},
            "unjudged": Metric(False, description="share of dimensions on which no judge's verdict can be read"),
        }

    def samples(self) -> Sequence[Sample]:
        return self._samples

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        sampling = Sampling(self.config.max_new_tokens, seed=self.config.seed)
        reply = (await roles.model.respond(Request(sample.messages, sample.persona, sampling))).text
        slots = {"context": self._contexts[sample.id], "reply": reply}
        asked = [roles.judge(self.rubric, dimension=name, **slots) for name in self.dimensions]
        answers = await asyncio.gather(*asked)
        verdicts = tuple(verdict for answer in answers for verdict in answer)
        values = {
            name: fmean(map(float, said))
            for name, answer in zip(self.dimensions, answers, strict=True)
            if (said := require(answer))
        }
        if not values:
            return Score(
                reason=f"no verdict can be read, the first: {verdicts[0].reason}", raw=reply, verdicts=verdicts
            )
        unjudged = 1 - len(values) / len(self.dimensions)
        return Score(values | {"overall": fmean(values.values()), "unjudged": unjudged}, raw=reply, verdicts=verdicts)

    def constant(self, sample: Sample) -> str:
        return self.plain

    def chance(self, sample: Sample, rng: random.Random) -> str:
        """The last words of some sample's author."""
        return rng.choice(self._samples).messages[-1].content


def read_dialogues(path: Path) -> dict[str, Conversation]:
    """Conversations by id, one {id, messages: [{role, content}, …]} a line.

    Raises UserError naming the line for messages that are none, roles that are not user and assistant in turn, and a
    last message that is not the user's.
    """
    dialogues: dict[str, Conversation] = {}
    for number, row, _ in read_jsonl(path):
        where = f"{path}, line {number}"
        given = row.get("messages")
        if not isinstance(given, list) or not given:
            raise UserError(f"{where} has {given!r:.60} as messages, which should be a list of {{role, content}}")
        said = [Message(*(field(one, name, f"{where}, messages") for name in ("role", "content"))) for one in given]
        turns = ("user", "assistant") * len(said)
        if len(said) % 2 == 0 or any(one.role != turn for one, turn in zip(said, turns, strict=False)):
            roles = ", ".join(message.role for message in said)
            raise UserError(f"{where} has messages of {roles}; user and assistant should take turns, the user last")
        id = field(row, "id", where)
        if id in dialogues:
            raise UserError(f"{where} repeats the id {id!r}")
        dialogues[id] = tuple(said)
    if not dialogues:
        raise UserError(f"{path} holds no conversations")
    return dialogues


@dataclass
class CounsellingConfig(FileBenchmarkConfig):
    """`path`: conversations, one {id, messages} a line. `limit` takes the first ones."""

    name: str = "counselling"
    max_new_tokens: int = 256


class Counselling(RatedReplies):
    name = "counselling"
    rubric = rubric(_HERE / "prompts" / "counselling" / "rate.md")
    prompts = (COUNSELLOR, rubric.prompt)
    dimensions = {
        "empathy": "what the client feels is taken up",
        "understanding": "the client's situation becomes clearer",
        "guidance": "what is offered is of use now",
        "safety": "within what a counsellor may say, and signs of danger are answered",
    }
    plain = "That sounds hard. Thank you for telling me. What would help you most at the moment?"

    def __init__(self, config: CounsellingConfig) -> None:
        dialogues = read_dialogues(Path(config.path).expanduser() if config.path else _SAMPLES)
        contexts = {id: "\n\n".join(map(_line, said)) for id, said in dialogues.items()}
        samples = [Sample(id, COUNSELLOR.messages() + said) for id, said in dialogues.items()]
        super().__init__(config, samples, contexts)


def _line(message: Message) -> str:
    return f"{'Client' if message.role == 'user' else 'Counsellor'}: {message.content}"


def build(config: CounsellingConfig) -> Counselling:
    """The benchmark of a config. Raises UserError for a file that is missing or malformed."""
    return Counselling(config)
