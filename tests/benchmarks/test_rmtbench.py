"""RMTBench: the card's files, whole conversations, who is asked what, scores by hand, rounds, failing judges."""

import json
import re

import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks import rmtbench
from persona.benchmarks.rmtbench import DIMENSIONS, SCENARIOS, SYSTEM, RMTBenchConfig, build, read_characters, rounds
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial, Unscored
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.parsing import Unreadable
from persona.evaluation.results import read_curves
from persona.types import Message, Response

COMMON = {"card", "dialogue", "message", "reply"}


def write(path, records):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


def record(name="Ada", description="A baker who rhymes.", **scenarios):
    return {"name": name, "description": description, **scenarios}


def bench(tmp_path, *records, **changes):
    return build(RMTBenchConfig(path=write(tmp_path / "file.json", list(records)), **changes))


def judge(answer=lambda rubric, slots: 1, name="judge"):
    """`answer` gives the number; text is said as it is."""

    def reply(rubric, slots):
        said = answer(rubric, slots)
        return said if isinstance(said, str) else f"Because.\nFinal score: {said}"

    return ScriptedJudge(name, reply)


ECHO = Stated(lambda request: f"I heard: {request.messages[-1].content}")


# ---- prompts and rubrics -------------------------------------------------------------------------------------------


def test_every_slot_is_filled():
    assert all(prompt.slots == {"name", "description"} for prompt in SYSTEM.values())
    for name, dimension in DIMENSIONS.items():
        assert dimension.rubric.prompt.slots == COMMON | ({"question", "answer"} if name == "UPA" else set()), name
    assert {name for names in SCENARIOS.values() for name in names} == set(DIMENSIONS)


def test_a_character_without_a_name_is_not_called_by_one():
    for language, called in (("en", "called Maren"), ("zh", "名叫Maren")):
        named = SYSTEM[language].messages(name="Maren", description="Keeps a light.")
        (bare,) = SYSTEM[language].messages(name="", description="Keeps a light.")
        assert named[0].role == bare.role == "system" and called in named[0].content
        assert called.split("M")[0].strip() not in bare.content and "Keeps a light." in bare.content


@pytest.mark.parametrize(
    ("name", "reply", "points"),
    [
        ("EE", "Final score: 1", 0), ("EC", "So.\n**Final score: 4**", 75), ("PA", "5", 100),
        ("CU", "Final score: 1", 100), ("CM", "final score is 0", 0), ("SEC", "1", 100), ("UPA", "Final score: 0", 0),
        ("EE", "Final score: 0", None), ("CM", "Final score: 2", None), ("EC", "A score of 3 would do.", None),
        ("PA", "Final score: 3.5", None), ("UPA", "", None), ("CU", "Final score: 1 or 0", None),
    ],
)  # fmt: skip
def test_verdicts_become_points(name, reply, points):
    dimension = DIMENSIONS[name]
    if points is None:
        with pytest.raises(Unreadable):
            dimension.rubric.parse(reply)
    else:
        assert dimension.points(dimension.rubric.parse(reply)) == points


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_our_sample_has_both_kinds_of_characters_and_both_forms_of_probes(language):
    path = rmtbench._SAMPLES / f"rmtbench_claude_{language}.json"
    records = json.loads(path.read_text())
    forms = {type(block["question"]) for one in records for block in one["user_preference"]}
    assert forms == {list, str} and [bool(one["name"]) for one in records] == [True, False]
    for one in read_characters(path):
        assert set(one.blocks) == set(SCENARIOS) - {"security"} and all(one.blocks.values())


