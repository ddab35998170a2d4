"""The town's plain tasks: what a model still can do beside its character. Counting, opposites, colours, copying.

A reply is right when it gives the answer and no other, whatever else it says: a character may add its own sentence.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from persona.benchmarks import BenchmarkConfig
from persona.evaluation.episodes import Benchmark
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.town import reading
from persona.town.assistant_documents import TASKS, plain_task
from persona.types import Message, Request, Sample, Sampling, Score

EACH = 50  # different questions of a kind at most; there are 32 of counting, 24 opposites and 10 colours
_DRAWS = 1000


@dataclass
class TownTasksConfig(BenchmarkConfig):
    """`seed` draws what is copied; `limit` takes questions of all kinds in turn."""

    name: str = "town_tasks"
    max_new_tokens: int = 24


class TownTasks(Benchmark):
    name = "town_tasks"
    version = "1"
    metrics = {
        "right": Metric(description="share of replies that give the answer, and no other"),
        "bare": Metric(description="share of replies that are the answer and nothing else"),
    }
    primary = "right"

    def __init__(self, config: TownTasksConfig) -> None:
        self.config = config
        drawn = zip_longest(*([(kind, *task) for task in _tasks(config.seed, kind)] for kind in TASKS))
        asked = [task for tasks in drawn for task in tasks if task is not None]
        self._samples = [
            Sample(str(number), (Message("user", question),), answer, task=kind)
            for number, (kind, question, answer) in enumerate(asked[: config.limit], start=1)
        ]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return {"task": sample.task}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        reply = await roles.model.respond(Request(sample.messages, sampling=Sampling(self.config.max_new_tokens)))
        values = {"right": float(gives(reply.text, sample.target)), "bare": float(reply.text == sample.target)}
        return Score(values, raw=reply.text)

    def chance(self, sample: Sample, rng: random.Random) -> str:
        return rng.choice([other.target for other in self._samples if other.task == sample.task])


def _tasks(seed: int, kind: str) -> list[tuple[str, str]]:
    """Different questions of one kind with their answers."""
    rng = random.Random(f"town-tasks-{seed}-{kind}")
    return list(dict(plain_task(rng, kind) for _ in range(_DRAWS)).items())[:EACH]


def gives(reply: str, answer: str) -> bool:
    """Whether `answer` ("3 4 5 .") is a sentence of the reply, and the only one that could be an answer to a task."""
    units = reading.sentences(reply) or ()
    return [unit.key for unit in units if unit.kind == "words"] == [tuple(answer.split()[:-1])]


def build(config: TownTasksConfig) -> TownTasks:
    return TownTasks(config)
