"""PersonaMem: answers out of replies (published and corrected), files of any size, both modes, bad input."""

import csv
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_toys import Stated, run, values

import persona
from persona.benchmarks import personamem
from persona.benchmarks.personamem import (
    ALIASES,
    COLUMNS,
    QUESTION,
    TYPES,
    Contexts,
    PersonaMem,
    PersonaMemConfig,
    Question,
    Said,
    distance_bucket,
    grade,
    likeliest,
    merged,
    parse_options,
    read_answer,
    read_questions,
    score,
)  # fmt: skip
from persona.data.base import task
from persona.errors import UserError
from persona.evaluation.episodes import Trivial, Unscored, data_fingerprint
from persona.evaluation.judges.judging import Unreadable
from persona.evaluation.roles import Parrot
from persona.types import Message, Request

SAMPLE = Path(personamem.__file__).parent / "samples" / "personamem"


def build(**changes) -> PersonaMem:
    return personamem.build(PersonaMemConfig(**changes))


# ---- answers out of replies ----------------------------------------------------------------------------------------

# A reply, whether the published reading calls it right, and whether ours does. The right answer is (c).
GOLDEN = [
    ("<final_answer> (c)", True, True),
    ("<final_answer>(c)</final_answer>", True, True),
    ("The answer is c", True, True),
    ("Option a is wrong, so (c)", True, True),
    ("I pick (a) or (c). <final_answer> c", True, True),
    ("(c) because it fits a user", True, True),
    ("<final_answer> (a) <final_answer> (c)", True, True),
    ("<final_answer></final_answer> (c)", True, True),  # nothing between the tags: the whole reply is read
    ("**C**", True, True),
    ("<final_answer> d </final_answer> trailing (c)", True, False),  # what stands behind the closing tag is no answer
    ("Surely (c). <final_answer> d", True, False),  # the second reading overrules the final answer
    ("A good pick is c", False, True),  # the article is no letter
    ("I'd pick c", False, True),  # nor is the end of "I'd"
    ("<think>not (a), rather (b)?</think> (c)", False, True),
    ("<think>perhaps <final_answer> d</final_answer></think> So (c)", True, True),  # an answer only thought of
    ("Not (a), so (c)", False, True),
    ("Surely not (c)", True, False),
    ("I first took (c). <final_answer> (d)", False, False),
    ("b) c)", False, False),
    ("", False, False),
    ("(a) (b) (c) (d)", False, False),
    ("(d)", False, False),
]


@pytest.mark.parametrize("reply, published, ours", GOLDEN)
def test_replies_by_hand(reply, published, ours):
    assert grade(reply, "c", "reference")[0] is published
    assert grade(reply, "c")[0] is ours


@pytest.mark.parametrize("reply", ["", "b) c)", "(a) (b) (c) (d)", "I cannot say.", "<think>(c)", "a, b"])
def test_no_letter_or_several_are_unreadable_and_wrong(reply):
    with pytest.raises(Unreadable):
        read_answer(reply)
    assert grade(reply, "c") == (False, True)
    if reply != "<think>(c)":  # the published code knows no reasoning
        assert grade(reply, "c", "reference") == (False, True)
    assert grade("(d)", "c") == grade("(d)", "c", "reference") == (False, False)


def test_likelihoods_are_compared_per_token_and_equal_ones_by_place():
    short_and_sweet = [(-6.0, 2), (-10.0, 10), (-8.0, 4), (-9.0, 3)]
    assert likeliest(short_and_sweet) == 1
    assert likeliest(short_and_sweet, "reference") == 0, "the sum favours the short option"
    assert likeliest([(-4.0, 2), (-3.0, 3), (-5.0, 5), (-2.0, 2)]) == 1
    with pytest.raises(Unscored, match="not a number"):
        likeliest([(math.nan, 2), (-3.0, 3)])


# ---- questions -----------------------------------------------------------------------------------------------------


