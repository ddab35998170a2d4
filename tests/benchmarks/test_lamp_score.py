"""LaMP's scores against values worked out by hand, the quirks of published code, and the leaderboard's file."""

import json
import math
from pathlib import Path

import pytest

from persona.benchmarks.lamp import (
    invalid_answer,
    read_predictions,
    sample_values,
    score,
    worst_rating,
    write_predictions,
)
from persona.data import task
from persona.errors import UserError
from persona.metrics import bootstrap_median

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "lamp"


def numbered(*texts: str) -> dict[str, str]:
    return {str(number): text for number, text in enumerate(texts)}


def test_citation_is_accuracy_only():
    assert score("LaMP_1", numbered("[1]", " [2]\n", "1", "[2]"), numbered("[1]", "[2]", "[1]", "[1]")) == {
        "accuracy": 0.5
    }


def test_tags_have_f1_over_all_fifteen():
    predictions, golds = numbered("comedy", "Comedy", "action"), numbered("comedy", "comedy", "action")
    # comedy: precision 1, recall 1/2 -> 2/3 ("Comedy" is no label); action: 1; thirteen labels: 0.
    result = score("LaMP-2", predictions, golds)
    assert result == pytest.approx({"accuracy": 2 / 3, "f1": (2 / 3 + 1) / 15})


def test_perfect_answers_of_every_fixture():
    best = {"LaMP_1": {"accuracy": 1.0}, "LaMP_3": {"mae": 0.0, "rmse": 0.0}, "LaMP_4": {"rouge1": 1.0, "rougeL": 1.0},
            "LaMP_5": {"rouge1": 1.0, "rougeL": 1.0}, "LaMP_7": {"rouge1": 1.0, "rougeL": 1.0}}  # fmt: skip
    seen = set()
    for path in FIXTURES.rglob("*_outputs.json"):
        name, golds = read_predictions(path)
        if name in best:
            assert score(name, golds, golds) == best[name]
        seen.add(name)
    assert seen == {*best, "LaMP_2"}


@pytest.mark.parametrize(("gold", "worst"), [(1, 5), (2, 5), (3, 5), (4, 1), (5, 1)])
def test_worst_rating(gold, worst):
    assert worst_rating(gold, 1, 5) == worst


def test_ratings():
    predictions = numbered(" 4 ", "17", "no idea", "5 stars", "nan", "-inf")
    golds = numbered("5", "5", "4", "2", "3", "5")
    # Errors: 1; 12 (numbers are not clipped); 3 (worst is 1); 3 (worst is 5); 2 (worst is 5); 4 (worst is 1).
    errors = [1, 12, 3, 3, 2, 4]
    expected = {"mae": sum(errors) / 6, "rmse": math.sqrt(sum(e * e for e in errors) / 6)}
    assert score("LaMP_3", predictions, golds) == pytest.approx(expected)


def test_ratings_as_published():
    golds = numbered("5", "4", "2", "3")
    predictions = numbered("5", "no idea", "5 stars", "about 3 of 5")
    # LaMP: worst value where float() fails. Persona-Plug: first digit, else 1.
    assert score("LaMP_3", predictions, golds, "lamp_reference")["mae"] == pytest.approx((0 + 3 + 3 + 2) / 4)
    assert score("LaMP_3", predictions, golds, "pplug_reference")["mae"] == pytest.approx((0 + 3 + 3 + 0) / 4)
    assert math.isnan(score("LaMP_3", numbered("nan"), numbered("3"), "lamp_reference")["mae"])


def test_labels_as_published():
    predictions, golds = numbered("[1] ", "?"), numbered("[1]", "[3]")
    # An unknown gold is an error here; in LaMP's scorer it equals an unknown answer. Persona-Plug does not strip.
    with pytest.raises(UserError, match=r"gold of 1 in LaMP_1 is '\[3\]', which should be one of \[1\], \[2\]"):
        score("LaMP_1", predictions, golds)
    assert score("LaMP_1", predictions, golds, "lamp_reference") == {"accuracy": 1.0}
    assert score("LaMP_1", predictions, golds, "pplug_reference") == {"accuracy": 0.5}


