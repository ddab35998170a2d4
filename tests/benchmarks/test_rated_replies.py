"""Counselling and answers to reviews: what is asked, what judges are shown, values by hand, and files."""

import json

import pytest
from benchmark_toys import Stated, values

from persona.benchmarks import counselling, review_reply
from persona.benchmarks.counselling import Counselling, CounsellingConfig, read_dialogues
from persona.benchmarks.review_reply import ReviewReply, ReviewReplyConfig, read_reviews
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial, run_benchmark
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.results import read_rows

BOTH = [(counselling, CounsellingConfig), (review_reply, ReviewReplyConfig)]


def run(benchmark, model, judges, folder):
    cast = Cast(model, judges)
    summary = run_benchmark(benchmark, cast, folder, stack="toy", settings={}, batch_size=4, progress=False)
    return summary, read_rows(folder / "samples.jsonl")


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("module", "config"), BOTH)
def test_values_by_hand_and_what_judges_are_shown(tmp_path, module, config):
    """Two judges: on the first dimension 2 and 4, on the second 5 and nothing, on the third nothing, on the last 1."""
    benchmark, shown = module.build(config(limit=1)), []
    names = list(benchmark.dimensions)
    says = {names[0]: (2, 4), names[1]: (5, None), names[2]: (None, None), names[3]: (1, 1)}

    def judge(place):
        def reply(rubric, slots):
            shown.append(rubric.prompt.messages(**slots)[0].content)
            score = says[slots["dimension"]][place]
            return "It is a reply." if score is None else f"Fine.\n\nFinal score: {score}"

        return ScriptedJudge(f"judge {place}", reply)

    summary, rows = run(benchmark, Stated(lambda request: "There, there."), [judge(0), judge(1)], tmp_path)
    expected = {names[0]: 3, names[1]: 5, names[3]: 1, "overall": 3, "unjudged": 0.25}
    assert values(summary) == pytest.approx(expected)
    assert len(rows[0].verdicts) == 8 and rows[0].raw == "There, there."
    said = benchmark.samples()[0].messages[-1].content
    assert all("There, there." in text and said in text for text in shown)
    for name in names:  # each dimension has a question of its own
        assert sum(f"Rate the {name.upper()}" in text for text in shown) == 2


@pytest.mark.parametrize(("module", "config"), BOTH)
def test_a_reply_that_no_judge_can_rate_is_unscored(tmp_path, module, config):
    benchmark = module.build(config())
    silent = ScriptedJudge("silent", lambda rubric, slots: "Hm.")
    summary, rows = run(benchmark, Stated(lambda request: "Well."), [silent], tmp_path)
    assert summary.n_unscored == summary.n == len(benchmark.samples())
    assert "no verdict can be read" in rows[0].reason


@pytest.mark.parametrize(("module", "config"), BOTH)
def test_trivial_answers_and_a_random_judge(tmp_path, module, config):
    benchmark = module.build(config())
    for kind in ("constant", "random"):
        summary, rows = run(benchmark, Trivial(kind), [random_judge(0)], tmp_path / kind)
        assert 1 < values(summary)["overall"] < 5 and values(summary)["unjudged"] == 0
    assert summary.estimates["overall"].n == len(rows) == 4


def test_a_counsellor_answers_the_whole_conversation():
    first = Counselling(CounsellingConfig()).samples()[0]
    assert [message.role for message in first.messages] == ["system", "user", "assistant", "user"]
    assert "counsellor" in first.messages[0].content


def test_a_review_is_shown_with_its_stars_where_it_has_some(tmp_path):
    given = [
        {"id": 1, "business": "Inn", "review": "Cold.", "rating": 2},
        {"id": 2, "business": "Inn", "review": "Ok"},
    ]
    benchmark = ReviewReply(ReviewReplyConfig(path=str(lines(tmp_path / "reviews.jsonl", *given))))
    texts = [sample.messages[-1].content for sample in benchmark.samples()]
    assert texts == ["Stars: 2 of 5\n\nReview: Cold.", "Review: Ok"]
    assert [benchmark.groups(sample) for sample in benchmark.samples()] == [{"stars": "2"}, {}]
    assert "for Inn" in benchmark.samples()[0].messages[0].content


def turn(role):
    return {"role": role, "content": "hm"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"line 2 has \[\] as messages"),
        (None, "line 2 has None as messages"),
        ([turn("user"), turn("assistant")], "has messages of user, assistant; .* the user last"),
        ([turn("assistant")], "has messages of assistant; user and assistant should take turns"),
        ([turn("user"), turn("user"), turn("user")], "should take turns"),
        ([{"role": "user"}], "line 2, messages has no field 'content'"),
    ],
)
def test_bad_conversations_are_one_sentence(tmp_path, messages, message):
    good = {"id": "a", "messages": [turn("user")]}
    path = lines(tmp_path / "dialogues.jsonl", good, {"id": "b", "messages": messages})
    with pytest.raises(UserError, match=message):
        read_dialogues(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rating": 6}, "line 2 has the rating 6, which should be a whole number from 1 to 5"),
        ({"rating": "many"}, "line 2 has the rating 'many'"),
        ({"review": None}, "line 2 has None as field 'review'"),
        ({"id": "a"}, "line 2 repeats the id 'a'"),
    ],
)
def test_bad_reviews_are_one_sentence(tmp_path, changes, message):
    good = {"id": "a", "business": "Inn", "review": "Cold."}
    path = lines(tmp_path / "reviews.jsonl", good, good | {"id": "b"} | changes)
    with pytest.raises(UserError, match=message):
        read_reviews(path)


@pytest.mark.parametrize(("module", "config"), BOTH)
def test_empty_and_missing_files_and_compat_are_one_sentence(tmp_path, module, config):
    with pytest.raises(UserError, match="holds no"):
        module.build(config(path=str(lines(tmp_path / "empty.jsonl"))))
    with pytest.raises(UserError, match="could not be read"):
        module.build(config(path=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(UserError, match="benchmark.compat=reference: there is no published code"):
        module.build(config(compat="reference"))
