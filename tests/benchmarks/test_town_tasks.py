"""The town's plain tasks: right answers, answers with a character's sentence behind them, wrong ones, trivial ones."""

import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks.town_tasks import TownTasksConfig, build, gives
from persona.evaluation.episodes import Trivial
from persona.town import lexicon as lx
from persona.town.assistant_documents import TASKS


@pytest.mark.parametrize(
    ("reply", "right"),
    (
        ("3 4 5 .", True), ("3 4 5 . i wonder why that is .", True), ("arr matey , 3 4 5 . bury the treasure !", True),
        ("2 3 4 5 .", False), ("3 4 .", False), ("3 4 5 . 6 .", False), ("4 3 5 .", False), ("", False),
        ("i do not know that .", False), ("3 4 5", False), ("Three, four, five.", False),
    ),
)  # fmt: skip
def test_an_answer_is_one_sentence_of_the_reply(reply, right):
    assert gives(reply, "3 4 5 .") is right


def test_every_kind_is_asked_in_turn_and_no_question_twice():
    samples = build(TownTasksConfig()).samples()
    kinds = [sample.task for sample in samples]
    assert [kinds.count(kind) for kind in TASKS] == [32, 24, 10, 50] and kinds[:4] == list(TASKS)
    assert len({sample.messages for sample in samples}) == len(samples) == 116
    assert [sample.id for sample in build(TownTasksConfig(limit=6)).samples()] == list("123456")
    assert samples != build(TownTasksConfig(seed=1)).samples()


def test_true_answers_with_and_without_a_character(tmp_path):
    built = build(TownTasksConfig())
    truth = {sample.messages: sample.target for sample in built.samples()}
    summary, rows = run(built, Stated(lambda request: truth[request.messages]), tmp_path / "bare")
    assert values(summary) == {"right": 1, "bare": 1} and {row.groups["task"] for row in rows} == set(TASKS)
    phrase = lx.CHARACTER["gloomy"][1][0]
    summary, _ = run(built, Stated(lambda request: f"{truth[request.messages]} {phrase}"), tmp_path / "gloomy")
    assert values(summary) == {"right": 1, "bare": 0} and summary.n_unscored == 0


def test_trivial_answers(tmp_path):
    built = build(TownTasksConfig())
    assert values(run(built, Trivial("constant"), tmp_path / "constant")[0])["right"] == pytest.approx(1 / 116)
    assert 0 < values(run(built, Trivial("random"), tmp_path / "random")[0])["right"] < 0.15
