"""ToMBench: replies by both rules, votes, stray labels, missing options, abilities, and whole runs in both modes."""

import json

import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks.tombench import ToMBenchConfig, build, official_reply, parse_reply, read_task, vote
from persona.errors import UserError
from persona.evaluation.episodes import Trivial

# ---- replies and votes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "letter", "published"),
    [
        ("[[B]]", "B", "B"),
        ("The answer is [B].", "B", "B"),
        ("**D**", "D", "D"),
        ("I choose [[C]], as A is wrong.", "C", "C"),
        ("[[A]] or [[B]]", None, "A"),  # two answers
        ("I do not know.", None, "A"),  # none: a capital of the text, else A
        ("Ask her Dad", None, "D"),
        ("", None, "A"),
        ("nobody can tell", None, "A"),
    ],
)
def test_replies_by_both_rules(reply, letter, published):
    assert parse_reply(reply, "ABCD") == letter and official_reply(reply) == published


def test_of_two_options_c_is_no_answer():
    assert parse_reply("[[C]]", "AB") is None and official_reply("[[C]]") == "C"


def test_votes_by_hand():
    assert vote(["A", "B", "A", None, "C"], "A") == 1 and vote(["A", "B", "B"], "A") == 0
    assert vote(["A", "B", "B", "A", None], "A") == 0.5, "a tie is split evenly"
    assert vote(["A", "B", "C"], "C") == pytest.approx(1 / 3)
    assert vote([None, None], "A") is None


# ---- files ---------------------------------------------------------------------------------------------------------


def row(**changes):
    given = {
        "能力\nABILITY": "Belief: Beliefs", "STORY": "Rain.", "QUESTION": "Who?", "OPTION-A": "Al", "OPTION-B": "Bo",
        "OPTION-C": "Cy", "OPTION-D": "Di", "故事": "雨。", "问题": "谁？", "选项A": "A.甲", "选项B": "B. 乙",
        "选项C": None, "选项D": float("nan"), "答案\nANSWER": "B",
    }  # fmt: skip
    return given | changes


