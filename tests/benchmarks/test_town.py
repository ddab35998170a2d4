"""The town's benchmark: perfect answers, other voices, garbage, and a real LM's answers scored by hand."""

import pytest
from benchmark_toys import Stated, run, values

import persona
from persona import benchmarks, data
from persona.benchmarks import PeopleBenchmarkConfig
from persona.errors import UserError
from persona.town import lexicon as lx
from persona.town import oracle, residents
from persona.types import Request, Sampling

METRICS = {"voice", "readable", "rating_mae", "rating_accuracy", "tag_accuracy"}


@pytest.fixture(scope="module")
def people():
    return data.load(data.TownConfig(train=1, dev=4, test=2))


@pytest.fixture(scope="module")
def town(people):
    return benchmarks.build(PeopleBenchmarkConfig(name="town", split="dev"), people)


def answers(people, change=lambda sample: sample.target):
    """Replies by (person, question)."""
    told = {(sample.persona.id, sample.messages): change(sample) for sample in (*people.dev, *people.test)}
    return lambda request: told[request.persona.id, request.messages]


def test_true_answers_reach_every_metrics_best_value(town, people, tmp_path):
    summary, rows = run(town, Stated(answers(people)), tmp_path)
    assert values(summary) == {"voice": 1, "readable": 1, "rating_mae": 0, "rating_accuracy": 1, "tag_accuracy": 1}
    assert set(town.metrics) == METRICS and summary.n == len(people.dev) == 24 and summary.n_unscored == 0
    # Four residents, each asked for two replies, three ratings and one tag; intervals are over residents.
    assert [summary.estimates[name].n for name in ("voice", "rating_mae", "tag_accuracy")] == [8, 12, 4]
    assert {row.cluster for row in rows} == {sample.persona.id for sample in people.dev}
    assert [row.raw for row in rows] == [sample.target for sample in people.dev]


PLAIN = residents.small_talk(0, lx.TOPICS[0], residents.PLAIN_WORDS)[1]


def spoken(voice: str, closes: str | None = None) -> str:
    return f"{lx.VOICES[voice][0][0]} {PLAIN} {lx.VOICES[closes or voice][1][0]}"


def own(sample) -> str:
    return sample.metadata["voice"]


def another(sample) -> str:
    return next(voice for voice in lx.VOICES if voice != own(sample))


@pytest.mark.parametrize(
    ("change", "voice", "readable"),
    (
        (lambda sample: spoken(own(sample)), 1, 1),
        (lambda sample: spoken(another(sample)), 0, 1),
        (lambda sample: spoken(another(sample), own(sample)), 0, 1),
        (lambda sample: PLAIN, 0, 1),
        (lambda sample: spoken(own(sample)) + " lorem ipsum", 0, 0),
        (lambda sample: "", 0, 0),
    ),
    ids=("own", "another", "mixed", "plain", "garbage", "empty"),
)
def test_voice_of_what_was_said(town, people, tmp_path, change, voice, readable):
    told = answers(people, lambda sample: change(sample) if sample.options is None else sample.target)
    found = values(run(town, Stated(told), tmp_path)[0])
    assert (found["voice"], found["readable"], found["rating_accuracy"]) == (voice, readable, 1)


def test_ratings_and_tags_beside_the_truth(town, people, tmp_path):
    """One too high, or one too low at the top; the first of the other tags."""

    def change(sample):
        if sample.task == "town_rating":
            return str(int(sample.target) + 1 if sample.target != "5" else 4)
        return next(o for o in sample.options if o != sample.target) if sample.options else sample.target

    found = values(run(town, Stated(answers(people, change)), tmp_path)[0])
    assert found == {"voice": 1, "readable": 1, "rating_mae": 1, "rating_accuracy": 0, "tag_accuracy": 0}


def test_a_real_lm_is_scored_by_what_it_says(llama, people, tmp_path):
    """A random LM: each row again by hand from respond() and choose()."""
    model = persona.load(llama)
    town = benchmarks.build(PeopleBenchmarkConfig(name="town", split="test", limit=7, max_new_tokens=6), people)
    assert list(town.samples()) == list(people.test[:7])
    summary, rows = run(town, model, tmp_path)
    for sample, row in zip(people.test[:7], rows, strict=True):
        request = Request(sample.messages, sample.persona, Sampling(6), sample.options, sample.task)
        if sample.options is None:
            (reply,) = model.respond([request])
            shown = oracle.voice(reply.text)
            assert row.raw == reply.text and row.values["readable"] == (shown is not None)
            assert row.values["voice"] == (shown == sample.metadata["voice"])
        else:
            (logps,) = model.choose([request])
            assert row.raw == sample.options[logps.index(max(logps))]
    assert values(summary)["readable"] == 0, "random bytes are not the town's language"


def test_unknown_names_are_one_sentence(people):
    with pytest.raises(UserError, match="no benchmark 'twon': did you mean town?"):
        benchmarks.build(PeopleBenchmarkConfig(name="twon"), people)
    with pytest.raises(UserError, match="there is no split 'deev'"):
        benchmarks.build(PeopleBenchmarkConfig(name="town", split="deev"), people)
