"""EQ-Bench: the item's score by hand, both parsers, the published total, files, and whole runs."""

import json
import math

import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks import eq_bench
from persona.benchmarks.eq_bench import (
    EQBenchConfig,
    build,
    constant_total,
    official_reply,
    official_total,
    parse_reply,
    passes,
    read_questions,
    score_item,
    single_pass,
)
from persona.errors import UserError
from persona.evaluation.episodes import Trivial
from persona.evaluation.judges.parsing import Unreadable

REFERENCE = {"Sad": 0, "Glad": 10, "Calm": 4, "Bored": 5}
EMOTIONS = list(REFERENCE)

# ---- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "cost"),
    [
        ({}, 0),
        ({"Sad": 1}, 6.5 / (1 + math.exp(3.6))),  # .1729: near misses are all but free
        ({"Sad": 4}, 3.25),  # half way up the curve
        ({"Sad": 5}, 6.5 / (1 + math.exp(-1.2))),  # 4.9954
        ({"Sad": 6}, 6),  # from here on the distance itself
        ({"Sad": 4, "Calm": 8, "Bored": 1}, 3 * 3.25),
        ({"Sad": 2.5}, 6.5 / (1 + math.exp(1.8))),
        ({"Sad": 10, "Glad": 0}, 20),
    ],
)
def test_an_item_by_hand(changes, cost):
    assert score_item(REFERENCE | changes, REFERENCE) == pytest.approx(10 - 0.7477 * cost)


def test_an_item_in_figures():
    assert score_item({"Sad": 4, "Glad": 10, "Calm": 4, "Bored": 5}, REFERENCE) == pytest.approx(7.569975)
    worst = {"a": 0, "b": 10, "c": 0, "d": 10}
    assert score_item({"a": 10, "b": 0, "c": 10, "d": 0}, worst) == pytest.approx(-19.908)
    assert score_item({"d": "0", "c": "10", "b": 0.0, "a": "10"}, worst) == pytest.approx(-19.908), "text, any order"


@pytest.mark.parametrize(
    "answer",
    [
        {"Sad": 0, "Glad": 10, "Calm": 4},
        REFERENCE | {"Proud": 1},
        {"Sad": 0, "Glad": 10, "Calm": 4, "Proud": 5},
        {"sad": 0, "Glad": 10, "Calm": 4, "Bored": 5},
        REFERENCE | {"Sad": "many"},
        REFERENCE | {"Sad": None},
        REFERENCE | {"Sad": math.nan},
        {},
    ],
)
def test_an_answer_without_exactly_the_four_emotions_has_no_score(answer):
    assert score_item(answer, REFERENCE) is None


def test_a_constant_by_hand():
    """All 4 against 0, 10, 4, 5: 3.25 + 6 + 0 + .1729; and against 4, 4, 4, 4: nothing."""
    cost = 3.25 + 6 + 6.5 / (1 + math.exp(3.6))
    assert constant_total([REFERENCE, dict.fromkeys("abcd", 4)], 4) == pytest.approx(10 * (20 - 0.7477 * cost) / 2)


def test_the_published_total_prefers_revised_scores_that_are_as_good_and_nearly_as_many():
    assert official_total([50.0] * 20, [60.0] * 19 + [None]) == pytest.approx(
        {"first_pass": 50, "revised": 60, "score": 60, "parsable": 0.95, "failed": False}
    )
    assert official_total([50.0] * 20, [60.0] * 18 + [None] * 2)["score"] == 50, "18 of 20 is too few"
    assert official_total([50.0], [50.0])["score"] == 50 and official_total([50.0], [40.0])["score"] == 50
    # What cannot be read leaves the mean; with more than a sixth of it the run counts as failed.
    assert official_total([60.0, None, 30.0, 30.0, 30.0, 30.0], [None] * 6) == pytest.approx(
        {"first_pass": 36, "revised": 0, "score": 36, "parsable": 5 / 6, "failed": False}
    )
    assert official_total([60.0, None, None, 60.0, 60.0], [None] * 5)["failed"] is True
    assert official_total([None], [None])["score"] == 0


