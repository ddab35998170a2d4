"""Expressed traits: scores by hand, perfect and wrong replies, and the shipped LM, which does not know the calls."""

from dataclasses import replace

import pytest
from benchmark_toys import Stated, run, values

import persona
from persona import benchmarks, data
from persona.benchmarks.town_traits import TownTraits, TownTraitsConfig
from persona.benchmarks.town_traits import values as of
from persona.errors import UserError
from persona.evaluation.episodes import Trivial
from persona.methods import load_personalizer

NONE = dict.fromkeys("OCEAN", 0)
HOST, CAREFUL, STERN = "i join in and greet everyone .", "i make a careful plan .", "i stand my ground ."
ALONE, MESS = "i stay alone with a novel .", "i let it slide ."


@pytest.fixture(scope="module")
def people():
    return data.load(data.TownSituationsConfig(train=10, dev=4, test=60, with_truth=True))


@pytest.fixture(scope="module")
def built(people):
    return benchmarks.build(TownTraitsConfig(), people)


@pytest.mark.parametrize(
    ("reply", "exact", "hits", "poles"),
    (
        (f"{HOST} {CAREFUL}", 1, 4, 4), (f"{CAREFUL} {HOST}", 1, 4, 4), (HOST, 0, 2, 3), (f"{HOST} {STERN}", 0, 2, 4),
        (f"{HOST} {CAREFUL} {STERN}", 0, 4, 5), (f"{ALONE} {MESS}", 0, 0, 4), ("certainly , 3 .", 0, 0, 2),
        # Both poles of one trait: two are shown, and one of them is called for.
        (f"{HOST} {ALONE} {CAREFUL}", 0, 4, 5), ("", 0, 0, 2), ("I smile at everyone.", 0, 0, 2),
    ),
)  # fmt: skip
def test_a_reply_by_hand(reply, exact, hits, poles):
    found = of(reply, {**NONE, "E": 1, "C": 1})
    assert (found["exact"], found["hits"], found["poles"]) == (exact, hits, poles) and "neutral" not in found
    assert sum(found[f"hits_{trait}"] for trait in "OCEAN") == hits
    assert found["readable"] == (reply not in ("", "I smile at everyone."))


@pytest.mark.parametrize(
    ("reply", "silent"), (("3 4 .", 1), (f"3 4 . {HOST}", 0), (f"{HOST} {ALONE}", 0), ("three", 0), ("", 0))
)
def test_a_neutral_question_by_hand(reply, silent):
    found = of(reply, NONE)
    assert found["neutral"] == silent and set(found) == {"neutral", "readable"}


def test_true_replies_reach_the_best_value_of_every_metric(built, tmp_path):
    truth = {sample.messages: sample.target for sample in built.samples()}
    summary, rows = run(built, Stated(lambda request: truth[request.messages]), tmp_path)
    assert set(values(summary).values()) == {1.0} and set(values(summary)) == set(built.metrics)
    assert summary.n == 75 and summary.n_unscored == 0 and summary.estimates["exact"].n == 60
    assert {row.groups["new"] for row in rows} == {"combination", "pattern", "wording", "neutral"}


def test_trivial_replies(built, tmp_path):
    constant = values(run(built, Trivial("constant"), tmp_path / "constant")[0])
    assert constant["exact"] < 0.2 and constant["readable"] == 1
    silent = values(run(built, Stated(lambda request: "3 ."), tmp_path / "silent")[0])
    assert silent["neutral"] == 1 and silent["exact"] == silent["f1"] == 0


def test_the_shipped_lm_does_not_know_the_calls_and_names_of_traits_do_not_tell_it(built, people, tmp_path):
    """A handful of samples: told what is called for, the LM shows more of it than under one prompt for all."""
    few = TownTraits([s for s in people.test if s.metadata["kind"] != "neutral"][:24], built.max_new_tokens)
    base = persona.load("town").base
    stacks = {
        "untouched": [],
        "trait prompt": [load_personalizer({"system_prompt": {"text": "be carefree ."}}, base)],
        "told the call": [load_personalizer({"constitution": {"prompts": "town"}}, base)],
    }
    found = {name: values(run(few, persona.load(base, stack), tmp_path / name)[0]) for name, stack in stacks.items()}
    assert found["untouched"]["exact"] < 0.15 and found["trait prompt"]["exact"] < 0.15
    assert found["told the call"]["f1"] > found["untouched"]["f1"] + 0.2


def test_people_without_traits_are_one_sentence(people):
    plain = replace(people, test=[replace(people.test[0], metadata={})])
    with pytest.raises(UserError, match="does not say which traits it calls for"):
        benchmarks.build(TownTraitsConfig(), plain)
