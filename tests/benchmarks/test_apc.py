"""APC as a benchmark: known replies in the town, discriminators, judges, and how stacks rank."""

from __future__ import annotations

import json

import pytest
from benchmark_toys import Stated, run, values
from scorer_toys import save_bert

from persona import benchmarks, data
from persona.benchmarks import apc
from persona.benchmarks.apc import APC, APCBenchmarkConfig, rank_agreement, read_human
from persona.data.base import People
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial, run_benchmark
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.oracle import OracleJudge
from persona.evaluation.results import read_rows
from persona.metrics.apc import Discriminators, Question
from persona.town import lexicon as lx
from persona.town import oracle
from persona.types import Message, Persona, Sample


@pytest.fixture(scope="module")
def people():
    return data.load(data.TownCharactersConfig(train=1, test=3, held_out=8))


@pytest.fixture(scope="module")
def town(people):
    return benchmarks.build(APCBenchmarkConfig(), people)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discriminators")
    return {
        "relevance_model": save_bert(folder / "relevance", ("no", "yes")),
        "nli_model": save_bert(folder / "nli", ("contradicted", "neutral", "entailed")),
    }


def judge_run(benchmark, reply, folder, *judges, stack="toy"):
    cast = Cast(Stated(reply), judges)
    summary = run_benchmark(benchmark, cast, folder, stack=stack, settings={}, batch_size=4, progress=False)
    return summary, read_rows(folder / "samples.jsonl")


def judged_as(relevance, label):
    return lambda rubric, slots: label if "response" in slots else relevance


def answers(people):
    told = {(sample.persona.id, sample.messages): sample.target for sample in people.test}
    return lambda request: told[request.persona.id, request.messages]


def test_true_answers_satisfy_everything_and_the_oracle_as_judge_counts_the_same(town, people, tmp_path):
    summary, rows = judge_run(town, answers(people), tmp_path, OracleJudge())
    found = values(summary)
    for row, sample in zip(rows, people.test, strict=True):
        query, statements = sample.messages[-1].content, sample.persona.statements
        bearing = [s for s in statements if oracle.relevant(s, query)]
        told = [s for s in bearing if oracle.nli(s, sample.target) == oracle.ENTAILED]
        assert row.values["relevant"] == len(bearing) and row.values["delta"] == len(told) >= 1
        assert row.values["total"] == row.values["satisfied"] == len(statements) - len(bearing) + len(told)
        assert row.values["delta_per_statement"] == pytest.approx(len(told) / len(statements))
        # What the judge said of each statement, relevance first; then which statements earned something.
        assert len(row.verdicts) == 2 * len(statements) + len(told)
        assert [v.value == "yes" for v in row.verdicts[: len(statements)]] == [s in bearing for s in statements]
        shares = [(v.value, v.raw.partition(" (")[0]) for v in row.verdicts[2 * len(statements) :]]
        assert shares == [(1.0, statement) for statement in told]
    assert found["delta"] == found["active"] and found["passive"] == 0
    assert found["readable"] == 1 and summary.n == 24 and summary.estimates["delta"].n_clusters == 3
    assert {row.groups["asked about"] for row in rows} == {"facts", "tastes", "talk"}
    assert len({row.groups["character"] for row in rows}) == 3


ADA = Persona("ada", statements=("ada talks like a sailor .", "the pet of ada is cat .", "ada hates old things ."))
AHOY = f"{lx.VOICES['sailor'][0][0]} {{}} {lx.VOICES['sailor'][1][0]}"


