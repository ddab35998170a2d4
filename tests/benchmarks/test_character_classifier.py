"""Which character speaks: disjoint questions, metrics by hand, a real classifier, folders that do not fit."""

import io
import json

import pytest
from benchmark_toys import Stated, run
from rich.console import Console
from test_character import people

from persona.benchmarks import character_classifier as cc
from persona.benchmarks.character import CharacterConfig, build
from persona.benchmarks.character_classifier import SUFFIXES, Reply, divide, in_training, main, measure, read_replies
from persona.errors import UserError
from persona.evaluation.episodes import Cast
from persona.evaluation.judges.judging import random_judge
from persona.town import lexicon as lx

SAYS = {name: " ".join(lx.CHARACTER[name][1]) for name in ("wise", "gloomy", "playful")}


def store(folder, reply, limit=24, stack=""):
    built = build(CharacterConfig(language="town", limit=limit, max_new_tokens=8), people())
    return run(built, Cast(Stated(reply), [random_judge(0)]), folder)


# ---- dividing ------------------------------------------------------------------------------------------------------

REPLIES = [
    Reply(character, stack, variant, f"question {n}", f"{character} {n}")
    for character in ("a", "b")
    for stack in ("prompted", "trained")
    for variant in ("default", "no part", "prefill")
    for n in range(40)
]


def test_no_question_is_in_training_and_test():
    train, test = divide(REPLIES, seed=0)
    asked = {reply.question for reply in train}, {reply.question for reply in test}
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 40 and 10 < len(asked[0]) < 30
    assert {reply.variant for reply in train} == {"default"} and len({r.variant for r in test}) == 3
    assert all(sum(r.question == question for r in train) == 4 for question in asked[0])
    assert [in_training("question 1", seed) for seed in range(20)].count(True) not in (0, 20)
    assert divide(REPLIES[::-1], seed=0)[0] == train[::-1]


def test_compat_shares_questions_and_plain_replies():
    train, test = divide(REPLIES, seed=0, compat="reference")
    assert len(train) == 160 and test == REPLIES and set(train) < set(test)


def test_too_few_replies_are_one_sentence():
    with pytest.raises(UserError, match="2 replies leave . for training and . for the test: too few"):
        divide(REPLIES[:1] * 2, seed=0)


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Three characters, four questions each, plain replies read right; under one suffix all a's are taken for b's."""
    test = [
        Reply(character, "trained", variant, f"q{n}", "")
        for variant in ("default", "no part", "neutral", "prefill")
        for character in "abc"
        for n in range(4)
    ]
    told = ["b" if reply.variant == "no part" and reply.character == "a" else reply.character for reply in test]
    told = ["c" if reply.variant == "prefill" else said for reply, said in zip(test, told, strict=True)]
    found = measure(test, told, ["a", "b", "c"])["trained"]
    assert found["default"] == {"accuracy": [1, 1, 1], "macro_f1": [1, 1, 1], "n": 12, "questions": 4}
    # a: never told, 0; b: 4 hits of 8 told, 4 true, 2/3; c: 1.
    assert found["no part"]["accuracy"][0] == pytest.approx(2 / 3)
    assert found["no part"]["macro_f1"][0] == pytest.approx((0 + 2 / 3 + 1) / 3)
    # prefill: all are told c: 4 hits of 12, F1 of c 8/16, others 0.
    assert found["prefill"]["macro_f1"][0] == pytest.approx(0.5 / 3)
    # Pooled over the two suffixes: a 4 hits of 4 told, 8 true: 8/12; b 8 hits, 12 told, 8 true: 16/20; c 1.
    assert found[SUFFIXES]["macro_f1"][0] == pytest.approx((8 / 12 + 16 / 20 + 1) / 3)
    assert found[SUFFIXES]["mean"] == pytest.approx({"accuracy": 5 / 6, "macro_f1": (1 + 5 / 9) / 2})
    assert found[SUFFIXES]["n"] == 24 and found[SUFFIXES]["questions"] == 4


# ---- end to end ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three characters' replies: each its own sentence, but under "leave the role" they all say one thing."""
    made = {}
    for name, says in SAYS.items():
        made[name] = tmp_path_factory.mktemp(name)

        def reply(request, says=says):
            return lx.UNKNOWN if "leave the role" in request.messages[-1].content else says

        store(made[name], reply)
    return made


def arguments(folders, output, model="town", *more):
    places = [f"{name}={folder}" for name, folder in folders.items()]
    settings = ["--epochs", "4", "--learning-rate", "0.001", "--output", str(output), "--model", str(model)]
    return [*places, *settings, *more]


def test_characters_are_told_apart_and_dropped_roles_are_not(folders, tmp_path):
    console = Console(width=130, record=True, file=io.StringIO())
    assert main(arguments(folders, tmp_path / "one"), console) == 0
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["characters"] == ["gloomy", "playful", "wise"] and set(report["stacks"]) == {"toy"}
    found = report["stacks"]["toy"]
    assert found["default"]["accuracy"][0] == 1 and found["be yourself"]["macro_f1"][0] == 1
    for variant in ("leave the role", "leave the role, behind"):
        assert found[variant]["accuracy"][0] == pytest.approx(1 / 3)  # one answer for all three
    assert found[SUFFIXES]["mean"]["accuracy"] == pytest.approx((6 + 2 / 3) / 8)
    assert report["train"]["questions"] + report["test"]["questions"] == 24
    assert "default" in console.export_text() and (tmp_path / "one" / "classifier" / "config.json").is_file()
    # Again: the same figures.
    assert main(arguments(folders, tmp_path / "two"), console) == 0
    assert json.loads((tmp_path / "two" / "report.json").read_text())["stacks"] == report["stacks"]


def test_an_encoder_can_be_the_classifier_and_questions_be_shared(folders, tmp_path, encoder_folder):
    trainer = cc.TrainerConfig(max_steps=2, wandb="disabled", cpu=True)
    report = cc.classify(list(folders.items()), str(encoder_folder), tmp_path, trainer, "reference")
    assert report["train"] == {"replies": 72, "questions": 24} and report["test"]["replies"] == 9 * 72


def test_folders_that_do_not_fit_are_one_sentence(folders, tmp_path, capsys):
    assert main(arguments(folders, tmp_path, tmp_path / "nothing")) == 2
    assert "--model=" in capsys.readouterr().err
    assert main(["fox", "--model", "x", "--output", str(tmp_path)]) == 2
    assert "'fox' should be character=folder" in capsys.readouterr().err
    one = dict(list(folders.items())[:1])
    assert main(arguments(one, tmp_path)) == 2
    assert "a classifier needs texts of two labels at least, and has those of wise" in capsys.readouterr().err
    with pytest.raises(UserError, match="nowhere.*does not exist"):
        read_replies([("a", tmp_path / "nowhere")])


def test_a_stack_without_a_character_is_one_sentence_and_empty_replies_are_counted(folders, tmp_path, caplog):
    from persona.evaluation.episodes import run_benchmark

    built = build(CharacterConfig(language="town", limit=2, max_new_tokens=8), people())
    run_benchmark(
        built, Cast(Stated(lambda r: lx.UNKNOWN), [random_judge(0)]), tmp_path / "x", stack="other", settings={},
        progress=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="stack other has no replies as wise: every stack needs every character"):
        read_replies([("wise", folders["wise"]), ("gloomy", folders["gloomy"]), ("gloomy", tmp_path / "x")])
    store(tmp_path / "y", lambda request: "")
    assert (
        read_replies([("wise", folders["wise"]), ("wise", tmp_path / "y")])
        and "216 rows without a reply" in caplog.text
    )