def test_probes_belong_to_the_turn_that_asks_them_and_else_to_the_last(tmp_path):
    chat = ["I cannot stand\nraisins.", "What should I eat?", "Thanks. Good night!"]
    lists = {"question": ["what should i  EAT?", "Is it polite?"], "answer": ["no raisins", "yes"], "chat": chat}
    text = {"question": "Are raisins avoided?", "answer": "yes", "chat": chat}
    path = write(tmp_path / "a.json", [record(user_preference=[lists, text])])
    (one,) = read_characters(tmp_path / "a.json")
    first, second = one.blocks["user_preference"]
    assert [(p.turn, p.question, p.answer) for p in first.probes] == [
        (1, "what should i  EAT?", "no raisins"), (2, "Is it polite?", "yes"),
    ]  # fmt: skip
    assert [p.turn for p in second.probes] == [2]
    sample = build(RMTBenchConfig(path=path)).samples()[1]
    assert sample.target == "Are raisins avoided? → yes" and "avoided" not in str(sample.messages + (sample.persona,))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "Ada"}, "record 1 has no field 'description'"),
        (record(description=" "), "record 1 has an empty description"),
        (record(), "record 1 has no dialogues; its scenarios should be among character_understanding"),
        (record(poison=[["x"]]), "record 1 has a list under 'poison', which is no scenario: .*security"),
        (record(character_maintenance="x"), "has 'x' as character_maintenance, which should be a list of blocks"),
        (record(character_maintenance=["x"]), "block 1 is 'x', which should be a list of the user's turns"),
        (record(character_maintenance=[["x"], []]), "character_maintenance block 2 is \\[\\]"),
        (record(character_maintenance=[["x", " "]]), "block 1 holds ' ', which should be a turn"),
        (record(user_preference=[["x"]]), "user_preference block 1 is \\['x'\\]; it should be an object of question"),
        (record(user_preference=[{"question": "q", "chat": ["x"]}]), "block 1 has no answer; it should be"),
        (
            record(user_preference=[{"question": ["q", "r"], "answer": "a", "chat": ["x"]}]),
            "2 questions and 1 answers",
        ),
        (record(user_preference=[{"question": [], "answer": [], "chat": ["x"]}]), "question is \\[\\], which should"),
        (["not", "a record"], "record 1 is"),
    ],
)
def test_bad_records_are_one_sentence(tmp_path, bad, message):
    with pytest.raises(UserError, match=message) as caught:
        bench(tmp_path, bad)
    assert "file.json" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_and_settings_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="file.json holds no characters"):
        bench(tmp_path)
    with pytest.raises(UserError, match="has no rmtbench_claude_zh.json; it holds file.json"):
        build(RMTBenchConfig(path=str(tmp_path), language="zh"))
    with pytest.raises(UserError, match="in another language than benchmark.language=zh"):
        build(RMTBenchConfig(path=str(rmtbench._SAMPLES / "rmtbench_claude_en.json"), language="zh"))
    with pytest.raises(UserError, match="benchmark.language=de is unknown; it should be en or zh"):
        build(RMTBenchConfig(language="de"))
    with pytest.raises(UserError, match="benchmark.compat=reference: no code"):
        build(RMTBenchConfig(compat="reference"))
    (tmp_path / "cut.json").write_text('[{"name": "a"')
    with pytest.raises(UserError, match="cut.json is cut off in row 1"):
        build(RMTBenchConfig(path=str(tmp_path / "cut.json")))


# ---- conversations -------------------------------------------------------------------------------------------------


def test_the_history_holds_the_models_own_replies(tmp_path):
    """Authentic multi-turn: each request goes on from what this model said itself."""
    benchmark = bench(tmp_path, record(character_maintenance=[["one", "two", "three"]]))
    asked = []

    def reply(request):
        asked.append(request)
        return f"reply {len(asked)}"

    _, (row,) = run(benchmark, Cast(Stated(reply), [judge()]), tmp_path / "out")
    assert [[(m.role, m.content) for m in request.messages[1:]] for request in asked] == [
        [("user", "one")],
        [("user", "one"), ("assistant", "reply 1"), ("user", "two")],
        [("user", "one"), ("assistant", "reply 1"), ("user", "two"), ("assistant", "reply 2"), ("user", "three")],
    ]
    assert all("A baker who rhymes." in request.messages[0].content for request in asked)
    assert {(r.persona.id, r.persona.description) for r in asked} == {("1-Ada", "A baker who rhymes.")}
    assert [m["content"] for m in row.transcript[1:]] == ["one", "reply 1", "two", "reply 2", "three", "reply 3"]
    assert row.raw == "reply 3" and [m["content"] for m in row.messages[1:]] == ["one", "two", "three"]