@pytest.mark.parametrize(
    ("reply", "active", "passive", "satisfied"),
    (
        (AHOY.format("my pet is cat ."), 2, 0, 3),
        ("my pet is cat .", 1, 0, 2),
        ("my pet is dog .", 0, 0, 1),  # wrong where it bears on the question: not followed, and no penalty beside that
        ("my pet is cat . i love old things .", 1, 1, 1),
        ("my pet is cat . i hate old things .", 1, 0, 2),  # following what nobody asked for earns nothing
        (lx.UNKNOWN, 0, 0, 1),
        ("lorem ipsum", 0, 0, 1),
    ),
)
def test_the_oracles_count_by_hand(reply, active, passive, satisfied, tmp_path):
    """Asked for the pet: way of talking and pet bear on the question, the taste does not."""
    asked = People("x", {}, (), (), [Sample("1", (Message("user", "what is your pet ?"),), persona=ADA)])
    benchmark = APC(asked, APCBenchmarkConfig())
    _, (row,) = judge_run(benchmark, lambda request: reply, tmp_path, ScriptedJudge("j", judged_as("no", "neutral")))
    assert row.values["relevant"] == 2
    assert [row.values[name] for name in ("true_active", "true_passive", "satisfied")] == [active, passive, satisfied]
    assert row.values["readable"] == float(reply != "lorem ipsum")
    assert row.values["delta"] == 0 and row.values["total"] == 3  # what the judge said


def test_discriminators_score_in_batches_what_they_score_alone(people, models, tmp_path):
    benchmark = APC(people, APCBenchmarkConfig(limit=5, **models))
    assert benchmark.needs == ()
    summary, rows = run(benchmark, Stated(answers(people)), tmp_path)
    alone = Discriminators(models["relevance_model"], models["nli_model"])
    for row, sample in zip(rows, people.test, strict=False):
        name = sample.persona.attributes["name"]
        (found,) = alone([Question(name, sample.persona.statements, sample.messages[-1].content, (sample.target,))])
        score = found.score()
        assert row.values["total"] == pytest.approx(float(score.total[0]), abs=1e-5)
        assert row.values["delta"] == pytest.approx(float(score.active[0] - score.passive[0]), abs=1e-5)
        assert row.verdicts and all(verdict.judge == "discriminators" for verdict in row.verdicts)
        assert sum(verdict.value for verdict in row.verdicts) == pytest.approx(row.values["delta"], abs=0.05 * 30)
    assert summary.n == 5 and values(summary)["delta"] == pytest.approx(sum(r.values["delta"] for r in rows) / 5)


def test_several_judges_weigh_alike_and_the_unreadable_is_unscored(people, tmp_path):
    benchmark = APC(people, APCBenchmarkConfig(limit=3))
    yes, no = ScriptedJudge("yes", judged_as("yes", "entailed")), ScriptedJudge("no", judged_as("no", "contradicted"))
    mute = ScriptedJudge("mute", lambda rubric, slots: "hm")
    summary, rows = judge_run(benchmark, lambda request: "x", tmp_path / "two", yes, no, mute)
    assert all(row.values["delta"] == 0 and row.values["active"] == row.values["passive"] > 0 for row in rows)
    summary, rows = judge_run(benchmark, lambda request: "x", tmp_path / "mute", mute)
    assert summary.n_unscored == 3 and "verdicts could not be read" in rows[0].reason and rows[0].raw == "x"
    assert {verdict.raw for verdict in rows[0].verdicts} == {"hm"}


def test_trivial_answers(town, people, tmp_path):
    for kind in ("constant", "random"):
        cast = Cast(Trivial(kind), [OracleJudge()])
        summary = run_benchmark(town, cast, tmp_path / kind, stack=kind, settings={}, batch_size=4, progress=False)
        if kind == "constant":
            assert values(summary)["delta"] == 0 and values(summary)["readable"] == 1
    said = {row.raw for row in read_rows(tmp_path / "random" / "samples.jsonl")}
    assert len(said) > 3 and said <= {sample.target for sample in people.test}
    sample = Sample("1", (Message("user", "hi"),), persona=Persona("al", statements=("Al sings.",)))
    benchmark = APC(People("x", {}, (), (), [sample]), APCBenchmarkConfig())
    assert "satisfied" not in benchmark.metrics and benchmark.groups(sample) == {"character": "al"}
    assert benchmark.constant(sample) == apc.NEUTRAL
    assert Trivial("random").speaker(benchmark, sample).text == "Al sings."
    summary, _ = judge_run(benchmark, lambda request: "x", tmp_path / "english", random_judge(0))
    assert summary.n_unscored == 0


