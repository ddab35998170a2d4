import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from evaluation_toys import ToyModel
from report_toys import BENCHMARKS, STACKS, Choices, Grades, Talks, toy_tree
from rich.console import Console

from persona.errors import UserError
from persona.evaluation.diff import as_json, diff, main
from persona.evaluation.episodes import run_benchmark
from persona.evaluation.results import read_rows, read_summary
from persona.evaluation.statistics import Metric, holm


@pytest.fixture(scope="session")
def root(tree):
    return tree[0].parents[1]


def of(tree, benchmark, stack):
    return next(place for place in tree if place.parts[-2:] == (benchmark, stack))


def test_two_folders_by_hand(tree):
    a, b = of(tree, "choices", "untouched"), of(tree, "choices", "Persona-Plug")
    (pair,) = diff(a, b).pairs
    values = [{r.id: r.values for r in read_rows(place / "samples.jsonl") if r.values} for place in (a, b)]
    shared = sorted(values[0].keys() & values[1].keys())
    assert pair.shared == len(shared)
    by_name = {line.comparison.metric: line for line in pair.lines}
    assert list(by_name) == ["length", "accuracy"]
    line = by_name["accuracy"]
    means = [sum(one[i]["accuracy"] for i in shared) / len(shared) for one in values]
    assert [line.a.value, line.b.value] == pytest.approx(means)
    assert line.comparison.difference.value == pytest.approx(means[1] - means[0])  # B minus A
    assert line.comparison.difference.low < line.comparison.difference.value < line.comparison.difference.high
    p = [one.comparison.difference.p for one in pair.lines]
    assert [one.comparison.p_holm for one in pair.lines] == pytest.approx(holm(p))
    assert pair.settings == {"stack.0.0": ["untouched", "Persona-Plug"]}
    (turned,) = diff(b, a).pairs
    assert turned.lines[1].comparison.difference.value == pytest.approx(means[0] - means[1])


def test_a_run_against_itself_differs_in_nothing(tree):
    place = of(tree, "talks", "untouched")
    (pair,) = diff(place, place).pairs
    assert pair.settings == {}
    assert [(one.comparison.difference.value, one.comparison.better) for one in pair.lines] == [(0.0, None)] * 2


def test_trees_are_paired_by_benchmark_and_stack_without_trivial_answers(tree, root, tmp_path):
    other = tmp_path / "other"
    for benchmark, stack in (("ratings", "untouched"), ("talks", "untouched"), ("talks", "constant answer")):
        shutil.copytree(of(tree, benchmark, stack), other / benchmark / stack)
    toy_tree(other, 28, {"brand new": 0.9}, BENCHMARKS[:1])
    found = diff(root, other)
    assert [(p.a.summary.benchmark, p.a.summary.stack, p.b.summary.stack) for p in found.pairs] == [
        ("ratings", "untouched", "untouched"),
        ("talks", "untouched", "untouched"),
    ]
    rivals = 4
    assert len(found.only_a) == len(BENCHMARKS) * rivals - 2
    assert [run.summary.stack for run in found.only_b] == ["brand new"]
    # Holm's correction is over both pairs together.
    lines = [line for pair in found.pairs for line in pair.lines]
    assert [one.comparison.p_holm for one in lines] == pytest.approx(
        holm([one.comparison.difference.p for one in lines])
    )
    assert len(lines) == 4


def test_one_stack_each_is_a_pair_whatever_they_are_called(tmp_path):
    for name, skill in (("a", 0.3), ("b", 0.9)):
        toy_tree(
            tmp_path / name, 14, {f"stack {name}": skill, "constant answer": STACKS["constant answer"]}, BENCHMARKS[:2]
        )
    found = diff(tmp_path / "a", tmp_path / "b")
    assert [(pair.a.summary.stack, pair.b.summary.stack) for pair in found.pairs] == [("stack a", "stack b")] * 2
    assert found.only_a == found.only_b == []


def test_a_trivial_answer_can_be_named(tree):
    (pair,) = diff(of(tree, "choices", "constant answer"), of(tree, "choices", "Persona-Plug")).pairs
    assert pair.a.summary.stack == "constant answer"