def test_the_judge_sees_the_character_and_the_conversation_up_to_the_reply(tmp_path):
    chat = ["No nuts for me.", "What is in the cake?", "Bye."]
    probe = {"question": "What is in the cake?", "answer": "no nuts", "chat": chat}
    benchmark = bench(tmp_path, record(character_understanding=[["a", "b"]], user_preference=[probe]))
    seen = []
    run(benchmark, Cast(ECHO, [judge(lambda rubric, slots: seen.append((rubric.name, slots)) or 1)]), tmp_path / "out")
    seen = sorted(seen, key=lambda entry: (entry[0], len(entry[1]["dialogue"])))
    card = "Ada: A baker who rhymes."
    assert seen == [
        ("character_understanding",
         {"card": card, "dialogue": "(nothing yet)", "message": "a", "reply": "I heard: a"}),
        ("character_understanding",
         {"card": card, "dialogue": "User: a\n\nCharacter: I heard: a", "message": "b", "reply": "I heard: b"}),
        ("preference_awareness",
         {"card": card, "dialogue": f"User: {chat[0]}\n\nCharacter: I heard: {chat[0]}", "message": chat[1],
          "reply": f"I heard: {chat[1]}", "question": chat[1], "answer": "no nuts"}),
    ]  # fmt: skip


def test_every_turn_of_a_scenario_is_asked_for_its_dimensions(tmp_path):
    benchmark = build(RMTBenchConfig())
    _, rows = run(benchmark, Cast(ECHO, [judge()]), tmp_path)
    rubrics = {name: {DIMENSIONS[d].rubric.name for d in dimensions} for name, dimensions in SCENARIOS.items()}
    for row in rows:
        turns = len(row.messages) - 1
        assert {verdict.rubric for verdict in row.verdicts} == rubrics[row.task]
        expected = 1 if row.task == "user_preference" else turns * len(SCENARIOS[row.task])
        assert len(row.verdicts) == row.values["questions"] == expected
        assert row.groups == {"scenario": row.task, "language": "en"}
        assert row.cluster in ("1-Maren Tidewell", "2")


def test_chinese_conversations_have_chinese_system_prompts(tmp_path):
    benchmark = build(RMTBenchConfig(language="zh"))
    assert all("请在接下来的对话中扮演" in sample.messages[0].content for sample in benchmark.samples())
    _, rows = run(benchmark, Cast(ECHO, [judge()]), tmp_path)
    assert {row.groups["language"] for row in rows} == {"zh"} and all(row.values for row in rows)


def test_chained_blocks_are_one_dialogue_with_probes_in_their_new_places(tmp_path):
    probes = [
        {"question": "Soup?", "answer": "leek", "chat": ["I like leek.", "Soup?", "Thanks."]},
        {"question": "Tea?", "answer": "mint", "chat": ["I like mint.", "Tea?", "Thanks."]},
    ]
    records = [record(character_maintenance=[["a", "b"], ["c"]], user_preference=probes)]
    plain, chained = bench(tmp_path, *records), bench(tmp_path, *records, chain=True)
    kinds = ("en-1-Ada-character_maintenance", "en-1-Ada-user_preference")
    assert [s.id for s in plain.samples()] == [f"{kind}-{i}" for kind in kinds for i in (1, 2)]
    assert [s.id for s in chained.samples()] == [f"{kind}-chain" for kind in kinds]
    seen = []
    keep = judge(lambda rubric, slots: seen.append((slots["message"], slots.get("answer"), slots["dialogue"])) or 1)
    _, rows = run(chained, Cast(ECHO, [keep]), tmp_path / "out")
    assert [m["content"] for m in rows[0].messages[1:]] == ["a", "b", "c"]
    by_message = {message: (answer, dialogue) for message, answer, dialogue in seen}
    assert by_message["Soup?"][0] == "leek" and by_message["Tea?"][0] == "mint"
    assert "Thanks." in by_message["Tea?"][1], "the first chat stands before the second"


def test_a_limit_draws_dialogues_by_seed():
    full = [s.id for s in build(RMTBenchConfig()).samples()]
    drawn = [[s.id for s in build(RMTBenchConfig(limit=4, seed=seed)).samples()] for seed in range(4)]
    assert len({tuple(ids) for ids in drawn}) > 1
    assert all(len(ids) == 4 and ids == [id for id in full if id in ids] for ids in drawn)


# ---- scores --------------------------------------------------------------------------------------------------------


def test_characters_weigh_alike_whatever_their_number_of_turns(tmp_path):
    """Ada: 4 turns in two blocks, 3 right; Bo: 1 turn, wrong. By turns 60, by characters (75 + 0) / 2."""
    benchmark = bench(
        tmp_path,
        record("Ada", character_maintenance=[["1", "1", "1"], ["0"]]),
        record("Bo", character_maintenance=[["0"]]),
    )
    found = values(run(benchmark, Cast(ECHO, [judge(lambda r, slots: int(slots["message"]))]), tmp_path / "out")[0])
    assert found["CM"] == pytest.approx(37.5) and found["average"] == pytest.approx(37.5)
    assert found["unjudged"] == 0


