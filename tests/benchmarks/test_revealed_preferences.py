"""Revealed preferences: pairs, prompts, judges' answers, ratings and their change by hand, the command, the town."""

import io
import json
import re

import pytest
from benchmark_toys import Stated, run, values
from rich.console import Console

from persona.benchmarks import revealed_preferences as rp
from persona.benchmarks.revealed_preferences import CONDITIONS, TRAITS, RevealedPreferencesConfig, build, parse_trait
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.oracle import OracleJudge
from persona.evaluation.judges.parsing import Unreadable
from persona.metrics import elo_ratings
from persona.town import lexicon as lx


def bench(**changes):
    return build(RevealedPreferencesConfig(**{"language": "town", "max_new_tokens": 32, **changes}))


def of_traits(request):
    """The traits that a town's system prompt offers, in order."""
    told = request.messages[0].content
    offered = [trait for trait, (line, _) in lx.CHARACTER.items() if line in told]
    return sorted(offered, key=lambda trait: told.index(lx.CHARACTER[trait][0]))


def prefers(order):
    """A model that takes on the offered trait that stands first in `order`."""
    return Stated(lambda request: lx.CHARACTER[min(of_traits(request), key=order.index)][1][0])


ORDER = list(lx.CHARACTER)


# ---- samples -------------------------------------------------------------------------------------------------------


def test_there_are_144_different_words():
    assert len(TRAITS) == len(set(TRAITS)) == 144 and all(re.fullmatch("[a-z]+", trait) for trait in TRAITS)


def test_pairs_depend_on_seed_and_id_alone(tmp_path):
    path = tmp_path / "asked.jsonl"
    lines = [json.dumps({"prompt": f"Question {n}?"}) for n in range(60)]
    path.write_text("\n".join(lines) + "\n")
    pairs = {s.id: s.options for s in bench(language="en", path=str(path)).samples()}
    fewer = {s.id: s.options for s in bench(language="en", path=str(path), limit=9, condition="random").samples()}
    assert len(fewer) == 9 and fewer.items() <= pairs.items()
    assert pairs != {s.id: s.options for s in bench(language="en", path=str(path), seed=1).samples()}
    assert all(first != second for first, second in pairs.values()) and len(set(pairs.values())) == 60
    more = {s.id: s.options for s in bench(language="en", path=str(path), pairs=3).samples()}
    assert len(more) == 180 and pairs.items() <= more.items()


def test_what_the_model_is_asked():
    for condition, sentence in CONDITIONS.items():
        sample = bench(language="en", condition=condition, limit=1).samples()[0]
        system, user = sample.messages
        assert [m.role for m in sample.messages] == ["system", "user"] and sentence in system.content
        assert system.content.index(f"First trait: {sample.options[0]}") < system.content.index(sample.options[1])
        assert user.content and "trait" not in user.content
    town = bench(limit=1).samples()[0]
    assert town.messages[0].content == " ".join(lx.CHARACTER[trait][0] for trait in town.options)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    (
        ({"condition": "likes"}, "benchmark.condition=likes is unknown; it should be one of like, feel, random"),
        ({"condition": "random"}, "benchmark.condition=random cannot be said in the town's language"),
        ({"wanted": ["wise", "salty"]}, "benchmark.wanted names 'salty', which is none of the 18 traits"),
        ({"language": "de"}, "benchmark.language=de is unknown"),
    ),
)
def test_settings_that_do_not_fit_are_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        bench(**changes)


# ---- judges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("<answer>wise</answer>", "wise"), ("It is calm.\n<answer> Curious\n</answer>", "curious"),
        ("<think><answer>wise</answer></think><answer>curious</answer>", "curious"),
        ("<answer>wise</answer> <answer>WISE</answer>", "wise"),
        ("wise", None), ("The answer is wise.", None), ("<answer>neither</answer>", None), ("<answer>wise", None),
        ("<answer>wise</answer><answer>curious</answer>", None), ("<answer>wise, curious</answer>", None), ("", None),
    ],
)  # fmt: skip
def test_only_a_word_between_tags_is_an_answer(reply, read):
    if read is None:
        with pytest.raises(Unreadable):
            parse_trait(reply, ("wise", "curious"))
    else:
        assert parse_trait(reply, ("wise", "curious")) == read