def test_what_cannot_be_compared_is_one_sentence(tree, root, tmp_path, capsys):
    mine = of(tree, "ratings", "untouched")

    class Newer(Grades):
        version = "2"

    class Reworded(Talks):
        prompts = tuple(replace(prompt, text=prompt.text + "!") for prompt in Talks.prompts)

    def other(benchmark, name):
        run_benchmark(benchmark, ToyModel(), tmp_path / name, stack="x", settings={}, progress=False)
        return tmp_path / name

    with pytest.raises(UserError, match=r"differ in benchmark_version \(2 and 1\), so they cannot be compared\.$"):
        diff(mine, other(Newer(28), "newer"))
    with pytest.raises(UserError, match=r"differ in data \(\w+ and \w+\), so they cannot be compared\.$"):
        diff(mine, other(Grades(20), "shorter"))
    toy_tree(tmp_path / "reworded", 28, {"untouched": 0.35}, (Reworded,))
    with pytest.raises(UserError, match=r"differ in prompts \(in_voice, helpful\), so they"):
        diff(of(tree, "talks", "untouched"), tmp_path / "reworded")
    with pytest.raises(
        UserError, match='Nothing to compare: .* holds "untouched" on ratings; .* holds "untouched" on '
    ):
        diff(mine, of(tree, "choices", "untouched"))
    with pytest.raises(UserError, match='two runs of "untouched" on ratings'):
        shutil.copytree(mine, tmp_path / "twice" / "one")
        shutil.copytree(mine, tmp_path / "twice" / "two")
        diff(root, tmp_path / "twice")
    assert main([str(mine), str(tmp_path / "nowhere")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("No summary.json in or below") and printed.err.count("\n") == 1


def test_undefined_numbers_are_no_differences(tmp_path):
    class Empty(Choices):
        metrics = {"share": Metric(aggregate="ratio", columns=("zero", "zero"))}
        primary = "share"

        async def episode(self, sample, roles):
            return replace(await super().episode(sample, roles), values={"zero": 0.0}, reason="")

    toy_tree(tmp_path / "a", 8, {"x": 0.2}, (Empty,))
    toy_tree(tmp_path / "b", 8, {"x": 0.8}, (Empty,))
    (pair,) = diff(tmp_path / "a", tmp_path / "b").pairs
    assert pair.lines == [] and pair.shared == 8 and pair.without == ["share"]


def test_json_and_the_table_say_the_same(tree, capsys):
    a, b = of(tree, "ratings", "untouched"), of(tree, "ratings", "Persona-Plug")
    assert main([str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(as_json(diff(a, b))))
    (pair,) = found["pairs"]
    assert pair["without"] == []
    assert pair["settings"] == {"stack.0.0": {"a": "untouched", "b": "Persona-Plug"}}
    summary = read_summary(a)
    assert pair["a"] == {"folder": str(a), "stack": "untouched", "n": 28, "scored": 28 - summary.n_unscored}
    console = Console(file=io.StringIO(), width=120)
    assert main([str(a), str(b)], console) == 0
    text = console.file.getvalue()
    for metric in pair["metrics"]:
        assert metric["difference"]["n"] == pair["shared"]
        for one in (metric["a"], metric["b"], metric["difference"]):
            assert f"[{one['low']:.3f}, {one['high']:.3f}]".replace("-", "−") in text
    assert "stack.0.0" in text and "rmse ↓" in text and "Holm over 2 comparisons" in text
    rmse = next(metric for metric in pair["metrics"] if metric["name"] == "rmse")
    assert rmse["difference"]["value"] < 0 and rmse["b_is_better"] in (True, None)


def test_as_a_command(tree):
    a, b = of(tree, "choices", "untouched"), of(tree, "choices", "Persona-Plug")
    done = subprocess.run(
        [sys.executable, "-m", "persona.evaluation.diff", str(a), str(b), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(json.loads(done.stdout)["pairs"]) == 1, done.stderr
