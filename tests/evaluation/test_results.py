import json
import math
from dataclasses import replace

import pytest
from evaluation_toys import Ratings, ToyModel, toy_plots, toy_results

from persona.errors import UserError
from persona.evaluation.comparison import compare
from persona.evaluation.episodes import run_benchmark
from persona.evaluation.results import (
    FORMAT_VERSION,
    Estimate,
    Plots,
    find_runs,
    load_run,
    read_plots,
    read_summary,
    write_plots,
    write_summary,
)

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


def test_runs_that_do_not_belong_together_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    run_benchmark(Ratings(20), ToyModel(), other, stack="other", settings={}, progress=False)
    with pytest.raises(UserError, match="differ in data"):
        compare(find_runs([folder, other]), "untouched")
    with pytest.raises(UserError, match='No run has the stack "none"; the stacks given are Persona-Plug, untouched'):
        compare(find_runs([folder]), "none")
