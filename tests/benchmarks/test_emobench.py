"""EmoBench: replies by both rules, shuffled options, both scores by hand, files, and whole runs in both modes."""

import json

import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks.emobench import EmoBenchConfig, build, lettered, official_reply, parse_reply, shuffled
from persona.errors import UserError
from persona.evaluation.episodes import Trivial
from persona.evaluation.judges.parsing import Unreadable

ONE, TWO = {"answer": 4}, {"answer_q1": 6, "answer_q2": 4}


# ---- replies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "questions", "letters"),
    [
        ('{"answer": "C"}', ONE, "C"),
        ('```json\n{"answer": "c) the third"}\n```', ONE, "C"),
        ('<think>{"answer": "A"}</think>So: {"answer": "(D)"}', ONE, "D"),
        ("The answer is B.", ONE, "B"),
        ('{"answer_q1": "F", "answer_q2": "A",}', TWO, "FA"),
    ],
)
def test_replies_that_can_be_read(reply, questions, letters):
    assert "".join(parse_reply(reply, questions).values()) == letters


@pytest.mark.parametrize(
    ("reply", "questions", "reason"),
    [
        ('{"answer": "E"}', ONE, "no choice"),
        ('{"answer": 2}', ONE, "no choice"),
        ('{"reply": "A"}', ONE, "the JSON has no 'answer'"),
        ("I cannot tell.", ONE, "no choice"),
        ('{"answer_q1": "A"}', TWO, "the JSON has no 'answer_q2'"),
        ('{"answer_q1": "A", "answer_q2": "F"}', TWO, "no choice"),
        ("A and B", TWO, "no JSON"),
    ],
)
def test_replies_that_cannot_be_read_say_why(reply, questions, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_reply(reply, questions)


def test_the_published_rule_reads_clean_json_only():
    assert official_reply('{"answer": "C"}', ONE) == {"answer": "C"}
    fenced = 'Well.\n```json\n{"answer": "C"}\n```\n```json\n{"answer": "D"}\n```'
    assert official_reply(fenced, ONE) == {"answer": "C"}
    for reply in ('{"answer": "C",}', 'Sure: {"answer": "C"}', '["C"]', "C", '```json\n{"answer": "C"}', '{"a": "C"}'):
        assert official_reply(reply, ONE) == {"answer": ""}
    assert official_reply('{"answer": "c) the third"}', ONE) == {"answer": "c) the third"}, "read, and never right"
    assert official_reply('{"answer_q1": "A"}', TWO) == {"answer_q1": "A", "answer_q2": ""}


# ---- options -------------------------------------------------------------------------------------------------------


def test_an_order_depends_on_seed_and_name_alone_and_every_place_comes_up():
    options = ("a", "b", "c", "d")
    assert shuffled(options, 0, "x") == shuffled(options, 0, "x") != shuffled(options, 1, "x")
    first = [shuffled(options, 0, i).index("a") for i in range(4000)]
    assert all(first.count(place) == pytest.approx(1000, abs=120) for place in range(4))
    assert lettered(("yes", "no")) == "A) yes\nB) no"


def test_options_move_and_the_truth_moves_with_them():
    ours, theirs = build(EmoBenchConfig()), build(EmoBenchConfig(compat="reference"))
    assert [s.target for s in theirs.samples()] == [
        '{"answer": "A"}', '{"answer": "B"}', '{"answer": "C"}',
        '{"answer_q1": "A", "answer_q2": "B"}', '{"answer_q1": "C", "answer_q2": "A"}',
        '{"answer_q1": "B", "answer_q2": "D"}',
    ]  # fmt: skip
    moved = 0
    for mine, published in zip(ours.samples(), theirs.samples(), strict=True):
        moved += mine.target != published.target
        said = mine.messages[-1].content
        truth = ours._items[mine.id].right.values()
        for letter, right in zip(json.loads(mine.target).values(), truth, strict=True):
            assert f"{letter}) {right}" in said
    assert moved >= 3
    other = build(EmoBenchConfig(seed=1)).samples()
    assert [s.target for s in other] != [s.target for s in ours.samples()]


# ---- files ---------------------------------------------------------------------------------------------------------

EA = {
    "qid": "1", "language": "en", "category": "Social-Self", "question type": "Action", "scenario": "Rain.",
    "subject": "Al", "choices": ["go", "stay"], "label": "go",
}  # fmt: skip
EU = {
    "qid": "1", "language": "en", "coarse_category": "emotional_cues", "finegrained_category": "persona",
    "scenario": "Rain.", "subject": "Al", "emotion_choices": ["glad", "sad"], "emotion_label": "sad",
    "cause_choices": ["rain", "sun"], "cause_label": "rain",
}  # fmt: skip


def folder(path, ea=(EA,), eu=(EU,)):
    for name, rows in (("EA", ea), ("EU", eu)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("ea", "eu", "message"),
    [
        ([EA, EA | {"label": "run"}], [EU], "EA.jsonl, line 2 has label 'run', which should be one of its choices"),
        ([EA | {"choices": ["go", "go"]}], [EU], "line 1 has the choices go, go; there should be several, all diff"),
        ([EA | {"choices": "go"}], [EU], "line 1 has 'go' as choices, which should be a list of texts"),
        ([{k: v for k, v in EA.items() if k != "subject"}], [EU], "line 1 has no field 'subject'"),
        ([EA], [EU | {"cause_label": "wind"}], "EU.jsonl, line 1 has cause_label 'wind', .* its cause_choices"),
        ([EA | {"language": "zh"}], [EU], "EA.jsonl holds nothing in benchmark.language=en; it holds zh"),
        ([EA], [], "EU.jsonl holds nothing in benchmark.language=en; it holds no rows"),
        ([EA, EA], [EU], "two rows EA-en-1"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, ea, eu, message):
    with pytest.raises(UserError, match=message):
        build(EmoBenchConfig(path=folder(tmp_path, ea, eu)))


def test_missing_files_and_unknown_settings_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="has no EA.jsonl; it holds nothing"):
        build(EmoBenchConfig(path=str(tmp_path)))
    for bad in ({"language": "fr"}, {"mode": "vibes"}):
        with pytest.raises(UserError, match=f"benchmark.{next(iter(bad))}="):
            build(EmoBenchConfig(**bad))


def test_the_chinese_half_asks_in_chinese_and_a_limit_takes_of_both_tasks():
    chinese = build(EmoBenchConfig(language="zh")).samples()
    assert [s.id for s in chinese] == [f"{task}-zh-{i}" for task in ("EA", "EU") for i in (1, 2, 3)]
    assert "哪一种回应最有效" in chinese[0].messages[1].content and "JSON" in chinese[0].messages[0].content
    assert [s.task for s in build(EmoBenchConfig(limit=3)).samples()].count("EA") in (1, 2)


# ---- runs ----------------------------------------------------------------------------------------------------------


def answers(benchmark, replies):
    """A model that gives the n-th sample the n-th of `replies`."""
    said = {s.messages: reply for s, reply in zip(benchmark.samples(), replies, strict=True)}
    return Stated(lambda request: said[request.messages])


def test_scores_by_hand_and_what_cannot_be_read_is_counted_apart(tmp_path):
    benchmark = build(EmoBenchConfig())
    right = [s.target for s in benchmark.samples()]
    # EA: right, wrong, unreadable. EU: both right, only the emotion right, only the cause right.
    wrong = {key: "B" if json.loads(right[4])[key] == "A" else "A" for key in ("answer_q1", "answer_q2")}
    emotion = json.dumps({**json.loads(right[4]), "answer_q2": wrong["answer_q2"]})
    other = "A" if json.loads(right[5])["answer_q1"] != "A" else "B"
    cause = json.dumps({**json.loads(right[5]), "answer_q1": other})
    missed = json.dumps({"answer": "B" if json.loads(right[1])["answer"] == "A" else "A"})
    model = answers(benchmark, [right[0], missed, "Who knows?", right[3], emotion, cause])
    summary, rows = run(benchmark, model, tmp_path / "ours")
    found = values(summary)
    assert found == pytest.approx(
        {
            "accuracy": (1 / 2 + 1 / 3) / 2, "EA": 1 / 2, "EU": 1 / 3, "EU_emotion": 2 / 3, "EU_cause": 2 / 3,
            "accuracy_all": (1 / 3 + 1 / 3) / 2, "invalid": 1 / 6,
        }
    )  # fmt: skip
    assert summary.n_unscored == 0 and summary.estimates["EA"].n == 2 and summary.estimates["EA"].low is not None
    assert rows[2].raw == "Who knows?" and rows[2].groups == {
        "task": "EA", "category": "EA Social-Self", "detail": "EA Action",
    }  # fmt: skip


def test_compat_counts_unreadable_replies_as_wrong_and_reads_by_the_published_rule(tmp_path):
    benchmark = build(EmoBenchConfig(compat="reference"))
    right = [s.target for s in benchmark.samples()]
    replies = [right[0], f"Sure: {right[1]}", "C", right[3], f"```json\n{right[4]}\n```", right[5].replace("B", "b")]
    found = values(run(benchmark, answers(benchmark, replies), tmp_path)[0])
    assert found == pytest.approx(
        {"accuracy": 1 / 2, "EA": 1 / 3, "EU": 2 / 3, "EU_emotion": 2 / 3, "EU_cause": 1, "invalid": 2 / 6}
    )
    ours = build(EmoBenchConfig())
    replies = [s.target for s in ours.samples()]
    replies[1:3] = [f"Sure: {replies[1]}", json.loads(replies[2])["answer"]]
    assert values(run(ours, answers(ours, replies), tmp_path / "ours")[0])["accuracy"] == 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_reasoning_comes_first_and_is_not_read(tmp_path, language):
    benchmark = build(EmoBenchConfig(mode="reasoning", language=language))
    for sample in benchmark.samples():
        form, keys = sample.messages[0].content, ["reasoning", *json.loads(sample.target)]
        places = [form.index(f'"{key}"') for key in keys]
        assert places == sorted(places)
    plain = build(EmoBenchConfig(language=language))
    assert [s.messages[1] for s in benchmark.samples()] == [s.messages[1] for s in plain.samples()]
    replies = [json.dumps({"reasoning": "A? No: B or {C}.", **json.loads(s.target)}) for s in benchmark.samples()]
    replies[0] = '{"reasoning": "It could be B'  # cut
    found = values(run(benchmark, answers(benchmark, replies), tmp_path)[0])
    assert (found["accuracy"], found["invalid"]) == (1, pytest.approx(1 / 6))
    assert {prompt.name for prompt in benchmark.prompts}.isdisjoint(prompt.name for prompt in plain.prompts)


def test_likelihood_takes_the_likeliest_of_all_replies_the_form_allows(tmp_path):
    benchmark = build(EmoBenchConfig(mode="likelihood"))
    sizes = [len(s.options) for s in benchmark.samples()]
    assert sizes == [4, 4, 4, 6 * 4, 4 * 6, 4 * 4]
    replies = [s.target for s in benchmark.samples()]
    replies[0] = next(option for option in benchmark.samples()[0].options if option != replies[0])
    summary, rows = run(benchmark, answers(benchmark, replies), tmp_path)
    assert values(summary) == pytest.approx(
        {"accuracy": (2 / 3 + 1) / 2, "EA": 2 / 3, "EU": 1, "EU_emotion": 1, "EU_cause": 1}
    )
    assert [row.raw for row in rows] == replies


def test_a_likelihood_that_is_no_number_is_unscored(tmp_path):
    class Broken(Stated):
        def choose(self, requests):
            return [[float("nan")] * len(request.options) for request in requests]

    summary, _ = run(build(EmoBenchConfig(mode="likelihood")), Broken(lambda request: ""), tmp_path)
    assert summary.n_unscored == 6


@pytest.mark.parametrize("mode", ["text", "likelihood"])
def test_the_constant_answer_is_the_best_one_of_each_task(tmp_path, mode):
    """Published order: two of three EA items with B right; EU has one pair twice."""
    ea = [EA, EA | {"qid": "2", "label": "stay"}, EA | {"qid": "3", "label": "stay"}]
    eu = [EU, EU | {"qid": "2"}, EU | {"qid": "3", "emotion_label": "glad"}, EU | {"qid": "4", "cause_label": "sun"}]
    benchmark = build(EmoBenchConfig(path=folder(tmp_path, ea, eu), compat="reference", mode=mode))
    found = values(run(benchmark, Trivial("constant"), tmp_path / "constant")[0])
    assert (found["EA"], found["EU"]) == pytest.approx((2 / 3, 2 / 4))
    assert found["EU_emotion"] == pytest.approx(3 / 4) and found.get("invalid", 0) == 0
    assert 0 <= values(run(benchmark, Trivial("random"), tmp_path / "random")[0])["accuracy"] <= 1


def test_a_real_lm_in_both_modes(llama, tmp_path):
    import persona

    model = persona.load(llama)
    summary, _ = run(build(EmoBenchConfig(max_new_tokens=4)), model, tmp_path / "text")
    assert values(summary) == {"accuracy_all": 0, "invalid": 1}, "a random LM writes no JSON"
    summary, _ = run(build(EmoBenchConfig(mode="likelihood", limit=4)), model, tmp_path / "likelihood")
    assert summary.n_unscored == 0 and "EU_cause" in values(summary)
