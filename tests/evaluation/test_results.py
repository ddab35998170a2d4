import json
import math
from dataclasses import fields, replace
from importlib.resources import files

import pytest
from evaluation_toys import Ratings, ToyModel, toy_plots, toy_results
from jsonschema import Draft202012Validator

from persona.errors import UserError
from persona.evaluation.comparison import compare, differing, flatten
from persona.evaluation.episodes import run_benchmark
from persona.evaluation.report import charts
from persona.evaluation.report.sections import curves
from persona.evaluation.results import (
    FORMAT_VERSION,
    Curve,
    Estimate,
    Plots,
    Summary,
    find_runs,
    load_run,
    read_curves,
    read_plots,
    read_summary,
    summarize,
    write_curves,
    write_plots,
    write_summary,
)
from persona.evaluation.statistics import AGGREGATES, Metric, holm

TWO = {"untouched": 0.3, "Persona-Plug": 0.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    toy_results(folder, n=84, stacks=TWO)
    return folder


def test_summary_and_plots_survive_the_disk(folder, tmp_path):
    summary = load_run(folder / "untouched" / "evaluation" / "ratings").summary
    odd = replace(summary, estimates={"accuracy": Estimate(math.nan, None, None, 3, 1)})
    write_summary(tmp_path, odd)
    found = read_summary(tmp_path)
    assert math.isnan(found.estimates["accuracy"].value) and found.estimates["accuracy"].low is None
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    write_plots(tmp_path, toy_plots())
    assert read_plots(tmp_path) == toy_plots()
    assert read_plots(folder) == Plots()


def test_curves_are_kept_and_drawn(folder, tmp_path):
    points = {at: Estimate(1.0 / at, 0.1, 1.2, 12, 4) for at in (1, 2, 11)}
    write_curves(tmp_path, [Curve("away", "turn", points), Curve("never", "turn", {})])
    assert read_curves(tmp_path) == (Curve("away", "turn", points),) and read_curves(folder) == ()
    runs = [run for run in find_runs([folder]) if run.summary.benchmark == "ratings"]
    looks = charts.looks([run.summary.stack for run in runs])
    with_one = [replace(runs[0], curves=read_curves(tmp_path)), *runs[1:]]
    ((title, plot),) = curves(with_one, looks)
    assert title == "away" and plot.count("n = 12") == 3 and ">11</text>" in plot and "away by turn" in plot
    assert curves(runs, looks) == []
    (tmp_path / "curves.json").write_text('[{"title": "away"}]')
    with pytest.raises(UserError, match="curves.json has not the form of curves.json: KeyError"):
        read_curves(tmp_path)


def test_broken_files_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="No summary.json in or below"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="summary.json does not exist"):
        read_summary(tmp_path)
    source = json.loads((folder / "untouched" / "evaluation" / "ratings" / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(source | {"format_version": 0}))
    with pytest.raises(UserError, match=f"not a summary of format version {FORMAT_VERSION}"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json is not valid JSON"):
        read_summary(tmp_path)
    (tmp_path / "plots.json").write_text('{"attention": [{"user": "Ada"}], "points": [], "points_title": ""}')
    with pytest.raises(UserError, match="plots.json has not the form of plots.json: KeyError"):
        read_plots(tmp_path)


def test_comparison_pairs_samples_both_scored(folder):
    runs = find_runs([folder])
    found = {(c.benchmark, c.metric): c for c in compare(runs, "untouched")}
    assert set(found) == {
        ("ratings", "accuracy"), ("ratings", "rmse"), ("ratings", "log-likelihood per token"),
        ("voices", "voice"), ("voices", "rouge-1"),
    }  # fmt: skip
    accuracy = found["ratings", "accuracy"]
    values = {
        run.summary.stack: {row.id: row.values["accuracy"] for row in run.rows if row.values}
        for run in runs
        if run.summary.benchmark == "ratings"
    }
    shared = values["untouched"].keys() & values["Persona-Plug"].keys()
    assert len(shared) == accuracy.difference.n < 84
    mean = sum(values["Persona-Plug"][i] - values["untouched"][i] for i in shared) / len(shared)
    assert accuracy.difference.value == pytest.approx(mean)
    assert accuracy.better is True and accuracy.difference.low > 0 and accuracy.p_holm >= accuracy.difference.p
    rmse = found["ratings", "rmse"]
    assert rmse.difference.value < 0 and rmse.better is True  # lower is better
    turned = {(c.benchmark, c.metric): c for c in compare(runs, "Persona-Plug")}
    assert turned["ratings", "rmse"].better is False
    assert turned["ratings", "accuracy"].difference.p == pytest.approx(accuracy.difference.p, abs=0.01)


def schema():
    return json.loads(files("persona.evaluation").joinpath("summary.schema.json").read_text(encoding="utf-8"))


def test_the_schema_fits_every_summary_that_is_written(folder, tree, tmp_path):
    validator = Draft202012Validator(schema())
    Draft202012Validator.check_schema(schema())
    paths = [*folder.rglob("summary.json"), *(place / "summary.json" for place in tree)]
    assert len(paths) == 4 + len(tree)
    for path in paths:
        validator.validate(json.loads(path.read_text()))
    summary = read_summary(paths[0].parent)
    odd = {"accuracy": Estimate(math.nan, None, None, 3, 1)}
    usage = {"usage": {"judge 1": {"requests": 3, "cost": 0.5}}}
    cut = {"model": {"samples": 2, "tokens": 30}}
    write_summary(tmp_path, replace(summary, estimates=odd, environment=usage, cut=cut))
    validator.validate(json.loads((tmp_path / "summary.json").read_text()))


def test_the_schema_knows_every_field_and_refuses_what_is_wrong(folder):
    known = schema()
    assert set(known["required"]) == set(known["properties"]) == {entry.name for entry in fields(Summary)}
    metric = known["properties"]["metrics"]["additionalProperties"]
    assert set(metric["required"]) == set(metric["properties"]) == {entry.name for entry in fields(Metric)}
    assert metric["properties"]["aggregate"]["enum"] == list(AGGREGATES)
    found = known["properties"]["estimates"]["additionalProperties"]
    assert set(found["required"]) == set(found["properties"]) == {entry.name for entry in fields(Estimate)}
    assert known["properties"]["format_version"]["const"] == FORMAT_VERSION
    good = json.loads(next(folder.rglob("summary.json")).read_text())
    validator = Draft202012Validator(known)
    changes = [{"n": -1}, {"primary": None}, {"extra": 1}, {"settings": {}}, {"fingerprint": "x"}, {"estimates": [1]}]
    assert validator.is_valid(good) and not any(validator.is_valid(good | change) for change in changes)


def test_a_primary_metric_that_is_none_is_refused(folder):
    run = load_run(next(folder.rglob("summary.json")).parent)
    given = {"benchmark": "b", "benchmark_version": "1", "stack": "s", "metrics": run.summary.metrics, "settings": {},
             "fingerprint": "", "environment": {}, "resamples": 10}  # fmt: skip
    assert summarize(run.rows, **given).primary == next(iter(run.summary.metrics))
    with pytest.raises(UserError, match='Benchmark "b" has "speed" as its primary metric; its metrics are '):
        summarize(run.rows, primary="speed", **given)


def test_a_benchmark_the_baseline_was_not_run_on_has_no_comparison(tree):
    some = [load_run(p) for p in tree if p.parts[-2:] in (("talks", "untouched"), ("talks", "Persona-Plug"),
                                                         ("choices", "Persona-Plug"))]  # fmt: skip
    assert {c.benchmark for c in compare(some, "untouched")} == {"talks"}
    alone = [c.p_holm for c in compare(some, "untouched")]
    assert alone == pytest.approx(holm([c.difference.p for c in compare(some, "untouched")]))


def test_runs_of_a_benchmark_have_to_belong_together_even_without_the_baseline(folder, tmp_path):
    places = []
    for n in (10, 12):
        places.append(tmp_path / str(n))
        run_benchmark(Ratings(n), ToyModel(), places[-1], stack=f"n {n}", settings={}, progress=False)
    runs = find_runs([folder / "untouched" / "evaluation" / "voices", *places])
    with pytest.raises(UserError, match="differ in data"):
        compare(runs, "untouched")


def test_settings_that_differ_have_a_path_and_every_value(tree):
    runs = [load_run(p) for p in tree if p.parts[-2] == "talks" and p.name in ("untouched", "Persona-Plug")]
    assert differing(runs) == {"stack.0.0": ["untouched", "Persona-Plug"]}
    nested = {"a": {"b": [1, {"c": "x"}], "d": {}}, "e": None}
    assert flatten(nested) == {"a.b.0": "1", "a.b.1.c": "x", "a.d": "{}", "e": "null"}


def test_runs_that_do_not_belong_together_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    run_benchmark(Ratings(20), ToyModel(), other, stack="other", settings={}, progress=False)
    with pytest.raises(UserError, match="differ in data"):
        compare(find_runs([folder, other]), "untouched")
    with pytest.raises(UserError, match='No run has the stack "none"; the stacks given are Persona-Plug, untouched'):
        compare(find_runs([folder]), "none")