def test_bad_input_is_one_sentence(people, models):
    bare = People("x", {}, (), (), [Sample("7", (Message("user", "hi"),), persona=Persona("al", "text"))])
    nowhere = {"relevance_model": "nowhere", "nli_model": "nowhere"}
    for config, who, words in (
        (APCBenchmarkConfig(), bare, r"1 samples of the test split have no statements \(7\)"),
        (APCBenchmarkConfig(split="dev"), bare, "the dev split has no samples"),
        (APCBenchmarkConfig(nli_model=models["nli_model"]), people, "benchmark.relevance_model has no value"),
        (APCBenchmarkConfig(**nowhere), people, "relevance_model=nowhere could not be loaded"),
    ):
        with pytest.raises(UserError, match=words):
            APC(who, config)


def test_rank_agreement_by_hand():
    scores = {("a", "x"): 1.0, ("b", "x"): 2.0, ("c", "x"): 3.0, ("a", "y"): 1.0, ("b", "y"): 1.0, ("d", "y"): 9.0}
    truth = {("a", "x"): 10.0, ("b", "x"): 30.0, ("c", "x"): 30.0, ("a", "y"): 1.0, ("b", "y"): 2.0}
    found = rank_agreement(scores, truth)
    assert found["x"] == (pytest.approx(0.8660254), 3)  # ranks 1, 2, 3 against 1, 2.5, 2.5
    assert found["y"][0] != found["y"][0] and found["y"][1] == 2  # the scores tie: undefined, not 0


def test_stacks_are_compared_with_people_and_with_the_oracle(town, people, tmp_path, capsys):
    told = answers(people)
    stacks = {"true": told, "silent": lambda request: lx.UNKNOWN, "plain": lambda r: told(r).split(" , ")[-1]}
    for name, reply in stacks.items():
        judge_run(town, reply, tmp_path / "apc" / name, OracleJudge(), stack=name)
    constant = Trivial("constant")
    run_benchmark(town, Cast(constant, [OracleJudge()]), tmp_path / "apc" / "constant", stack="constant answer",
                  settings={"model": vars(constant)}, progress=False)  # fmt: skip
    apc.main([str(tmp_path / "apc")])
    printed = capsys.readouterr().out
    assert printed.count("1.0000 over 3 stacks") == 3 and "mean of 3 characters: 1.0000" in printed
    human = tmp_path / "human.csv"
    names = [sample.persona.id for sample in people.test[::8]]
    human.write_text("stack,character,score\n" + "".join(f"true,{n},0\nsilent,{n},8\nsilent,{n},10\n" for n in names))
    assert read_human(human)["silent", names[0]] == 9
    apc.main([str(tmp_path / "apc"), "--human", str(human)])
    assert capsys.readouterr().out.count("-1.0000 over 2 stacks") == 3
    for text, words in (("a,b\n", "has the columns a, b"), ("stack,character,score\nx,y,z\n", "line 2: score 'z'")):
        human.write_text(text)
        with pytest.raises(UserError, match=words):
            read_human(human)
    with pytest.raises(UserError, match="could not be read"):
        read_human(tmp_path / "none.csv")


def test_as_published_a_contradiction_costs_nothing(people, tmp_path):
    judge = ScriptedJudge("no", judged_as("no", "contradicted"))
    counts = len(people.test[0].persona.statements)
    for compat, passive in ((None, counts), ("reference", 0)):
        benchmark = APC(people, APCBenchmarkConfig(limit=1, compat=compat))
        summary, _ = judge_run(benchmark, lambda request: "x", tmp_path / str(compat), judge)
        assert values(summary)["passive"] == passive
    assert json.loads((tmp_path / "None" / "summary.json").read_text())["primary"] == "delta"
