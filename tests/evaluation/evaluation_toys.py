"""Real parts for the tests of this room: a deterministic model that does what it is told, and small benchmarks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from persona.evaluation.episodes import Benchmark, Unscored, run_benchmark
from persona.evaluation.results import Attention, Plots, Point, write_plots
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import HistoryItem, Message, Persona, Request, Response, Sample, Score

RESIDENTS = ("Ada", "Ben", "Cleo", "Dov", "Eve", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lou", "Mia", "Nils")
VOICES = ("plain", "pirate", "poet", "nervous")


def draw(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


class ToyModel:
    """Answers the right rating with probability `skill` (more with a longer history), else one beside it."""

    def __init__(self, skill: float = 0.5) -> None:
        self.skill = skill
        self.batches: list[tuple[str, list[str]]] = []

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        self.batches.append(("respond", [request.messages[-1].content for request in requests]))
        return [Response(text=self._reply(request)) for request in requests]

    def choose(self, requests: Sequence[Request]) -> list[list[float]]:
        self.batches.append(("choose", [request.messages[-1].content for request in requests]))
        return [[-float(len(option)) for option in request.options or ()] for request in requests]

    def loglikelihood(self, requests: Sequence[Request], targets: Sequence[str]) -> list[tuple[float, int]]:
        self.batches.append(("loglikelihood", list(targets)))
        pairs = zip(requests, (len(target.split()) for target in targets), strict=True)
        return [(-(2.5 - self.skill + draw("nll", asked.messages[-1].content)) * n, n) for asked, n in pairs]

    def _reply(self, request: Request) -> str:
        text = request.messages[-1].content
        truth = int(text.rsplit("#", 1)[1])
        items = len(request.persona.history) if request.persona else 0
        if draw(self.skill, text) < 0.06:
            return "I would rather not say."
        if draw("lucky", text) < self.skill + 0.02 * min(items, 20):
            return str(truth)
        return str(truth % 5 + 1)


class Ratings(Benchmark):
    """What would this resident rate the place? The question ends in "#truth", which only the toy model can use."""

    name = "ratings"
    version = "1"
    metrics = {
        "accuracy": Metric(description="share of exact ratings"),
        "rmse": Metric(False, "rmse", ("truth", "rating"), description="root of the mean squared error, in stars"),
        "log-likelihood per token": Metric(aggregate="ratio", columns=("logp", "tokens"), description="nats"),
    }

    def __init__(self, n: int = 60) -> None:
        self.n = n

    def samples(self) -> list[Sample]:
        samples = []
        for i in range(self.n):
            name = RESIDENTS[i % len(RESIDENTS)]
            length = (1, 2, 4, 6, 9, 14, 20)[i % 7] + i % len(RESIDENTS) // 7
            history = [HistoryItem(f"{name}-{k}", f"The soup at {k} Mill Road", str(k % 5 + 1)) for k in range(length)]
            persona = Persona(name, f"{name} speaks like a {VOICES[i % 4]}.", history=history)
            truth = int(draw("truth", i) * 5) + 1
            text = f"Visit {i}: the bakery by the river{' and its garden' * (i % 5)}. How many stars? #{truth}"
            samples.append(Sample(f"r{i:04}", (Message("user", text),), str(truth), persona, task="rating"))
        return samples

    def cluster(self, sample: Sample) -> str:
        return sample.persona.id if sample.persona else sample.id

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        reply = await roles.model.respond(Request(sample.messages, sample.persona, task=sample.task))
        logp, tokens = await roles.model.loglikelihood(Request(sample.messages, sample.persona), sample.target)
        try:
            rating = int(reply.text)
        except ValueError:
            raise Unscored("the reply is not a number", raw=reply.text) from None
        truth = int(sample.target)
        values = {"accuracy": float(rating == truth), "truth": truth, "rating": rating, "logp": logp, "tokens": tokens}
        return Score(values, raw=reply.text)


class Voices(Ratings):
    """The same residents asked for a line in their own voice, read by word overlap."""

    name = "voices"
    metrics = {"voice": Metric(description="share of replies in the resident's voice"), "rouge-1": Metric()}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        reply = await roles.model.respond(Request(sample.messages, sample.persona, task=sample.task))
        right = float(reply.text == sample.target)
        return Score({"voice": right, "rouge-1": 0.2 * right + 0.5 * draw("rouge", sample.id)}, raw=reply.text)


def toy_plots(seed: int = 0) -> Plots:
    """Attention of three residents and a cloud of users around four voices."""
    attention = []
    for user, n in (("Ada", 5), ("Kai", 20), ("Mia", 1)):
        raw = [draw(seed, user, k) ** 4 + 0.01 for k in range(n)]
        texts = [f"The soup at {k} Mill Road was {'lovely and warm, as ever, and ' * (k % 3)}good" for k in range(n)]
        weights = [value / sum(raw) for value in raw]
        attention.append(
            Attention(user, f"What does {user} say about the bakery?", tuple(zip(texts, weights, strict=True)))
        )
    points = []
    for i in range(160):
        voice = VOICES[i % 4]
        angle, far = i % 4 * 1.6, 1.5 + draw(seed, "far", i)
        x = far * math.cos(angle) + draw(seed, "x", i)
        y = far * math.sin(angle) + draw(seed, "y", i)
        points.append(Point(x, y, f"resident {i}", voice))
    return Plots(tuple(attention), tuple(points), "User embeddings, first two principal components")


STACKS = {"untouched": 0.3, "instruction only": 0.33, "BM25, k = 4": 0.42, "Persona-Plug": 0.6, "full knowledge": 0.8}


def toy_results(folder: Path, n: int = 140, stacks: Mapping[str, float] = STACKS) -> list[Path]:
    """Folders of several stacks on two benchmarks, written by the runner; Persona-Plug has plots."""
    folders = []
    for stack, skill in stacks.items():
        for benchmark in (Ratings(n), Voices(n)):
            place = folder / stack.replace(" ", "_") / "evaluation" / benchmark.name
            settings = {"base_model": "toy", "personalizers": [stack], "sampling": {"temperature": 0.0}, "seed": 0}
            run_benchmark(benchmark, ToyModel(skill), place, stack=stack, settings=settings, progress=False)
            folders.append(place)
        if stack == "Persona-Plug":
            write_plots(folders[-1], toy_plots())
    return folders