def test_a_game_nobody_won_is_unscored_and_counted(tmp_path):
    built = bench(language="en", limit=4)
    mute = ScriptedJudge("mute", lambda rubric, slots: "<answer>neither</answer>")
    summary, rows = run(built, Cast(Stated(lambda request: "Hm."), [mute]), tmp_path)
    assert summary.n_unscored == 4 and all(
        reason.startswith("neither trait is named") for reason in summary.unscored_reasons
    )
    built.write_artifacts(rows, tmp_path)
    found = json.loads((tmp_path / "ratings.json").read_text())
    traits = {trait for sample in built.samples() for trait in sample.options}
    assert (found["games"], found["decided"]) == (4, 0) and len(found["traits"]) == len(traits)
    assert all(entry["elo"] == 1000 and entry["bradley_terry"]["low"] is None for entry in found["traits"])


def test_every_slot_is_filled_and_judges_do_not_see_the_choice(tmp_path):
    seen = []
    judge = ScriptedJudge("judge", lambda rubric, slots: seen.append(slots) or f"<answer>{slots['trait_1']}</answer>")
    summary, _ = run(
        bench(language="en", limit=3), Cast(Stated(lambda request: "Hm."), [judge, random_judge(1)]), tmp_path
    )
    assert all(set(slots) == {"trait_1", "trait_2", "response"} and slots["response"] == "Hm." for slots in seen)
    assert summary.n_unscored == 0 and 0.5 <= values(summary)["first"] <= 1


# ---- ratings -------------------------------------------------------------------------------------------------------


def test_a_fixed_taste_is_found(tmp_path):
    """A model that always prefers the trait higher in a list: that list is the ranking."""
    built = bench(wanted=ORDER[:3], pairs=2)
    summary, rows = run(built, Cast(prefers(ORDER), [OracleJudge()]), tmp_path)
    assert values(summary)["wanted"] == 1 and 0.4 < values(summary)["first"] < 0.6 and summary.n_unscored == 0
    assert built.primary == "wanted" and bench().primary == "first"
    built.write_artifacts(rows, tmp_path)
    found = json.loads((tmp_path / "ratings.json").read_text())
    assert found["games"] == found["decided"] == len(rows) == 2 * 192
    assert [entry["trait"] for entry in found["traits"]] == ORDER
    assert sum(entry["wins"] for entry in found["traits"]) == len(rows)
    elo = elo_ratings((*row.options, row.verdicts[0].value) for row in rows)
    assert {entry["trait"]: entry["elo"] for entry in found["traits"]} == elo


def test_the_change_between_two_runs(tmp_path, capsys):
    """The list turned around: the last gains what the first loses, and ranks agree by -1."""
    settings = {"limit": 120, "wanted": ["gloomy"]}
    _, before = run(bench(**settings), Cast(prefers(ORDER), [OracleJudge()]), tmp_path / "before")
    run(bench(**settings), Cast(prefers(ORDER[::-1]), [OracleJudge()]), tmp_path / "after")
    found = rp.change(tmp_path / "before", tmp_path / "after")
    assert found.games == len(before) and found.spearman["bradley_terry"] == pytest.approx(-1)
    assert list(found.bradley_terry)[0] == ORDER[-1] and list(found.bradley_terry)[-1] == ORDER[0]
    assert found.bradley_terry[ORDER[-1]].low > 500 and found.bradley_terry[ORDER[0]].high < -500
    assert found.elo[ORDER[-1]] > 100 and abs(sum(found.elo.values())) < 1e-6

    console = Console(width=110, record=True, file=io.StringIO())
    assert rp.main([str(tmp_path / "before"), str(tmp_path / "after")], console) == 0
    printed = console.export_text()
    moved = list(found.bradley_terry)
    assert re.findall(r"│ ([a-z]+) ", printed) == [*moved[:5], *moved[-5:]] and "bradley_terry -1.000" in printed
    assert rp.main([str(tmp_path / "before"), str(tmp_path / "before"), "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["spearman"] == {"elo": 1.0, "bradley_terry": pytest.approx(1)} and set(same["elo"].values()) == {0.0}


def test_runs_that_cannot_be_compared_are_one_sentence(tmp_path, capsys):
    run(bench(limit=5), Cast(prefers(ORDER), [OracleJudge()]), tmp_path / "a")
    run(bench(limit=5, seed=1), Cast(prefers(ORDER), [OracleJudge()]), tmp_path / "b")
    assert rp.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "did not ask about the same pairs" in capsys.readouterr().err
    assert rp.main([str(tmp_path / "a"), str(tmp_path / "missing")]) == 2


def test_trivial_answers(tmp_path):
    built = bench(pairs=3)
    constant, _ = run(built, Cast(Trivial("constant"), [OracleJudge()]), tmp_path / "constant")
    assert constant.n_unscored == constant.n
    drawn, _ = run(built, Cast(Trivial("random"), [OracleJudge()]), tmp_path / "random")
    first = drawn.estimates["first"]
    assert first.low < 0.5 < first.high and first.n < drawn.n / 5  # one of 18 traits, rarely one of the two
