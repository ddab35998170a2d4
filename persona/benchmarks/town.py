"""The town's benchmark: does the model talk, rate and tag as a resident it knows by their history only?

The oracle reads the replies, so there is no judge. A reply outside the town's language shows no voice and counts as
such; `readable` tells how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona.data.base import People
from persona.evaluation.episodes import Benchmark
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.town import oracle
from persona.types import Request, Sample, Sampling, Score

if TYPE_CHECKING:
    from persona.benchmarks import PeopleBenchmarkConfig


class Town(Benchmark):
    name = "town"
    version = "1"
    metrics = {
        "voice": Metric(description="share of replies in the resident's own way of talking, and in no other"),
        "readable": Metric(description="share of replies that are sentences of the town's language"),
        "rating_mae": Metric(higher_is_better=False, description="distance of the likeliest rating from the true one"),
        "rating_accuracy": Metric(description="share of things whose likeliest rating is the true one"),
        "tag_accuracy": Metric(description="share of things whose likeliest tag is the true one"),
    }

    def __init__(self, samples: Sequence[Sample], max_new_tokens: int):
        self._samples, self.max_new_tokens = samples, max_new_tokens

    def samples(self) -> Sequence[Sample]:
        return self._samples

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        sampling = Sampling(max_new_tokens=self.max_new_tokens)
        request = Request(sample.messages, sample.persona, sampling, sample.options, sample.task)
        if sample.options is None:
            reply = await roles.model.respond(request)
            shown = oracle.voice(reply.text)
            values = {"voice": float(shown == sample.metadata["voice"]), "readable": float(shown is not None)}
            return Score(values, raw=reply.text)
        logps = await roles.model.choose(request)
        answer = sample.options[max(range(len(logps)), key=logps.__getitem__)]
        if sample.task == "town_rating":
            distance = abs(int(answer) - int(sample.target))
            return Score({"rating_mae": float(distance), "rating_accuracy": float(distance == 0)}, raw=answer)
        return Score({"tag_accuracy": float(answer == sample.target)}, raw=answer)


def build(config: PeopleBenchmarkConfig, people: People) -> Town:
    return Town(list(people.split(config.split))[: config.limit], config.max_new_tokens)