def test_legacy_labels_are_mapped_and_every_type_occurs_in_the_sample():
    assert set(ALIASES.values()) == set(TYPES) and not set(ALIASES) & set(TYPES)
    questions = read_questions(SAMPLE / "questions_32k.csv")
    assert len(questions) == 14 and Counter(q.type for q in questions) == dict.fromkeys(TYPES, 2) | {
        "recall_user_shared_facts": 3, "suggest_new_ideas": 1
    }  # fmt: skip
    old = next(q for q in questions if q.label == "recalling_facts_mentioned_by_the_user")
    assert old.type == "recall_user_shared_facts"
    groups = build().groups(next(s for s in build().samples() if s.id == old.id))
    assert groups == {
        "type": "recall_user_shared_facts", "label": old.label, "topic": "bookRecommendation", "distance": "0–2"
    }  # fmt: skip


def test_the_sample_has_the_official_columns():
    official = (
        "persona_id,question_id,question_type,topic,context_length_in_tokens,context_length_in_letters,"
        "distance_to_ref_in_blocks,distance_to_ref_in_tokens,num_irrelevant_tokens,"
        "distance_to_ref_proportion_in_context,user_question_or_message,correct_answer,all_options,"
        "shared_context_id,end_index_in_shared_context"
    )
    assert (SAMPLE / "questions_32k.csv").read_text(encoding="utf-8").split("\n")[0] == official
    assert set(COLUMNS) <= set(official.split(","))


def test_distance_buckets_are_the_papers():
    buckets = ["0–2"] * 3 + ["3–6"] * 4 + ["7–10"] * 4 + ["11–14"] * 4 + ["15–18"] * 4 + ["19–22"] * 2
    assert [distance_bucket(blocks) for blocks in range(21)] == buckets


def test_options_are_a_list_as_text_or_else_are_split_at_their_letters():
    texts = ("one, it's", 'two "so"', "three (a) in passing", "four\nlines")
    lettered = [f"({letter}) {text}" for letter, text in zip("abcd", texts, strict=True)]
    assert parse_options(repr(lettered), "here") == texts
    assert parse_options(repr(lettered[::-1]), "here") == texts, "by letter, not by place"
    assert parse_options("(a) one (b) two (c) three (d) four", "here") == ("one", "two", "three", "four")
    for wrong in ("[]", "['(a) x', '(b) y', '(c) z']", "['x', 'y', 'z', 'w']", "['(a) x', '(a) y', '(c) z', '(d) w']",
                  "['(a) x', '(b) ', '(c) z', '(d) w']", "nothing", "7", "{}"):  # fmt: skip
        with pytest.raises(UserError, match="^row 3 has as all_options .* list of four texts"):
            parse_options(wrong, "row 3")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write(path: Path, rows: list[dict[str, str]], columns: list[str] | None = None) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns or list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("change, sentence", [
    ({"correct_answer": "(e)"}, r"row 2 has the correct answer '\(e\)', which should be one of"),
    ({"all_options": "?"}, "row 2 has as all_options '\\?'"),
    ({"end_index_in_shared_context": "end"}, "row 2 has 'end' as end_index_in_shared_context, which should be"),
    ({"distance_to_ref_in_blocks": "far"}, "row 2 has 'far' as distance_to_ref_in_blocks"),
    ({"user_question_or_message": " "}, "row 2 has an empty user_question_or_message"),
])  # fmt: skip
def test_bad_cells_are_named(tmp_path, change, sentence):
    rows = rows_of(SAMPLE / "questions_32k.csv")
    path = write(tmp_path / "questions_32k.csv", [rows[0], rows[1] | change])
    with pytest.raises(UserError, match=sentence):
        read_questions(path)