# ---- replies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "Sad: 1\nGlad: 2\nCalm: 3.5\nBored: 10",
        "**bored**: 10\n- GLAD: 2/10\n- **Calm:** 3.5\n- Sad：1\n\nHappy: 7",
        '{"Sad": 1, "Glad": "2", "Calm": 3.5, "Bored": 10}',
        "<think>Sad: 9</think>Sad:1 Glad:2 Calm:3.5 Bored:10\nSad: 1",
    ],
)
def test_replies_that_can_be_read(reply):
    assert parse_reply(reply, EMOTIONS) == {"Sad": 1, "Glad": 2, "Calm": 3.5, "Bored": 10}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Sad: 1\nGlad: 2\nCalm: 3", "Bored has no number"),
        ("Sad: 1\nGlad: 2\nCalm: 3\nBored: 4\nSad: 5", "Sad has several different numbers"),
        ("Sad: 11\nGlad: 2\nCalm: 3\nBored: 4", "Sad has 11, which is not on the scale"),
        ("Sad: -1\nGlad: 2\nCalm: 3\nBored: 4", "Sad has -1, which is not on the scale"),
        ("Sad: 5/5\nGlad: 2\nCalm: 3\nBored: 4", "Sad has 5, which is not on the scale"),
        ("Sad: 4-5\nGlad: 2\nCalm: 3\nBored: 4", "Sad has no number"),
        ("Unsad: 4\nGlad: 2\nCalm: 3\nBored: 4", "Sad has no number"),
        ("", "Sad has no number"),
    ],
)
def test_replies_that_cannot_be_read_say_why(reply, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_reply(reply, EMOTIONS)


def test_the_published_rule():
    assert official_reply("Sad: 1\nGlad: 3.7\nSad: 2", False) == ({"Sad": "2", "Glad": "3"}, {})
    assert official_reply("Sad:1\n**Glad**: 2\nCalm: -3", False) == ({}, {})
    text = "First pass scores:\nSad: 1\n\nCritique: well.\n\nRevised scores:\nSad: 2\n"
    assert official_reply(text, True) == ({"Sad": "1"}, {"Sad": "2"})
    assert official_reply("Revised scores:\nSad: 2", True) == ({}, {"Sad": "2"})
    assert official_reply("First pass scores:\nSad: 2", True) == ({}, {}), "the first set needs the second heading"


def test_two_passes_are_told_apart_and_the_critique_belongs_to_none():
    first, revised = passes(
        "**First pass scores**:\nSad: 1\n**Critique**: Sad: 5 is better\n**Revised scores:**\nSad: 5"
    )
    assert "1" in first and "5" not in first and "5" in revised
    assert passes("Sad: 1") == ("Sad: 1", "")


# ---- files ---------------------------------------------------------------------------------------------------------


def test_the_prompt_loses_its_second_pass():
    asked = read_questions(eq_bench._SAMPLE)[0].prompt
    assert "Critique: <your critique here>" in asked and "Revised scores:" in asked
    once = single_pass(asked)
    assert not any(word in once.lower() for word in ("critique", "revised", "first pass"))
    assert once.endswith("Your answer:") and "Fond: <score>" in once and "[End of answer]" in once
    assert once.count("<score>") == 4 and single_pass("Rate Sad.") == "Rate Sad."


def write(tmp_path, *questions):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({str(i): question for i, question in enumerate(questions, start=1)}))
    return path


def question(**changes):
    numbers = {f"emotion{i}": name for i, name in enumerate(EMOTIONS, start=1)}
    numbers |= {f"emotion{i}_score": value for i, value in enumerate(REFERENCE.values(), start=1)}
    return {"prompt": "Rate.", "reference_answer_fullscale": numbers | changes}


def test_numbers_may_be_texts(tmp_path):
    (one,) = read_questions(write(tmp_path, question(emotion1_score="7")))
    assert one.reference == REFERENCE | {"Sad": 7}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (question(emotion2="Sad"), "question 2 has the emotions Sad, Calm, Bored; there should be four"),
        (question(emotion1_score="much"), "question 2 has 'much' as emotion1_score, which should be a number"),
        (question(emotion1_score=11), "question 2 has '11' as emotion1_score"),
        ({"prompt": "Rate."}, "question 2 has no reference_answer_fullscale"),
        ({"reference_answer_fullscale": {}}, "question 2 has no field 'prompt'"),
        ([1], r"question 2 is \[1\], where a JSON object should be"),
    ],
)
def test_bad_questions_are_one_sentence(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path, question(), bad))


def test_questions_about_one_dialogue_are_one_cluster(tmp_path):
    asked = ["How?\n\nAl: Hi.\nBo: No.\nRate.", "How?\nAl: Hi.\nRate.", "How?\n\nCy: Hi.\nBo: No.\nRate."]
    benchmark = build(EQBenchConfig(path=str(write(tmp_path, *(question() | {"prompt": text} for text in asked)))))
    assert [benchmark.cluster(sample) for sample in benchmark.samples()] == ["1", "1", "3"]


