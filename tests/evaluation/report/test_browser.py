import json
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_toys import draw

from persona.evaluation.report import write_report
from persona.evaluation.report.browser import book, books, conversation, cut, row_value
from persona.evaluation.results import Plots, Row, Run, summarize, write_summary
from persona.evaluation.statistics import Metric

METRICS = {"accuracy": Metric(), "grade": Metric()}


def made(i: int, stack: str, text: str, values: dict[str, float]) -> Row:
    return Row(
        id=f"s{i:05}", cluster=f"user {i % 20}", task="", persona=f"user {i % 20}", description="someone", n_items=0,
        items=(), messages=({"role": "user", "content": text},), options=None, target="yes", raw=f"{stack}: yes",
        values=values, reason="" if values else "no number", failed=False, groups={"kind": f"kind {i % 3}"},
        verdicts=(), transcript=(), cut={},
    )  # fmt: skip


def run(
    n: int,
    stack: str = "a",
    primary: str = "accuracy",
    text: str = "hello",
    share: float = 0.1,
    benchmark: str = "toy",
) -> Run:
    """Every tenth row or so is unscored, another set in each stack."""
    rows = []
    for i in range(n):
        values = {"accuracy": float(draw(stack, i) < 0.5), "grade": float(i % 5 + 1)}
        rows.append(made(i, stack, text, values if draw("lost", stack, i) >= share else {}))
    settings = {"benchmark_version": "1", "data": "0" * 16, "prompts": {}}
    summary = summarize(
        rows, benchmark=benchmark, benchmark_version="1", stack=stack, metrics=METRICS, settings=settings,
        fingerprint="0" * 16, environment={}, primary=primary, resamples=100,
    )  # fmt: skip
    return Run(Path(stack), summary, rows, Plots())


def test_drawn_by_id_and_the_unscored_of_every_stack_beside_them():
    runs = [run(400, "a"), run(400, "b")]
    found = book(runs, 30, 10**7)
    ids = [sample["id"] for sample in found["samples"]]
    assert found["drawn"] == 30 and found["total"] == 400 and ids == sorted(set(ids))
    lost = [{row.id for row in one.rows if not row.values} for one in runs]
    assert all(len(some) > 30 for some in lost) and found["of_unscored"] == len(lost[0] | lost[1])
    shown = [len(some & set(ids)) for some in lost]
    assert min(shown) >= 20 and found["unscored"] == len((lost[0] | lost[1]) & set(ids)) < found["of_unscored"]
    assert 50 <= len(ids) <= 70
    # The draw depends on ids only: not on the order of rows, nor on what else there is.
    turned = [replace(one, rows=one.rows[::-1]) for one in runs]
    assert {sample["id"] for sample in book(turned, 30, 10**7)["samples"]} == set(ids)
    plain = [run(400, "a", share=0.0)]
    first, more = ({s["id"] for s in book(plain, n, 10**7)["samples"]} for n in (10, 20))
    assert len(first) == 10 and len(more) == 20 and first < more
    assert first != {f"s{i:05}" for i in range(10)}


def test_a_budget_makes_fewer_samples_of_both_sorts_and_says_so():
    runs = [run(400, "a", text="x" * 3000)]
    found = book(runs, 50, 60_000)
    size = sum(len(json.dumps(sample)) for sample in found["samples"])
    assert 0.8 * 60_000 < size < 61_000
    assert 0 < found["drawn"] < 20 and found["unscored"] > 3
    assert len(book(runs, 50, 10)["samples"]) == 1  # one at least
    assert [len(one["samples"]) for one in books([runs, runs], 50, 120_000)] == [len(found["samples"])] * 2


def test_outcomes_of_right_and_wrong_and_of_grades():
    def outcomes(primary):
        one = run(100, primary=primary)
        samples = book([one], 100, 10**7)["samples"]
        return [(sample["replies"][0]["outcome"], row) for sample, row in zip(samples, one.rows, strict=True)]

    for outcome, row in outcomes("accuracy"):
        assert outcome == ("unscored" if not row.values else "scored" if row.values["accuracy"] else "wrong")
    for outcome, row in outcomes("grade"):  # grades 1 to 5 evenly: the worst quarter ends at 2
        assert outcome == ("unscored" if not row.values else "wrong" if row.values["grade"] <= 2 else "scored")
    same = run(10, primary="grade", share=0.0)
    rows = [replace(row, values={"accuracy": 1.0, "grade": 3.0}) for row in same.rows]
    found = book([replace(same, rows=rows)], 10, 10**7)
    assert {sample["replies"][0]["outcome"] for sample in found["samples"]} == {"scored"}  # the worst is the best


@pytest.mark.parametrize(
    ("metric", "values", "wanted"),
    [
        (Metric(), {"m": 0.5}, 0.5),
        (Metric(False, "rmse", ("t", "p")), {"t": 1.0, "p": 4.0}, 3.0),
        (Metric(aggregate="ratio", columns=("t", "p")), {"t": -6.0, "p": 4.0}, -1.5),
        (Metric(aggregate="ratio", columns=("t", "p")), {"t": 1.0, "p": 0.0}, None),
        (Metric(aggregate="macro_f1", columns=("t", "p"), classes=3), {"t": 2.0, "p": 2.0}, 1.0),
        (Metric(aggregate="macro_f1", columns=("t", "p"), classes=3), {"t": 2.0, "p": -1.0}, 0.0),
        (Metric(aggregate="group_mean", columns=("t", "p"), classes=3), {"t": 4.0, "p": 2.0}, 4.0),
        (Metric(), {"other": 1.0}, None),
    ],
)
def test_what_a_row_adds_to_a_metric(metric, values, wanted):
    assert row_value(made(0, "a", "", values), "m", metric) == wanted


def test_long_texts_keep_beginning_and_end():
    text = "a" * 5000 + "b" * 5000
    short = cut(text, 300)
    assert short.startswith("a" * 200 + "\n[… 9,700 characters left out …]\n") and short.endswith("b" * 100)
    assert cut("abc", 3) == "abc"


def test_long_conversations_keep_the_first_message_and_the_last():
    messages = [{"role": "user", "content": f"{i} " + "x" * 998} for i in range(40)]
    found = conversation(messages)
    assert found[0][1].startswith("0 ") and found[-1][1].startswith("39 ")
    assert found[1] == ["", f"[… {40 - (len(found) - 1)} messages left out …]"]
    assert 15_000 < sum(len(text) for _, text in found) < 16_100
    assert conversation(messages[:3]) == [["user", message["content"]] for message in messages[:3]]
    assert conversation([]) == []


def test_ten_benchmarks_of_a_thousand_samples_stay_a_page_of_a_few_megabytes(tmp_path):
    text = "The river rose, and everybody spoke of it. " * 50  # 2 kB
    for number in range(10):
        for stack in ("a", "b"):
            one = run(1000, stack, text=text, benchmark=f"toy {number}")
            place = tmp_path / f"toy {number}" / stack
            place.mkdir(parents=True)
            write_summary(place, one.summary)
            (place / "samples.jsonl").write_bytes(b"".join(row.line() for row in one.rows))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl")) > 40e6
    page = write_report([tmp_path], tmp_path / "report.html")
    assert 0.5e6 < page.stat().st_size < 5e6
    text = page.read_text()
    assert "of 10,000 samples are in this page" in text and "of 1,000 samples: " in text