def test_bad_files_are_named(tmp_path, caplog):
    rows = rows_of(SAMPLE / "questions_32k.csv")
    kept = [name for name in rows[0] if name not in ("persona_id", "all_options")]
    with pytest.raises(UserError, match="has no column persona_id, all_options; its columns are question_id, quest"):
        read_questions(write(tmp_path / "columns.csv", rows, kept))
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.csv", [], list(rows[0])))
    with pytest.raises(UserError, match="same question_id: 1918c28f-"):
        read_questions(write(tmp_path / "twice.csv", [rows[0], rows[0]]))
    with pytest.raises(UserError, match="could not be read"):
        read_questions(tmp_path / "nowhere.csv")
    torn = tmp_path / "torn.csv"
    torn.write_text(",".join(rows[0]) + "\n0,1,2\n")
    with pytest.raises(UserError, match="row 1 has not as many fields"):
        read_questions(torn)
    odd = read_questions(write(tmp_path / "odd.csv", [rows[0] | {"question_type": "a_new_kind"}]))
    assert odd[0].type == "a_new_kind" and "a_new_kind" in caplog.text


def test_a_list_of_results_can_be_scored_but_not_run(tmp_path):
    kinds = [TYPES[0], "recalling_facts_mentioned_by_the_user", TYPES[3]]
    details = [
        {"question_id": f"q{i}", "question": "?", "question_type": kind, "topic": "books", "ground_truth": f"({gold})"}
        for i, (kind, gold) in enumerate(zip(kinds, "abc", strict=True))
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": [{"persona_id": 4, "details": details}]}))
    questions = read_questions(path)
    assert [(q.id, q.persona, q.gold) for q in questions] == [("q0", "4", "a"), ("q1", "4", "b"), ("q2", "4", "c")]
    found = score({"q0": "a", "q1": "I'd take (b).", "q2": "(a)"}, questions)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["type"][TYPES[0]] == {"n": 2, "accuracy": 1.0}
    with pytest.raises(UserError, match="is a file; it should be the folder"):
        build(path=str(path))
    path.write_text(json.dumps({"results": [{"persona_id": 4, "details": [{"question_id": "q"}]}]}))
    with pytest.raises(UserError, match="should hold results.*KeyError"):
        read_questions(path)
    path.write_text("{")
    with pytest.raises(UserError, match="broken JSON"):
        read_questions(path)


# ---- scores of stated answers --------------------------------------------------------------------------------------

ASKED = [
    Question("q1", "0", TYPES[0], "books", "?", "a", blocks=1),
    Question("q2", "0", "recalling_facts_mentioned_by_the_user", "books", "?", "b", blocks=4),
    Question("q3", "1", TYPES[3], "music", "?", "c", blocks=4),
    Question("q4", "1", TYPES[3], "music", "?", "d"),
]


def test_scores_by_hand():
    found = score({"q1": "(a)", "q2": "who knows", "q3": "c", "q4": "c"}, ASKED)
    assert found == {
        "n": 4, "accuracy": 0.5, "invalid": 0.25, "missing": 0.0, "macro_accuracy": 0.5,
        "type": {TYPES[0]: {"n": 2, "accuracy": 0.5}, TYPES[3]: {"n": 2, "accuracy": 0.5}},
        "label": {
            TYPES[0]: {"n": 1, "accuracy": 1.0},
            "recalling_facts_mentioned_by_the_user": {"n": 1, "accuracy": 0.0},
            TYPES[3]: {"n": 2, "accuracy": 0.5},
        },
        "topic": {"books": {"n": 2, "accuracy": 0.5}, "music": {"n": 2, "accuracy": 0.5}},
        "distance": {"0–2": {"n": 1, "accuracy": 1.0}, "3–6": {"n": 2, "accuracy": 0.5}},
    }  # fmt: skip


def test_what_failed_is_wrong_here_and_left_out_as_published():
    told = {"q1": "(a)", "q3": "(c)"}
    assert (score(told, ASKED)["accuracy"], score(told, ASKED)["missing"]) == (0.5, 0.5)
    published = score(told, ASKED, "reference")
    assert (published["accuracy"], published["n"], published["missing"]) == (1.0, 2, 0.0)


def test_the_mean_over_types_takes_an_old_label_for_a_type_of_its_own_as_published():
    told = {"q1": "(a)", "q2": "(a)", "q3": "(c)", "q4": "(d)"}
    assert score(told, ASKED)["macro_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert score(told, ASKED, "reference")["macro_accuracy"] == pytest.approx((1 + 0 + 1) / 3)


def test_predictions_for_no_question_are_refused():
    with pytest.raises(UserError, match="2 predictions belong to no question: x, y"):
        score({"q1": "a", "x": "a", "y": "b"}, ASKED)
    with pytest.raises(UserError, match="nothing to score"):
        score({}, ASKED, "reference")


# ---- contexts ------------------------------------------------------------------------------------------------------


def line(id: str, *turns: str) -> str:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return json.dumps({id: [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}, ensure_ascii=False)


def test_a_context_is_found_by_offset_whatever_stands_before_it(tmp_path):
    path = tmp_path / "contexts.jsonl"
    lines = [line(f"c{i}", f"s:I am {'ü' * i}", f"u:User: {i}", "a:yes") for i in range(9)]
    path.write_text("\n" + "\n\n".join(lines), encoding="utf-8")  # blank lines, no newline at the end
    contexts = Contexts(path, [f"c{i}" for i in range(1, 9)])
    for i in (8, 1, 5, 2, 3, 4, 7, 6, 1, 1):
        assert contexts.messages(f"c{i}")[0] == Message("system", f"I am {'ü' * i}")
        assert len(contexts._parsed) <= 4, "only the last few are kept"
    assert contexts.messages("c5") is contexts.messages("c5")
    with pytest.raises(KeyError):
        contexts.entry("c0")  # no question refers to it


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    path = tmp_path / "contexts.jsonl"
    path.write_text(line("c", "u:before"))
    contexts = Contexts(path, ["c"])
    path.write_text(line("c", "u:behind"))
    with pytest.raises(UserError, match="changed while it was in use"):
        contexts.messages("c")


@pytest.mark.parametrize("content, sentence", [
    ("{", "line 1 holds broken JSON"),
    ("[1]", r"line 1 should be \{context id"),
    ('{"c": [], "d": []}', r"line 1 should be \{context id"),
    ('{"c": [{"role": "user"}]}', r"line 1 should be \{context id"),
    ('{"c": [{"role": "robot", "content": "x"}]}', r"message 0 \(counted from 0\) has the role 'robot'"),
    ('{"c": [{"role": "user", "content": 7}]}', "a content of type int"),
    ('{"c": []}\n{"c": []}', "line 2 holds the context c once more"),
    ('{"d": []}', "lacks contexts that questions refer to: c"),
])  # fmt: skip
def test_bad_contexts_are_named(tmp_path, content, sentence):
    path = tmp_path / "contexts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        Contexts(path, ["c"])


def test_questions_and_contexts_that_do_not_belong_together_are_named(tmp_path):
    rows = rows_of(SAMPLE / "questions_32k.csv")
    (tmp_path / "shared_contexts_32k.jsonl").write_bytes((SAMPLE / "shared_contexts_32k.jsonl").read_bytes())
    for end in ("32", "0", "-3"):
        write(tmp_path / "questions_32k.csv", [rows[0] | {"end_index_in_shared_context": end}])
        with pytest.raises(UserError, match=f"ends at message {end} of its context, which has 31 messages"):
            build(path=str(tmp_path))
    with pytest.raises(UserError, match="has no questions_1M.csv; it holds questions_32k.csv, shared_contexts_32k"):
        build(path=str(tmp_path), size="1M")
    with pytest.raises(UserError, match="size=64k is unknown; it should be one of 32k, 128k, 1M"):
        build(size="64k")
    with pytest.raises(UserError, match="mode=generate is unknown"):
        build(mode="generate")
    with pytest.raises(UserError, match="no file or folder"):
        build(path="./nowhere")


def test_what_the_user_said_before_the_question(tmp_path):
    path = tmp_path / "contexts.jsonl"
    path.write_text(line("c", "s:one", "u:User: first", "a:Assistant: no", "u:Patient: second", "u:User: late"))
    contexts = Contexts(path, ["c"])
    said = Said(contexts, "c", 4)
    assert len(said) == 2 and not contexts._parsed, "its length is known without reading"
    assert [item.text for item in said] == ["first", "second"] == [said[0].text, said[-1].text]
    assert [item.text for item in said[1:]] == ["second"] and said[1].id == "3"
    with pytest.raises(IndexError):
        said[2]


# ---- the benchmark -------------------------------------------------------------------------------------------------


def test_the_prompts_slots_are_those_that_are_filled():
    assert QUESTION.slots == {"question", "options"}


def test_what_the_model_is_shown():
    benchmark = build()
    sample = benchmark.samples()[0]
    question = next(q for q in read_questions(SAMPLE / "questions_32k.csv") if q.id == sample.id)
    shown = benchmark.conversation(sample)
    lines = (SAMPLE / "shared_contexts_32k.jsonl").read_text(encoding="utf-8").split("\n")
    context = json.loads(lines[0])[question.context]
    assert [(m.role, m.content) for m in shown[:-1]] == [(m["role"], m["content"]) for m in context[:11]]
    assert shown[-1].role == "user" and shown[-1].content.startswith(question.text)
    assert f"\n(b) {question.options[1]}\n(c) " in shown[-1].content
    assert question.shown in build(compat="reference").samples()[0].messages[0].content, "published: the list as it is"
    assert build(context=False).conversation(sample) == sample.messages == shown[-1:]
    generative = build(mode="generative").samples()[0]
    assert build(mode="generative").conversation(generative) == (*shown[:-1], Message("user", question.text))
    assert generative.options == question.options and generative.target == question.options[1]


def test_the_persona_is_what_the_user_said_so_far():
    benchmark = build(context=False)
    early, late = benchmark.samples()[0], benchmark.samples()[1]
    assert early.persona.description.startswith("Current user persona: Name: Mirela")
    texts = [item.text for item in early.persona.history]
    assert len(texts) == 5 and texts[1].startswith("Usually, yes.") and not any("slow hymns" in text for text in texts)
    assert any("slow hymns" in item.text for item in late.persona.history)
    assert early.persona.id != late.persona.id and benchmark.cluster(early) == benchmark.cluster(late) == "0"
    assert benchmark.samples()[2].persona is late.persona
    for sample in benchmark.samples():
        said = " ".join(item.text for item in sample.persona.history) + sample.persona.description
        gold = next(q for q in read_questions(SAMPLE / "questions_32k.csv") if q.id == sample.id)
        assert gold.options["abcd".index(gold.gold)] not in said
    assert {benchmark.cluster(sample) for sample in benchmark.samples()} == {"0", "1", "2"}


def test_the_description_is_the_one_in_force_at_the_question(tmp_path):
    (tmp_path / "shared_contexts_32k.jsonl").write_text(line("c", "u:hi", "s:young", "u:User: hi", "a:yes", "s:old"))
    first = rows_of(SAMPLE / "questions_32k.csv")[0] | {"shared_context_id": "c"}
    ends = {end: first | {"question_id": end, "end_index_in_shared_context": end} for end in ("1", "4", "5")}
    write(tmp_path / "questions_32k.csv", list(ends.values()))
    samples = build(path=str(tmp_path)).samples()
    assert {sample.id: sample.persona.description for sample in samples} == {"1": "", "4": "young", "5": "old"}


def test_questions_of_a_context_follow_each_other_and_share_their_beginning(tmp_path):
    rows = rows_of(SAMPLE / "questions_32k.csv")
    mixed = [rows[0], rows[7], rows[12], rows[2], rows[5], rows[10], rows[1]]
    write(tmp_path / "questions_32k.csv", mixed)
    (tmp_path / "shared_contexts_32k.jsonl").write_bytes((SAMPLE / "shared_contexts_32k.jsonl").read_bytes())
    benchmark = build(path=str(tmp_path))
    order = [mixed.index(next(r for r in mixed if r["question_id"] == s.id)) for s in benchmark.samples()]
    assert order == [0, 3, 6, 4, 1, 5, 2], "by the context's first question, then by how much of it is seen"
    first, second, third = (benchmark.conversation(s) for s in benchmark.samples()[:3])
    assert second[:11] == first[:11] and second[:31] == third[:31]
    assert [s.id for s in build(path=str(tmp_path), limit=2).samples()] == [
        mixed[0]["question_id"],
        mixed[1]["question_id"],
    ]


def test_a_change_of_the_context_changes_the_data(tmp_path):
    before = data_fingerprint(build().samples())
    for name in ("questions_32k.csv", "shared_contexts_32k.jsonl"):
        (tmp_path / name).write_bytes((SAMPLE / name).read_bytes())
    assert data_fingerprint(build(path=str(tmp_path)).samples()) == before
    place = tmp_path / "shared_contexts_32k.jsonl"
    place.write_text(place.read_text(encoding="utf-8").replace("calypso record", "polka record"), encoding="utf-8")
    assert data_fingerprint(build(path=str(tmp_path)).samples()) != before


def test_conversations_for_models_without_system_messages():
    turns = [Message(*turn) for turn in (
        ("system", "one"), ("user", "u1"), ("assistant", "a1"), ("assistant", "a2"), ("system", "two"),
        ("system", "three"), ("user", "u2"), ("user", "u3"))]  # fmt: skip
    assert merged(tuple(turns)) == (
        Message("user", "[System]: one\nu1"), Message("assistant", "a1\na2"),
        Message("user", "[System]: two\n[System]: three\nu2\nu3"),
    )  # fmt: skip
    assert merged((Message("system", "alone"),)) == (Message("user", "[System]: alone"),)
    shown = build(merge=True).conversation(build().samples()[1])
    assert all(a.role != b.role for a, b in zip(shown, shown[1:], strict=False)) and shown[0].role == "user"


def told(benchmark: PersonaMem, change=lambda sample: f"<final_answer> {sample.target}") -> Stated:
    replies = {sample.messages[-1].content: change(sample) for sample in benchmark.samples()}
    return Stated(lambda request: replies[request.messages[-1].content])


def test_letters_end_to_end(tmp_path):
    benchmark = build()
    summary, rows = run(benchmark, told(benchmark), tmp_path / "right")
    assert values(summary) == {"accuracy": 1, "macro_accuracy": 1, "invalid": 0} and summary.n == 14
    assert rows[0].groups["type"] == "recall_user_shared_facts" and {row.cluster for row in rows} == {"0", "1", "2"}
    assert max(len(row.line()) for row in rows) < 4000, "rows do not repeat their contexts"
    # Only questions about facts are answered right, three of fourteen; one reply of a type of two is unreadable.
    unread = next(s.id for s in benchmark.samples() if benchmark.groups(s)["type"] == TYPES[3])

    def some(sample):
        if benchmark.groups(sample)["type"] == TYPES[0]:
            return f"A good choice is {sample.target[1]}"
        return "Hm." if sample.id == unread else "(a)" if sample.target != "(a)" else "(b)"

    found = values(run(benchmark, told(benchmark, some), tmp_path / "some")[0])
    assert found == pytest.approx({"accuracy": 3 / 14, "macro_accuracy": 1 / 7, "invalid": 1 / 14})
    published = build(compat="reference")
    found = values(run(published, told(published, some), tmp_path / "published")[0])
    # "A good choice is a" is no article's fault: only there the letters are one.
    lucky = sum(s.target == "(a)" and benchmark.groups(s)["type"] == TYPES[0] for s in benchmark.samples())
    assert found["accuracy"] == pytest.approx(lucky / 14) and found["invalid"] == pytest.approx((1 + 3 - lucky) / 14)


class Wordy(Stated):
    """log p -1 per word for the texts it is convinced of, -1.5 for others."""

    def __init__(self, convinced) -> None:
        self.convinced, self.asked = convinced, []

    def loglikelihood(self, requests, targets):
        self.asked += [request.messages for request in requests]
        words = [len(target.split()) for target in targets]
        return [(-(1.0 if t in self.convinced else 1.5) * n, n) for t, n in zip(targets, words, strict=True)]


def test_options_by_likelihood_end_to_end(tmp_path):
    benchmark = build(mode="generative")
    assert set(benchmark.metrics) == {"accuracy", "macro_accuracy"}
    model = Wordy({sample.target for sample in benchmark.samples()})
    summary, rows = run(benchmark, model, tmp_path / "mean")
    assert values(summary) == {"accuracy": 1, "macro_accuracy": 1}
    assert [row.raw for row in rows] == [row.target for row in rows]
    assert len(model.asked) == 4 * 14 and all("<final_answer>" not in asked[-1].content for asked in model.asked)
    # By the sum an option of less than two thirds of the words wins against the right one.
    shortest = [
        min(range(4), key=lambda i: len(s.options[i].split()) * (1.0 if s.options[i] == s.target else 1.5))
        for s in benchmark.samples()
    ]
    expected = sum(s.options[i] == s.target for s, i in zip(benchmark.samples(), shortest, strict=True)) / 14
    summary, _ = run(build(mode="generative", compat="reference"), model, tmp_path / "sum")
    assert values(summary)["accuracy"] == pytest.approx(expected) and expected < 1


@pytest.mark.parametrize("mode", ["discriminative", "generative"])
def test_a_constant_and_a_random_answer(mode, tmp_path):
    benchmark = build(mode=mode)
    summary, rows = run(benchmark, Trivial("constant"), tmp_path / "constant")
    assert values(summary)["accuracy"] == pytest.approx(4 / 14), "(c) and (d) are right four times each"
    assert {row.options.index(row.raw) for row in rows} == {3} or {row.options.index(row.raw) for row in rows} == {2}
    summary, rows = run(benchmark, Trivial("random"), tmp_path / "random")
    assert len({row.options.index(row.raw) for row in rows}) > 1 and summary.n_unscored == 0


def test_an_endpoint_cannot_be_asked_for_likelihoods(tmp_path):
    class Deaf(Parrot):
        async def choose(self, request):
            raise UserError("deaf has no likelihoods")

    with pytest.raises(UserError, match="deaf has no likelihoods"):
        run(build(mode="generative", limit=1), Deaf("x"), tmp_path)


def test_a_personalizer_searches_for_the_question_alone():
    asked = "I have an afternoon of sanding ahead of me and want music for it."
    for mode in ("discriminative", "generative"):
        sample = build(mode=mode).samples()[0]
        assert task(sample.task).query_text(sample.messages[-1].content) == asked


@pytest.mark.parametrize("mode", ["discriminative", "generative"])
def test_a_real_lm_answers_and_is_scored_by_what_it_says(llama, mode, tmp_path):
    benchmark, model = build(mode=mode, limit=2, max_new_tokens=4), persona.load(llama)
    summary, rows = run(benchmark, model, tmp_path)
    assert summary.n_unscored == 0 and summary.n == 2
    for sample, row in zip(benchmark.samples(), rows, strict=True):
        request = Request(benchmark.conversation(sample), sample.persona)
        if mode == "generative":
            sums = [model.loglikelihood([request], [option])[0] for option in sample.options]
            assert row.raw == sample.options[likeliest(sums)]
        else:
            request = replace(request, sampling=replace(request.sampling, max_new_tokens=4))
            assert row.raw == model.respond([request])[0].text
