"""LaMP as episodes: each task's metrics from stated answers, candidates, and the leaderboard's files."""

import json
from pathlib import Path

import pytest
from benchmark_toys import Stated, run, values

import persona
from persona import benchmarks, data, metrics
from persona.benchmarks import PeopleBenchmarkConfig
from persona.benchmarks.lamp import read_predictions, score
from persona.data.base import People, plain_task, register
from persona.errors import UserError
from persona.types import Message, Persona, Sample

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "lamp"
FOLDERS = {"LaMP_1": "LaMP_1", "LaMP_2": "LaMP_2", "LaMP_3": "LaMP_time_3", "LaMP_4": "time/LaMP_4",
           "LaMP_5": "LaMP_5", "LaMP_7": "LaMP_7"}  # fmt: skip
METRICS = {"LaMP_1": {"accuracy"}, "LaMP_2": {"accuracy", "f1"}, "LaMP_3": {"mae", "rmse"},
           **{name: {"rouge1", "rougeL", "logp_per_token"} for name in ("LaMP_4", "LaMP_5", "LaMP_7")}}  # fmt: skip
CHAT = register(plain_task("lamp_benchmark_chat"))


def lamp(people, **changes):
    return benchmarks.build(
        PeopleBenchmarkConfig(**{"name": "lamp", "num_beams": 1, "max_new_tokens": 8, **changes}), people
    )


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return lambda name: data.load(data.DataConfig("lamp", str(FIXTURES / FOLDERS[name]), cache=cache))


def told(people, change=lambda sample: sample.target):
    replies = {(sample.persona.id, sample.messages): change(sample) for sample in people.dev}
    return Stated(lambda request: replies[request.persona.id, request.messages])


@pytest.mark.parametrize("name", FOLDERS)
def test_true_answers_and_the_leaderboards_file(read, name, tmp_path):
    people = read(name)
    benchmark = lamp(people)
    summary, rows = run(benchmark, told(people, lambda sample: f" {sample.target}\n"), tmp_path)
    best = {"mae": 0, "rmse": 0, "f1": len({s.target for s in people.dev}) / 15}
    assert set(benchmark.metrics) == METRICS[name] == set(values(summary))
    found = values(summary)
    assert {key: found[key] for key in found if key != "logp_per_token"} == pytest.approx(
        {key: best.get(key, 1) for key in METRICS[name] if key != "logp_per_token"}
    )
    benchmark.write_artifacts(rows, tmp_path)
    (path,) = tmp_path.glob("predictions_*.json")
    content = json.loads(path.read_text())
    assert path.name == f"predictions_{name}.json" and set(content) == {"task", "golds"} and content["task"] == name
    assert content["golds"] == [{"id": s.id, "output": f" {s.target}\n"} for s in people.dev]


@pytest.mark.parametrize("name", FOLDERS)
def test_wrong_answers_get_the_official_scores(read, name, tmp_path):
    """The summary of a run agrees with LaMP's scorer over the predictions file that the run wrote."""
    people = read(name)
    wrong = iter(["3", "no idea", "the old harbour", "comedy"] * 3)
    benchmark = lamp(people)
    summary, rows = run(benchmark, told(people, lambda sample: next(wrong)), tmp_path)
    benchmark.write_artifacts(rows, tmp_path)
    task, predictions = read_predictions(tmp_path / f"predictions_{name}.json")
    official = score(task, predictions, {sample.id: sample.target for sample in people.dev})
    found = values(summary)
    assert {key: found[key] for key in official} == pytest.approx(official)


def test_ratings_by_hand(read, tmp_path):
    people = read("LaMP_3")
    assert [sample.target for sample in people.dev] == ["1", "1", "1"]
    replies = iter(["2", "no idea", "1"])
    found = values(run(lamp(people), told(people, lambda sample: next(replies)), tmp_path)[0])
    assert found == pytest.approx({"mae": (1 + 4 + 0) / 3, "rmse": ((1 + 16 + 0) / 3) ** 0.5})


# ---- choosing among other users' replies ---------------------------------------------------------------------------