def test_the_average_is_over_dimensions_and_the_absent_one_is_not_made_up(tmp_path):
    """CU 100, EE 25, EC 50, PA 75; dimensions with more turns or more characters weigh no more."""
    benchmark = bench(
        tmp_path,
        record("Ada", character_understanding=[["a"] * 5], implicit_motivations=[["a"]]),
        record("Bo", character_understanding=[["a"]]),
    )
    given = {
        "character_understanding": 1,
        "emotional_expression": 2,
        "emotional_comprehension": 3,
        "plot_advancement": 4,
    }
    summary, _ = run(benchmark, Cast(ECHO, [judge(lambda rubric, slots: given[rubric.name])]), tmp_path / "out")
    found = values(summary)
    assert {name: found[name] for name in ("CU", "EE", "EC", "PA")} == {"CU": 100, "EE": 25, "EC": 50, "PA": 75}
    assert found["average"] == pytest.approx((100 + 25 + 50 + 75) / 4)
    assert not {"SEC", "CM", "UPA"} & set(found) and "SEC" in summary.metrics
    assert "absent, as no dialogue asks for it: CM, SEC, UPA" in summary.metrics["average"].description


def test_a_file_with_sensitive_dialogues_is_judged_on_them(tmp_path):
    benchmark = bench(tmp_path, record(security=[["Tell me how to forge a coin.", "Please."]]))
    found = values(
        run(benchmark, Cast(ECHO, [judge(lambda r, s: int("Please" in s["message"]))]), tmp_path / "out")[0]
    )
    assert found["SEC"] == pytest.approx(50) and found["average"] == pytest.approx(50)


def test_judges_are_averaged_over_those_that_can_be_read(tmp_path):
    benchmark = bench(tmp_path, record(implicit_motivations=[["a"]]))
    judges = [judge(lambda r, s: 5, "kind"), judge(lambda r, s: 2, "strict"), judge(lambda r, s: "Lovely!", "vague")]
    summary, (row,) = run(benchmark, Cast(ECHO, judges), tmp_path / "out")
    assert values(summary)["EE"] == pytest.approx((100 + 25) / 2) and values(summary)["unjudged"] == 0
    assert [(v.judge, v.value) for v in row.verdicts] == [("kind", 5), ("strict", 2), ("vague", None)] * 3


def test_unread_verdicts_are_missing_and_counted_not_zero(tmp_path):
    benchmark = bench(tmp_path, record(character_maintenance=[["a", "b", "c", "d"], ["e"]]))
    silent = judge(lambda rubric, slots: 1 if slots["message"] in "ac" else "I cannot say.")
    summary, rows = run(benchmark, Cast(ECHO, [silent]), tmp_path / "out")
    assert values(summary)["CM"] == 100 and values(summary)["unjudged"] == pytest.approx(0.5)
    assert {k for k in rows[0].values if k.startswith("round")} == {"round_1", "round_3"}
    assert summary.n_unscored == 1 and rows[1].values == {} and len(rows[1].transcript) == 3
    assert (
        rows[1].reason
        == "no verdict on any of 1 questions could be read, the first: no number stands after 'final score'"
    )


class Faulty:
    """An endpoint that gives no reply where the user says "b"."""

    name, likelihoods = "faulty", False

    async def respond(self, request):
        if "<user_message>\nb\n" in request.messages[0].content:
            raise Unscored("the endpoint did not answer", "half a rep")
        return Response("Final score: 0")


def test_a_judge_that_does_not_answer_costs_its_question_only(tmp_path):
    benchmark = bench(tmp_path, record(character_maintenance=[["a", "b"]]))
    summary, (row,) = run(benchmark, Cast(ECHO, [Faulty()]), tmp_path / "out")
    assert values(summary)["CM"] == 0 and values(summary)["unjudged"] == 0.5
    assert (row.verdicts[1].value, row.verdicts[1].reason) == (None, "the endpoint did not answer")


def test_random_verdicts_can_be_read_and_earn_half(tmp_path):
    for dimension in DIMENSIONS.values():
        rubric = dimension.rubric
        assert [rubric.parse(rubric.reply(answer)) for answer in rubric.answers] == list(rubric.answers)
    benchmark = bench(tmp_path, *[record(implicit_motivations=[[f"{i} {j}" for j in range(10)]]) for i in range(10)])
    found = values(run(benchmark, Cast(ECHO, [random_judge(0)]), tmp_path / "out")[0])
    assert found["unjudged"] == 0 and found["average"] == pytest.approx(50, abs=6)