def test_rouge_is_the_plain_mean_and_the_median_under_compat():
    # One word of i + 1: precision 1, recall 1 / (i + 1), F 2 / (i + 2).
    predictions, golds = numbered(*"a" * 9), numbered(*("a" + " b" * i for i in range(9)))
    values = [2 / (i + 2) for i in range(9)]
    result = score("LaMP_4", predictions, golds)
    assert result == pytest.approx({"rouge1": sum(values) / 9, "rougeL": sum(values) / 9})
    published = score("LaMP_4", predictions, golds, "lamp_reference")
    assert published == score("LaMP_4", predictions, golds, "pplug_reference")
    assert published["rouge1"] == pytest.approx(bootstrap_median(values))
    assert published["rouge1"] != pytest.approx(result["rouge1"])


def test_sample_values_average_to_the_score():
    cases = {
        "LaMP_2": (numbered("comedy", "x"), numbered("comedy", "action")),
        "LaMP_3": (numbered("2", "?"), numbered("4", "4")),
        "LaMP_5": (numbered("a b", "c"), numbered("a", "d e")),
    }
    for name, (predictions, golds) in cases.items():
        rows = [sample_values(task(name), id, predictions[id], golds[id]) for id in golds]
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        total = score(name, predictions, golds)
        if name == "LaMP_3":
            assert total == pytest.approx({"mae": means["absolute_error"], "rmse": math.sqrt(means["squared_error"])})
        else:
            assert {key: total[key] for key in means} == pytest.approx(means)


def test_invalid_answers():
    assert [invalid_answer(task("LaMP_1"), text) for text in ("[1]\n", "[3]", "")] == [False, True, True]
    assert [invalid_answer(task("LaMP_3"), text) for text in ("4.5", "17", "nan", "four")] == [
        False,
        False,
        True,
        True,
    ]
    assert not invalid_answer(task("LaMP_7"), "")


def test_ids_must_be_the_same():
    with pytest.raises(UserError) as caught:
        score("LaMP_7", {"a": "x", "b": "x"}, {"a": "x", "c": "x", "d": "x"})
    assert str(caught.value) == (
        "predictions and golds of LaMP_7 do not have the same ids: "
        "2 golds have no prediction (ids c, d); 1 predictions have no gold (ids b)"
    )
    with pytest.raises(UserError, match="nothing to score"):
        score("LaMP_7", {}, {})


def test_unknown_task_and_compat():
    with pytest.raises(UserError, match="did you mean LaMP_1"):
        score("LaMP_1x", {}, {})
    with pytest.raises(UserError, match="compat 'reference' is not known for scores"):
        score("LaMP_1", numbered("[1]"), numbered("[1]"), compat="reference")
    with pytest.raises(UserError, match="gold of 0 in LaMP_3 is 'good', which should be a number"):
        score("LaMP_3", numbered("1"), numbered("good"))


def test_predictions_file_is_the_leaderboards(tmp_path):
    path = tmp_path / "out" / "predictions.json"
    write_predictions(path, "LaMP-4", {"b": "two", "a": "ä"}, ids=["a", "b"])
    assert json.loads(path.read_text()) == {
        "task": "LaMP_4",
        "golds": [{"id": "a", "output": "ä"}, {"id": "b", "output": "two"}],
    }
    assert read_predictions(path) == ("LaMP_4", {"a": "ä", "b": "two"})


def test_incomplete_predictions_do_not_touch_the_file(tmp_path):
    path = tmp_path / "predictions.json"
    write_predictions(path, "LaMP_4", {"a": "one"}, ids=["a"])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"1 golds have no prediction \(ids b\)"):
        write_predictions(path, "LaMP_4", {"a": "other"}, ids=["a", "b"])
    assert path.read_bytes() == before
    path.write_text('{"golds": [{"id": "a", "output": "x"}]}')
    with pytest.raises(UserError, match="names no task"):
        read_predictions(path)
