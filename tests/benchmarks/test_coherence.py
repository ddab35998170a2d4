"""Coherence: against stored replies, in both orders, by hand; a judge that likes a place; folders that do not fit."""

import json

import pytest
from benchmark_toys import Stated, run, values
from test_character import WISE, people

from persona.benchmarks import character
from persona.benchmarks.character import CharacterConfig
from persona.benchmarks.coherence import BETTER, CoherenceConfig, build
from persona.errors import UserError
from persona.evaluation.episodes import Cast
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.oracle import OracleJudge
from persona.town import lexicon as lx

SETTINGS = {"language": "town", "limit": 8, "max_new_tokens": 32}
PLAIN = "the fair is big today ."
GLOOMY = lx.CHARACTER["gloomy"][1][0]


@pytest.fixture
def stored(tmp_path):
    """The folder of a stack that says one thing."""

    def store(reply=PLAIN, **changes):
        folder = tmp_path / "stored"
        built = character.build(CharacterConfig(**{**SETTINGS, **changes}), people())
        run(built, Cast(Stated(lambda request: reply), [OracleJudge()]), folder)
        return str(folder)

    return store


def bench(against, **changes):
    return build(CoherenceConfig(**{**SETTINGS, "against": against, **changes}), people())


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (WISE, PLAIN, {"win_rate": 1, "win_rate_decided": 1, "consistent": 1, "position_bias": 0}),
        (PLAIN, WISE, {"win_rate": 0, "win_rate_decided": 0, "consistent": 1, "position_bias": 0}),
        (WISE, f"{WISE} {GLOOMY}", {"win_rate": 1, "win_rate_decided": 1, "consistent": 1, "position_bias": 0}),
        (PLAIN, PLAIN, {"win_rate": 0.5, "consistent": 1, "position_bias": 0}),  # nothing is decided
        ("is the fair", PLAIN, {"win_rate": 0, "win_rate_decided": 0, "consistent": 1, "position_bias": 0}),
    ],
)
def test_the_oracle_compares_replies(stored, tmp_path, ours, theirs, expected):
    summary, rows = run(bench(stored(theirs)), Cast(Stated(lambda request: ours), [OracleJudge()]), tmp_path / "ours")
    assert values(summary) == expected and summary.n == 8 and len(rows[0].verdicts) == 2


def test_a_judge_that_likes_a_place_shows(stored, tmp_path):
    """It decides nothing: half the wins, never consistent, and its bias is the largest there is."""
    first = ScriptedJudge("first", lambda rubric, slots: "<answer>A</answer>")
    summary, _ = run(bench(stored()), Cast(Stated(lambda request: WISE), [first]), tmp_path / "ours")
    assert values(summary) == {"win_rate": 0.5, "consistent": 0, "position_bias": 0.5}


def test_judges_are_told_the_character_and_the_question(stored, tmp_path):
    seen = []
    judge = ScriptedJudge("judge", lambda rubric, slots: seen.append(slots) or "Hm.")
    summary, rows = run(bench(stored(), limit=8), Cast(Stated(lambda request: WISE), [judge]), tmp_path / "ours")
    assert summary.n_unscored == 8 and "no judge is readable in both orders" in rows[0].reason
    assert all({slots["response_a"], slots["response_b"]} == {WISE, PLAIN} for slots in seen) and len(seen) == 16
    assert {slots["question"] for slots in seen} == {row.messages[0]["content"] for row in rows}
    assert BETTER.prompt.slots == {"character", "question", "response_a", "response_b"}
    assert [BETTER.parse(BETTER.reply(answer)) for answer in ("A", "B", "tie")] == ["A", "B", "tie"]


def test_a_question_that_is_asked_twice_does_not_multiply(stored, tmp_path):
    path = tmp_path / "asked.jsonl"
    lines = [json.dumps({"question": text}) for text in ("How?", "Why?", "How?", "How?")]
    path.write_text("\n".join(lines))
    settings = {"path": str(path), "language": "en", "limit": None}
    folder = tmp_path / "en"
    run(
        character.build(CharacterConfig(**{**SETTINGS, **settings}), people()),
        Cast(Stated(lambda r: "Hm."), [random_judge(0)]),
        folder,
    )
    summary, _ = run(
        bench(str(folder), **settings), Cast(Stated(lambda r: "So."), [random_judge(0)]), tmp_path / "ours"
    )
    assert summary.n == 4 and summary.estimates["consistent"].n_clusters == 2


def test_folders_that_do_not_fit_are_one_sentence(stored, tmp_path):
    with pytest.raises(UserError, match="benchmark.against has no value: it should be the results folder"):
        bench(None)
    with pytest.raises(UserError, match="missing.*does not exist"):
        bench(str(tmp_path / "missing"))
    folder = stored()
    with pytest.raises(UserError, match="has no reply to .* of 8 questions .*limit, seed, language and data.path"):
        bench(folder, seed=1)
    ours = tmp_path / "ours"
    run(bench(folder), Cast(Stated(lambda request: WISE), [OracleJudge()]), ours)
    with pytest.raises(UserError, match="ours holds coherence, where character should be"):
        bench(str(ours))