def sample(number: int, user: str, target: str) -> Sample:
    return Sample(f"c{number}", (Message("user", f"question {number}"),), target, Persona(user), task=CHAT.name)


# Both Ada and Ben say "yes", so that for neither of them it is another user's reply.
TALK = [sample(0, "ada", "yes"), sample(1, "ada", "by the river"), sample(2, "ben", "yes"), sample(3, "ben", "rain"),
        sample(4, "cleo", "no thanks"), sample(5, "cleo", "rather not"), sample(6, "dov", "who knows")]  # fmt: skip
PEOPLE = People("chat", {CHAT.name: CHAT}, [], TALK)


def test_candidates_are_other_users_replies_drawn_by_seed_and_sample():
    benchmark = lamp(PEOPLE, candidates=3)
    own = {user: {s.target for s in TALK if s.persona.id == user} for user in ("ada", "ben", "cleo", "dov")}
    drawn = {one.id: benchmark.others(one) for one in TALK}
    for one in TALK:
        assert len(set(drawn[one.id])) == 3 and not set(drawn[one.id]) & own[one.persona.id]
    assert drawn == {one.id: lamp(PEOPLE, candidates=3).others(one) for one in reversed(TALK)}
    assert drawn != {one.id: lamp(PEOPLE, candidates=3, seed=1).others(one) for one in TALK}
    assert drawn["c0"] != drawn["c1"] or drawn["c4"] != drawn["c5"], "the draw is the sample's own"


def test_choice_and_likelihood_by_hand(tmp_path):
    benchmark = lamp(PEOPLE, candidates=3)
    assert set(benchmark.metrics) == {"rouge1", "rougeL", "logp_per_token", "choice"}
    found = values(run(benchmark, told(PEOPLE), tmp_path / "true")[0])
    tokens = sum(len(one.target.split()) + 1 for one in TALK)
    nats = sum(len(one.target) for one in TALK)
    assert found == pytest.approx({"rouge1": 1, "rougeL": 1, "choice": 1, "logp_per_token": -nats / tokens})
    # Convinced of another reply: right only where that reply is not among the four, since the rest is a tie.
    wrong = values(run(benchmark, told(PEOPLE, lambda one: "something else"), tmp_path / "tie")[0])
    assert wrong["choice"] == 0, "a tie does not find the true reply"
    assert wrong["logp_per_token"] == pytest.approx(-2 * nats / tokens)


def test_choice_is_by_likelihood_per_byte(tmp_path):
    """The long true reply costs more nats than a short wrong one, and fewer a byte."""
    people = People("chat", PEOPLE.tasks, [], [sample(0, "ada", "a reply of many words"), sample(1, "ben", "no")])
    found, rows = run(lamp(people, candidates=1), told(people), tmp_path)
    model = told(people)
    true, other = (model._logp(_request(people.dev[0]), text) for text in ("a reply of many words", "no"))
    assert true < other and rows[0].values["choice"] == 1 and values(found)["choice"] == 1


def _request(one: Sample):
    from persona.types import Request

    return Request(one.messages, one.persona, task=one.task)


def test_a_real_lm_is_scored_by_what_it_says(llama, read, tmp_path):
    people, model = read("LaMP_4"), persona.load(llama)
    summary, rows = run(lamp(people, candidates=2), model, tmp_path)
    for one, row in zip(people.dev, rows, strict=True):
        ((logp, tokens),) = model.loglikelihood([_request(one)], [one.target])
        assert row.values["logp"] == pytest.approx(logp, rel=1e-4) and row.values["tokens"] == tokens
        assert row.values["rouge1"] == metrics.rouge(row.raw, one.target)["rouge1"]
    assert set(values(summary)) == METRICS["LaMP_4"] | {"choice"}


def test_what_cannot_be_measured_is_one_sentence(read):
    with pytest.raises(UserError, match="1 samples of the dev split have no gold, the first is c9"):
        lamp(People("chat", PEOPLE.tasks, [], [*TALK, sample(9, "eve", "")]))
    with pytest.raises(UserError, match="candidates=8, but other users gave only 4 different replies"):
        lamp(PEOPLE, candidates=8).others(TALK[0])
