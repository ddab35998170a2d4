"""Who plays which role: judges and others beside the model, trivial answers, and what happens when one is missing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from evaluation_toys import ToyModel

from persona.errors import UserError
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig, PersonalizedEndpoint
from persona.evaluation.episodes import Benchmark, Cast, Trivial, run_benchmark
from persona.evaluation.judges.judging import Rubric, ScriptedJudge, random_judge
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import read_rows
from persona.evaluation.roles import Roles, identity
from persona.evaluation.statistics import Metric
from persona.methods.prompt import Description
from persona.personalizer import LanguageModel
from persona.types import Message, Request, Response, Sample, Score

RUBRIC = Rubric(Prompt("short", "Is {{ reply }} short?"), float, (1.0, 5.0))


class Quiz(Benchmark):
    """Twelve questions with three options each; the second is right in every other one, else the first or third."""

    name, version, primary = "quiz", "1", "right"
    metrics = {"right": Metric()}

    def samples(self):
        places = (1, 0, 1, 2) * 3
        options = ("red", "green", "blue")
        return [
            Sample(f"q{i}", (Message("user", f"#{i}"),), options[place], options=options)
            for i, place in enumerate(places)
        ]

    def groups(self, sample):
        return {"parity": "even" if int(sample.id[1:]) % 2 == 0 else "odd"}

    async def episode(self, sample, roles: Roles):
        logps = await roles.model.choose(Request(sample.messages, options=sample.options))
        said = sample.options[logps.index(max(logps))]
        return Score({"right": float(said == sample.target)}, raw=said)


class Judged(Quiz):
    name, needs, primary = "judged", ("judge", "reference"), "grade"
    metrics = {"grade": Metric()}

    async def episode(self, sample, roles: Roles):
        written = await roles.reference.respond(Request(sample.messages))
        verdicts = await roles.judge(RUBRIC, reply=written.text)
        return Score({"grade": sum(v.value for v in verdicts) / len(verdicts)}, verdicts=tuple(verdicts))


def run(benchmark, cast, folder: Path, **more):
    summary = run_benchmark(benchmark, cast, folder, stack="toy", settings={}, progress=False, **more)
    return summary, read_rows(folder / "samples.jsonl")


def test_constant_and_random_answers_are_scored_by_the_same_episode(tmp_path):
    constant, rows = run(Quiz(), Trivial("constant"), tmp_path / "constant")
    assert {row.raw for row in rows} == {"green"} and constant.estimates["right"].value == 0.5
    chance, rows = run(Quiz(), Trivial("random"), tmp_path / "random")
    assert {row.raw for row in rows} == {"red", "green", "blue"}
    again, _ = run(Quiz(), Trivial("random"), tmp_path / "again", batch_size=1)
    other, _ = run(Quiz(), Trivial("random", seed=1), tmp_path / "other")
    assert again.estimates == chance.estimates != other.estimates


def test_breakdowns_stand_in_the_rows(tmp_path):
    _, rows = run(Quiz(), Trivial("constant"), tmp_path)
    assert [row.groups for row in rows[:2]] == [{"parity": "even"}, {"parity": "odd"}]


class Server:
    """An endpoint: asynchronous, many at once; remembers how many calls were open together."""

    name, likelihoods = "server", False

    def __init__(self, text: str) -> None:
        self.text, self.open, self.most = text, 0, 0

    async def respond(self, request: Request) -> Response:
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0.01)
        self.open -= 1
        return Response(self.text)


def test_judges_are_asked_side_by_side_and_their_verdicts_are_kept(tmp_path):
    server = Server("4")
    judges = [server, ScriptedJudge("rule", lambda rubric, slots: "2")]
    cast = Cast(Trivial("constant"), judges, reference=ToyModel())
    summary, rows = run(Judged(), cast, tmp_path)
    assert summary.estimates["grade"].value == 3.0 and server.most == 12
    assert [(v.judge, v.rubric, v.prompt, v.value) for v in rows[0].verdicts] == [
        ("server", "short", RUBRIC.prompt.hash, 4.0),
        ("rule", "short", RUBRIC.prompt.hash, 2.0),
    ]


def test_a_missing_role_is_named_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="benchmark judged needs a judge"):
        run(Judged(), Cast(ToyModel(), reference=ToyModel()), tmp_path)
    with pytest.raises(UserError, match="benchmark judged needs a reference"):
        run(Judged(), Cast(ToyModel(), [Server("1")]), tmp_path)


def test_other_words_in_a_prompt_are_another_setting(tmp_path):
    class Worded(Quiz):
        prompts = (Prompt("ask", "What colour?"),)

    class Reworded(Quiz):
        prompts = (Prompt("ask", "Which colour?"),)

    run(Worded(), Trivial("constant"), tmp_path)
    with pytest.raises(UserError, match="prompts was"):
        run(Reworded(), Trivial("constant"), tmp_path)


def test_the_identity_of_a_player_is_all_that_decides_what_it_says(load_base):
    """Of an endpoint the prompts in front of it as well, of a local model its stack and dtype."""
    server = Endpoint(EndpointConfig(model="m", base_url="http://127.0.0.1:1/v1"))
    told = PersonalizedEndpoint(server, [Description()])
    assert identity(server) == {"endpoint": "m", "base_url": "http://127.0.0.1:1/v1", "stack": []}
    assert identity(told)["stack"] == [["description", {}, ""]] and identity(told)["endpoint"] == "m"
    base = load_base("llama")
    assert identity(LanguageModel(base, [Description()])) != identity(LanguageModel(base))
    assert identity(random_judge(3)) == {"name": "random, seed 3"}
