"""Tasks of lm-eval through our runner: prompts, options, filters and scores of task files of our own; bad settings."""

import json
from contextlib import contextmanager

import pytest
import torch
from benchmark_toys import Stated, run, values

import persona
from persona.benchmarks.lm_eval import LmEvalConfig, build
from persona.errors import UserError
from persona.evaluation.diff import diff
from persona.evaluation.episodes import Trivial, run_benchmark
from persona.lm.edits import Edit, edited
from persona.lm.residual import Site
from persona.personalizer import LanguageModel, Personalizer
from persona.types import Message, Request

CAPITALS = [("Peru", ["Lima", "Quito"], 0), ("Norway", ["Rome", "Oslo"], 1), ("Egypt", ["Cairo", "Paris"], 0)]
CHOICE = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "Capital of {{{{country}}}}?\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
num_fewshot: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """
task: toy_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
description: "Answer in one word."
doc_to_text: "Capital of {{{{country}}}}?"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 7}}
filter_list:
  - {{name: last word, filter: [{{function: regex, regex_pattern: "(\\\\w+)$"}}, {{function: take_first}}]}}
  - {{name: whole, filter: [{{function: take_first}}]}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"country": c, "choices": choices, "gold": gold}) for c, choices, gold in CAPITALS]
    (folder / "capitals.jsonl").write_text("\n".join(lines))
    given = {"file": folder / "capitals.jsonl"}
    (folder / "toy_capitals.yaml").write_text(CHOICE.format(task="toy_capitals", **given))
    (folder / "toy_rolling.yaml").write_text(
        CHOICE.format(task="toy_rolling", **given).replace("multiple_choice", "loglikelihood_rolling")
    )
    lost = CHOICE.format(task="toy_lost", file=folder / "nowhere.jsonl")
    (folder / "toy_lost.yaml").write_text(lost)
    (folder / "toy_written.yaml").write_text(WRITTEN.format(**given))
    return str(folder)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def bench(tasks, *names, **changes):
    return build(LmEvalConfig(tasks=list(names), include_path=tasks, **changes))


KNOWN = {country: choices[gold] for country, choices, gold in CAPITALS}


def asked(request):
    return next(
        country for country in KNOWN if f"Capital of {country}?" in request.messages[-1].content.split("\n\n")[-1]
    )


def test_multiple_choice_by_hand(tasks, tmp_path):
    """Norway's is taken for Rome's: two of three right, by log p and by log p per character."""
    said = {**KNOWN, "Norway": "Rome"}
    summary, rows = run(bench(tasks, "toy_capitals"), Stated(lambda request: said[asked(request)]), tmp_path)
    assert values(summary) == pytest.approx({"mean": 2 / 3, "toy_capitals acc": 2 / 3, "toy_capitals acc_norm": 2 / 3})
    assert [row.id for row in rows] == [f"toy_capitals-{n}" for n in range(3)]
    assert [(row.options, row.target) for row in rows] == [(tuple(c), c[gold]) for _, c, gold in CAPITALS]
    assert rows[0].messages == ({"role": "user", "content": "Capital of Peru?\nAnswer:"},)
    assert rows[0].groups == {"task": "toy_capitals"} and rows[0].raw == "-4.00, -10.00"


def test_written_answers_go_through_filters_and_a_mean_is_over_tasks(tasks, tmp_path):
    seen = []

    def reply(request):
        seen.append(request)
        return f"It is {KNOWN[asked(request)]}" if asked(request) != "Egypt" else KNOWN["Egypt"]

    built = bench(tasks, "toy_written", "toy_capitals")
    summary, _ = run(built, Stated(reply), tmp_path)
    found = values(summary)
    assert found["toy_written exact_match last word"] == 1 and found["toy_written exact_match whole"] == pytest.approx(
        1 / 3
    )
    written = [request for request in seen if request.options is None]
    assert {(r.sampling.max_new_tokens, r.sampling.stop, r.sampling.temperature) for r in written} == {
        (7, (".",), 0.0)
    }
    assert [m.role for m in written[0].messages] == ["system", "user"]
    assert written[0].messages[0].content == "Answer in one word."
    # Choices are of texts that are no whole replies ("It is Lima"): the first option each time, 2 of 3.
    assert found["toy_capitals acc"] == pytest.approx(2 / 3) and found["mean"] == pytest.approx((1 + 2 / 3) / 2)


def test_few_shot_examples_and_limits(tasks, tmp_path):
    built = bench(tasks, "toy_capitals", num_fewshot=1, limit=2)
    assert len(built.samples()) == 2
    for sample in built.samples():
        (message,) = sample.messages
        shown, question = message.content.split("\n\n")
        assert shown.split("Answer: ")[1] in KNOWN.values() and question.endswith("Answer:")
    again = bench(tasks, "toy_capitals", num_fewshot=1, limit=2)
    assert [s.messages for s in again.samples()] == [s.messages for s in built.samples()]


def test_trivial_answers(tasks, tmp_path):
    built = bench(tasks, "toy_capitals", "toy_written")
    constant = values(run(built, Trivial("constant"), tmp_path / "constant")[0])
    assert constant["toy_capitals acc"] == pytest.approx(2 / 3)  # the first place holds the truth most often
    assert run(built, Trivial("random"), tmp_path / "random")[0].n_unscored == 0


def test_a_real_lm_is_scored_by_its_log_likelihoods(tasks, tmp_path, llama):
    model = persona.load(llama)
    _, rows = run(bench(tasks, "toy_capitals"), model, tmp_path)
    for (country, choices, gold), row in zip(CAPITALS, rows, strict=True):
        messages = (Message("user", f"Capital of {country}?\nAnswer:"),)
        (logps,) = model.choose([Request(messages, options=tuple(choices))])
        assert row.values["toy_capitals acc"] == float(logps.index(max(logps)) == gold)
        normed = [logp / len(choice) for logp, choice in zip(logps, choices, strict=True)]
        assert row.values["toy_capitals acc_norm"] == float(normed.index(max(normed)) == gold)


class Capped(Personalizer):
    """A cap through the third door, so tight that every option's log p moves."""

    method = "capped"

    def __init__(self, base):
        self.base = base
        self.cap = Edit(Site(1), "cap", torch.ones(base.hidden_size), floor=50.0)

    @contextmanager
    def modules(self, requests):
        with edited(self.base.model, [self.cap]):
            yield