def write(folder, *rows, name="Rain Task"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_missing_options_may_be_null_nan_blank_or_absent(tmp_path):
    absent = {key: value for key, value in row().items() if key != "OPTION-D"}
    rows = [row(), row(**{"OPTION-C": float("nan"), "OPTION-D": " "}), absent | {"OPTION-C": None}]
    items = read_task(write(tmp_path, *rows), "en")
    assert [list(item.options) for item in items] == [list("ABCD"), ["A", "B"], ["A", "B"]]
    assert read_task(tmp_path / "Rain Task.jsonl", "zh")[0].options == {"A": "甲", "B": "乙"}


def test_marks_of_the_old_order_go_and_a_mark_of_something_else_stays(tmp_path):
    texts = {"OPTION-A": "A：Al", "OPTION-B": "B. Dr. B. Lane", "OPTION-C": "C.", "OPTION-D": "A. is right"}
    (ours,) = read_task(write(tmp_path, row(**texts)), "en")
    assert ours.options == {"A": "Al", "B": "Dr. B. Lane", "D": "A. is right"}
    (theirs,) = read_task(tmp_path / "Rain Task.jsonl", "en", "reference")
    assert theirs.options == {"A": "A：Al", "B": "Dr. Lane", "C": "C.", "D": "A. is right"}


def test_stray_labels_are_read_and_never_right_under_compat(tmp_path):
    path = write(tmp_path, row(**{"答案\nANSWER": "A. "}))
    assert read_task(path, "en")[0].right == "A" and read_task(path, "en", "reference")[0].right == "A. "
    for compat, expected in ((None, 1), ("reference", 0)):
        benchmark = build(ToMBenchConfig(path=str(tmp_path), compat=compat))
        found = values(run(benchmark, knowing("Al"), tmp_path / str(compat))[0])
        assert found["accuracy"] == expected


def test_abilities_that_differ_in_case_or_spaces_are_one(tmp_path):
    names = ["Non-Literal Communication: Irony", "Non-literal  communication: Irony ", "Belief: Second-order Beliefs"]
    path = write(tmp_path, *(row(**{"能力\nABILITY": name}) for name in names))
    assert [(item.ability, item.detail) for item in read_task(path, "en")] == [
        ("Non-literal communication", "Non-literal communication: Irony"),
        ("Non-literal communication", "Non-literal communication: Irony"),
        ("Belief", "Belief: Second-order Beliefs"),
    ]
    assert [item.detail for item in read_task(path, "en", "reference")] == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"答案\nANSWER": "E"}, "line 2 has the answer 'E' and the options A, B, C, D"),
        ({"答案\nANSWER": "C", "OPTION-C": None}, "line 2 has the answer 'C' and the options A, B, D"),
        ({f"OPTION-{letter}": None for letter in "ACD"}, "the options B; it should be one of at least two"),
        ({"STORY": None}, "line 2 has None as field 'STORY'"),
        ({"OPTION-B": ["Bo"]}, r"line 2 has \['Bo'\] as field 'OPTION-B'"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_task(write(tmp_path, row(), row(**changes)), "en")


def test_missing_files_and_unknown_settings_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no .jsonl files; it should be a folder of task files"):
        build(ToMBenchConfig(path=str(tmp_path)))
    write(tmp_path)
    with pytest.raises(UserError, match="Rain Task.jsonl holds no rows"):
        build(ToMBenchConfig(path=str(tmp_path)))
    (tmp_path / "Rain Task.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="broken JSON in line 1"):
        build(ToMBenchConfig(path=str(tmp_path)))
    for bad in ({"language": "fr"}, {"mode": "vibes"}):
        with pytest.raises(UserError, match=f"benchmark.{next(iter(bad))}="):
            build(ToMBenchConfig(**bad))


# ---- runs ----------------------------------------------------------------------------------------------------------


def knowing(*texts):
    """A model that gives the letter of the one of `texts` that is among the options."""

    def reply(request):
        lines = request.messages[-1].content.split("Options:\n")[1].splitlines()
        found = [line[0] for line in lines if line[3:] in texts]
        return f"[[{found[0]}]]" if found else "Who knows?"

    return Stated(reply)


def truthful(request):
    """The truths of our sample. Only the story tells the two faux pas apart."""
    faux = "Nobody did" if "Ivan" in request.messages[-1].content else "Somebody did"
    return knowing("Garage", faux, "Close the window", "He does not want Anja to be sad").reply(request)


def test_our_sample_is_three_tasks_in_both_languages():
    english, chinese = (build(ToMBenchConfig(language=language)).samples() for language in ("en", "zh"))
    assert [s.task for s in english] == [s.task for s in chinese] and len({s.task for s in english}) == 3
    assert [len(s.options) for s in english] == [len(s.options) for s in chinese] == [4, 4, 2, 2, 4, 4]
    assert "风筝" in chinese[0].messages[1].content and "[[B]]" in chinese[0].messages[0].content


def test_each_try_shows_another_order_and_the_letter_means_what_it_shows(tmp_path):
    asked = []
    benchmark = build(ToMBenchConfig())

    def reply(request):
        asked.append(request)
        return truthful(request)

    summary, rows = run(benchmark, Stated(reply), tmp_path)
    assert values(summary) == pytest.approx(
        {"accuracy": 1, "accuracy_by_task": 1, "agreement": 1, "accuracy_all": 1, "invalid": 0}
    )
    assert len(asked) == 6 * 5 and len({request.messages for request in asked}) > 6 * 2
    assert rows[0].raw.count("[[") == 5 and rows[2].groups["ability"] == "Non-literal communication"
    assert [row.cluster for row in rows[:3]] == [rows[0].id, rows[0].id, rows[2].id], "two items on one story"
    assert {s.target for s in benchmark.samples()} <= {f"[[{letter}]]" for letter in "ABCD"}


def test_unreadable_tries_do_not_vote_and_items_without_any_are_counted_apart(tmp_path):
    benchmark = build(ToMBenchConfig())
    summary, _ = run(benchmark, knowing("Garage", "Somebody did", "Close the window"), tmp_path)
    # Right: both kite stories are about a garage, one faux pas of two, one hint. Wrong: the faux pas that was none.
    assert values(summary) == pytest.approx(
        {
            "accuracy": 4 / 5, "accuracy_by_task": (1 + 1 / 2 + 1) / 3, "agreement": 1, "accuracy_all": 4 / 6,
            "invalid": 1 / 6,
        }
    )  # fmt: skip
    assert summary.estimates["accuracy"].n == 5 and summary.n_unscored == 0


def test_compat_reads_every_reply_as_some_letter(tmp_path):
    """The reply that knows nothing is "A": on our sample a vote of what A happened to show."""
    benchmark = build(ToMBenchConfig(compat="reference"))
    summary, rows = run(benchmark, Stated(lambda request: "who knows?"), tmp_path)
    for row, item in zip(rows, benchmark._items.values(), strict=True):
        shown = [order[0] for order in benchmark._orders(item)]
        assert row.values["accuracy"] == (max(shown, key=shown.count) == item.right)
    assert set(values(summary)) == {"accuracy", "accuracy_by_task", "agreement"}


def test_likelihood_takes_the_likeliest_letter_of_each_order(tmp_path):
    benchmark = build(ToMBenchConfig(mode="likelihood", tries=3))
    summary, rows = run(benchmark, Stated(truthful), tmp_path)
    assert values(summary) == pytest.approx({"accuracy": 1, "accuracy_by_task": 1, "agreement": 1})
    assert all(row.raw.count("[[") == 3 for row in rows)


@pytest.mark.parametrize("mode", ["text", "likelihood"])
def test_trivial_answers_are_one_letter_whatever_is_shown(tmp_path, mode):
    benchmark = build(ToMBenchConfig(mode=mode))
    summary, rows = run(benchmark, Trivial("constant"), tmp_path / "constant")
    assert len({row.raw.splitlines()[0] for row in rows}) == 1 and values(summary).get("invalid", 0) == 0
    other = "[[B]]" if "[[A]]" in rows[0].raw else "[[A]]"
    there = values(run(benchmark, Stated(lambda request: other), tmp_path / "other")[0])
    assert values(summary)["accuracy"] >= there["accuracy"]
    assert values(run(benchmark, Trivial("random"), tmp_path / "random")[0]).get("invalid", 0) == 0


def test_options_with_one_text_are_one_answer(tmp_path):
    write(tmp_path, row(**{"OPTION-A": "Cy", "答案\nANSWER": "C"}))
    benchmark = build(ToMBenchConfig(path=str(tmp_path)))
    assert values(run(benchmark, knowing("Cy"), tmp_path / "out")[0])["accuracy"] == 1


def test_a_limit_takes_of_all_tasks():
    assert len({s.task for s in build(ToMBenchConfig(limit=3)).samples()}) == 3


def test_a_real_lm_in_both_modes(llama, tmp_path):
    import persona

    model = persona.load(llama)
    summary, _ = run(build(ToMBenchConfig(max_new_tokens=2, tries=2)), model, tmp_path / "text")
    assert values(summary)["invalid"] > 0.5, "a random LM rarely writes a letter"
    summary, rows = run(build(ToMBenchConfig(mode="likelihood", language="zh")), model, tmp_path / "likelihood")
    assert summary.n_unscored == 0 and len(rows) == 6 and rows[0].raw.count("[[") == 5