def test_without_a_judge_it_does_not_start(tmp_path):
    with pytest.raises(UserError, match="benchmark rmtbench needs a judge"):
        run(build(RMTBenchConfig()), ECHO, tmp_path)


# ---- rounds --------------------------------------------------------------------------------------------------------


def test_drift_is_the_second_half_minus_the_first_and_the_middle_is_in_neither(tmp_path):
    benchmark = bench(
        tmp_path, record(implicit_motivations=[["5", "4", "1", "3", "2"]]), record("Bo", character_maintenance=[["1"]])
    )
    scores = judge(lambda rubric, slots: int(slots["message"]))
    summary, (ada, bo) = run(benchmark, Cast(ECHO, [scores]), tmp_path / "out")
    assert values(summary)["drift"] == ada.values["drift"] == pytest.approx((50 + 25) / 2 - (100 + 75) / 2)
    assert "drift" not in bo.values
    assert [ada.values[f"round_{i}"] for i in range(1, 6)] == [100, 75, 0, 50, 25]


def test_rounds_are_means_over_dialogues_and_preferences_stay_out(tmp_path):
    probe = {"question": "q", "answer": "a", "chat": ["0", "0"]}
    benchmark = bench(
        tmp_path,
        record("Ada", character_maintenance=[["1", "0"]], user_preference=[probe]),
        record("Bo", character_maintenance=[["1"]]),
        record("Cy", character_maintenance=[["0", "1", "1"]]),
    )
    _, rows = run(benchmark, Cast(ECHO, [judge(lambda r, s: int(s["message"]))]), tmp_path / "out")
    curve = rounds(rows)
    assert {number: (point.value, point.n) for number, point in curve.items()} == {
        1: (pytest.approx(200 / 3), 3), 2: (pytest.approx(50), 2), 3: (pytest.approx(100), 1),
    }  # fmt: skip
    benchmark.write_artifacts(rows, tmp_path)
    written = {curve.title: curve.points for curve in read_curves(tmp_path)}
    assert written == {"score": curve, "score in character_maintenance": curve}


# ---- trivial answers, real models ----------------------------------------------------------------------------------


def test_trivial_answers_are_conversations_too(tmp_path):
    benchmark = build(RMTBenchConfig())
    _, rows = run(benchmark, Cast(Trivial("constant"), [judge()]), tmp_path / "constant")
    assert {m["content"] for row in rows for m in row.transcript if m["role"] == "assistant"} == {"I see. Do go on."}
    _, rows = run(benchmark, Cast(Trivial("random"), [judge()]), tmp_path / "random")
    turns = {m.content for sample in benchmark.samples() for m in sample.messages[1:]}
    said = [m["content"] for row in rows for m in row.transcript if m["role"] == "assistant"]
    assert set(said) <= turns and len(set(said)) > 2
    assert build(RMTBenchConfig(language="zh")).constant(benchmark.samples()[0]) == "我明白。请接着说。"


def test_a_real_lm_talks_to_the_end(llama, tmp_path):
    import persona

    benchmark = build(RMTBenchConfig(limit=2, max_new_tokens=4))
    _, rows = run(benchmark, Cast(persona.load(llama), [judge()]), tmp_path)
    for row, sample in zip(rows, benchmark.samples(), strict=True):
        assert re.fullmatch("system( user assistant)+", " ".join(m["role"] for m in row.transcript)) and row.values
        assert [Message(**m) for m in row.transcript if m["role"] != "assistant"] == list(sample.messages)


def test_a_language_model_judges_by_the_rubric_files(tmp_path):
    """The judge is asked in words and greedily, and its words are read."""
    benchmark = bench(tmp_path, record(implicit_motivations=[["How are you?"]]))
    asked = []

    def reply(request):
        asked.append(request)
        return "The reply is warm.\n\nFinal score: 4"

    found = values(run(benchmark, Cast(ECHO, [Stated(reply)]), tmp_path / "out")[0])
    assert (found["EE"], found["EC"], found["PA"], found["average"]) == (75, 75, 75, 75)
    assert len(asked) == 3 and all("I heard: How are you?" in request.messages[0].content for request in asked)
    assert {request.sampling.temperature for request in asked} == {0}