def test_what_a_capped_stack_costs_is_a_paired_difference_in_the_same_run(tasks, tmp_path, llama):
    built = bench(tasks, "toy_capitals", "toy_written")
    for name, stack in (("untouched", []), ("capped", [Capped(llama)])):
        summary = run_benchmark(
            built, LanguageModel(llama, stack), tmp_path / name, stack=name, settings={}, progress=False
        )
        assert summary.n == 6 and summary.n_unscored == 0
    (pair,) = diff(tmp_path / "untouched", tmp_path / "capped").pairs
    assert pair.shared == 6 and {line.comparison.metric for line in pair.lines} >= {"mean", "toy_capitals acc"}
    raw = [[row.raw for row in one.rows] for one in (pair.a, pair.b)]
    assert all(a != b for a, b in zip(*raw, strict=True)), "the cap reaches log p of options and written replies"
    for line in pair.lines:
        assert line.comparison.difference.value == pytest.approx(line.b.value - line.a.value)


def test_bad_settings_are_one_sentence(tasks):
    for names, sentence in (
        ([], "benchmark.tasks is empty: name tasks of lm-eval"),
        (["toy_rolling"], "toy_rolling of lm-eval is of kind loglikelihood_rolling; supported are multiple_choice"),
        (["toy_lost"], "lm-eval could not load toy_lost: "),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            bench(tasks, *names)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_its_own_tasks_are_known(tasks):
    with pytest.raises(UserError, match="lm-eval has no task 'toy_capitols'; did you mean toy_capitals?"):
        bench(tasks, "toy_capitols", "arc_challenge")
