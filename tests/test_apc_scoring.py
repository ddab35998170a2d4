"""The scoring benchmark on a tiny encoder: both ways score the same, and all rates are there."""

import importlib.util

import pytest


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("apc_scoring", root / "benchmarks" / "apc_scoring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_the_same_scores_both_ways(script, encoder_folder):
    found = script.measure(str(encoder_folder), queries=20, slow=1)
    assert set(found) == {"published", "shared", "batched", "speed-up"} and min(found.values()) > 0
    assert found["speed-up"] == pytest.approx(found["batched"] / found["published"])


def test_interviews_have_as_many_replies_as_asked_for(script):
    questions = script.questions(20, replies=3)
    assert len(questions) == 20 and all(len(question.replies) == 3 for question in questions)
    assert all(question.character in statement for question in questions for statement in question.statements)