def test_files_that_are_something_else_are_one_sentence(tmp_path):
    path = tmp_path / "other.json"
    for text, message in (
        ("[1]", "should be an object of questions"),
        ("{", "cut off"),
        ("{}", "object of questions"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_questions(path)
    with pytest.raises(UserError, match="could not be read"):
        build(EQBenchConfig(path=str(tmp_path / "nowhere.json")))


# ---- runs ----------------------------------------------------------------------------------------------------------


def answers(benchmark, replies):
    said = {s.messages: reply for s, reply in zip(benchmark.samples(), replies, strict=True)}
    return Stated(lambda request: said[request.messages])


def test_what_cannot_be_read_is_counted_apart_and_the_total_with_it_as_0_stated_beside(tmp_path):
    benchmark = build(EQBenchConfig())
    truths = [s.target for s in benchmark.samples()]
    assert truths[1] == "Protective: 5\nAmused: 1\nFrustrated: 6\nProud: 2"
    replies = [truths[0], truths[1].replace("6", "10"), "I feel nothing."]
    summary, rows = run(benchmark, answers(benchmark, replies), tmp_path)
    second = 100 - 7.477 * 3.25
    assert values(summary) == pytest.approx(
        {"score": (100 + second) / 2, "score_all": (100 + second) / 3, "unparsable": 1 / 3}
    )
    assert summary.n_unscored == 0 and summary.estimates["score"].n == 2 and rows[2].values["unparsable"] == 1


def test_revised_scores_count_where_they_are_asked_for(tmp_path):
    benchmark = build(EQBenchConfig(revise=True, limit=2))
    assert "Revised scores:" in benchmark.samples()[0].messages[0].content
    truths = [s.target for s in benchmark.samples()]
    worse = truths[0].replace("8", "4")
    replies = [f"First pass scores:\n{worse}\nCritique: hm.\nRevised scores:\n{truths[0]}", truths[1]]
    found = values(run(benchmark, answers(benchmark, replies), tmp_path)[0])
    assert found == pytest.approx(
        {"score": 100, "score_all": 50, "unparsable": 0.5, "first_pass": (100 - 7.477 * 3.25 + 100) / 2}
    )


def test_compat_reads_by_the_published_rule_and_keeps_the_published_total(tmp_path, caplog):
    for compat in ("reference", None):
        benchmark = build(EQBenchConfig(compat=compat))
        truths = [s.target for s in benchmark.samples()]
        replies = [truths[0], truths[1].replace("1", "1.4"), truths[2].replace("Guilty", "**Guilty**")]
        folder = tmp_path / str(compat)
        summary, rows = run(benchmark, answers(benchmark, replies), folder)
        benchmark.write_artifacts(rows, folder)
        if compat is None:
            cost = 6.5 / (1 + math.exp(-1.2 * (0.4 - 4)))
            assert values(summary) == pytest.approx(
                {"score": 100 - 7.477 * cost / 3, "score_all": 100 - 7.477 * cost / 3, "unparsable": 0}
            )
            assert not (folder / "published.json").exists()
        else:
            assert values(summary) == pytest.approx({"score": 100, "score_all": 200 / 3, "unparsable": 1 / 3})
            total = json.loads((folder / "published.json").read_text())
            assert total == pytest.approx(
                {"first_pass": 100, "revised": 0, "score": 100, "parsable": 2 / 3, "failed": True}
            )
            assert "66.7 % of replies are parsable" in caplog.text


@pytest.mark.parametrize("revise", [False, True])
def test_the_constant_answer_is_the_best_constant(tmp_path, revise):
    benchmark = build(EQBenchConfig(revise=revise))
    references = [question.reference for question in read_questions(eq_bench._SAMPLE)]
    best = max(constant_total(references, value) for value in range(11))
    found = values(run(benchmark, Trivial("constant"), tmp_path / "constant")[0])
    assert found["score"] == pytest.approx(best) and found["unparsable"] == 0
    random = values(run(benchmark, Trivial("random"), tmp_path / "random")[0])
    assert random["unparsable"] == 0 and random["score"] < best


def test_a_real_lm(llama, tmp_path):
    import persona

    summary, rows = run(build(EQBenchConfig(max_new_tokens=4)), persona.load(llama), tmp_path)
    assert values(summary) == {"score_all": 0, "unparsable": 1}, "a random LM writes no scores"
    assert len(rows) == 3 and all(row.raw for row in rows)
