"""PersonaGym: PersonaScore by hand, what reaches the judges, questions by the reference, and the published errors."""

import json
import logging
import re
from collections import Counter

import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks import personagym
from persona.benchmarks.personagym import (
    TASKS,
    PersonaGymConfig,
    build,
    parse_examples,
    parse_list,
    parse_score,
    persona_score,
    persona_scores,
    reference_mean,
    reference_scores,
)
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial
from persona.evaluation.judges.judging import ScriptedJudge, Unscored, random_judge
from persona.evaluation.judges.parsing import Unreadable
from persona.types import Response

ADA, BEN = "A 40-year-old clockmaker from Oslo", "A 9-year-old pupil from Lima, who collects beetles"
FINAL = "Therefore, the final score is"
FIVE = "\n".join(f"Score {k}: Response - example {k}\nand its second line" for k in range(1, 6))


def folder(tmp_path, questions=2, personas=(ADA, BEN)):
    place = tmp_path / "questions"
    place.mkdir(exist_ok=True)
    for persona in personas:
        asked = {task: [f"{persona[:4]} {task} question {n}?" for n in range(questions)] for task in TASKS}
        (place / f"{persona}.json").write_text(json.dumps(asked))
    return str(place)


def gym(**changes):
    return build(PersonaGymConfig(**changes))


def judge(reply, name="judge"):
    """`reply(slots)` is a number or a whole reply."""

    def say(rubric, slots):
        said = reply(slots)
        return said if isinstance(said, str) else f"So it is.\n{FINAL} {said}."

    return ScriptedJudge(name, say)


def echo(request):
    return f"I answer: {request.messages[-1].content}"


def cast(*judges, model=None, reference=None):
    return Cast(model or Stated(echo), judges=judges, reference=reference)


# ---- scores --------------------------------------------------------------------------------------------------------


def test_persona_score_by_hand():
    scores = dict(zip(TASKS, (4.37, 4.88, 3.98, 4.81, 4.52), strict=True))
    assert persona_score(scores) == pytest.approx(22.56 / 5)
    published = {"Toxicity Control" if name == "Toxicity" else name: value for name, value in scores.items()}
    assert persona_score({**published, "PersonaScore": 1.0, "PersonaScore SD": 9.0}) == persona_score(scores)


def test_only_the_papers_figure_gives_the_published_persona_score():
    """Claude 3 Haiku, defect 8: its score file says 4.47 for Persona Consistency, the paper 3.47."""
    file = dict(zip(TASKS, (4.28, 4.94, 3.04, 4.47, 2.47), strict=True))
    assert round(persona_score({**file, "Persona Consistency": 3.47}), 2) == 3.64
    assert round(persona_score(file), 2) == 3.84


@pytest.mark.parametrize(
    "scores",
    [{}, dict.fromkeys(TASKS[1:], 3.0), dict.fromkeys((*TASKS, "Humour"), 3.0),
     dict.fromkeys((*TASKS, "Toxicity Control"), 3.0)],
)  # fmt: skip
def test_a_persona_score_is_over_the_five_tasks(scores):
    with pytest.raises(UserError, match="Expected Action, Toxicity, .* each once; given are"):
        persona_score(scores)


@pytest.mark.parametrize(
    "reply",
    [f"Good.\n{FINAL} 4.", "therefore, the final score is **4**", "**Therefore, the final score is: 4**",
     "Score 5 is too much; 3 too little. Therefore the final score is 4/5", f"<think>{FINAL} 2.</think>{FINAL} 4"],
)  # fmt: skip
def test_scores_are_read_however_they_are_dressed(reply):
    assert parse_score(reply) == 4


@pytest.mark.parametrize("end", ["45", "4.5", "0", "6", "-4", "high", "4 or 5"])
def test_scores_that_are_none_are_unreadable(end):
    """Neither clamped nor cut (defect 5): the published parser reads 45, 4, 0, 6, 0, 0 and 4."""
    reply = f"(1) Evaluation: well. {FINAL} {end}."
    with pytest.raises(Unreadable):
        parse_score(reply)
    assert reference_scores(reply) == [{"45": 45, "4.5": 4, "6": 6, "4 or 5": 4}.get(end, 0)]


def test_a_score_needs_its_sentence():
    with pytest.raises(Unreadable):
        parse_score("The reply resembles score 3 and has nothing of score 4.")


def test_the_published_parser_by_hand():
    reply = f"(1) Evaluation: a. {FINAL} 4. (2) Evaluation: {FINAL.lower()} 5. (3) Evaluation: {FINAL} 2"
    assert reference_scores(reply) == [4, 0, 2] and reference_mean(reply) == 3
    assert reference_scores(f"{FINAL} 5.") == [] and reference_mean(f"{FINAL} 5.") == 0
    assert reference_scores(f"(1) Evaluation: {FINAL} **5**") == [0]


# ---- example replies -----------------------------------------------------------------------------------------------


def test_examples_keep_all_their_lines():
    """Defect 1, second half: the published code keeps the first line of each."""
    found = parse_examples(
        'Here they are.\n\n**Score 1:** Response - "No."\nscore 2: Response: Perhaps.\n\nOr not.\n- Score 3 : maybe\n'
        "Score 4: Response - I scored a\nScore of 5: great\nScore 5: Response - “Yes,\n\nalways.”\n"
    )
    assert found == {1: "No.", 2: "Perhaps.\n\nOr not.", 3: "maybe", 4: "I scored a\nScore of 5: great",
                     5: "Yes,\n\nalways."}  # fmt: skip


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Sorry.",
        FIVE.replace("Score 5", "Score 4"),
        FIVE + "\nScore 6: x",
        FIVE + "\nScore 5: again",
        re.sub(" Response - example 3\n.*\n", "\n", FIVE),
    ],
)
def test_examples_are_five_or_none(reply):
    with pytest.raises(Unreadable):
        parse_examples(reply)


def test_examples_reach_every_judge_whole(tmp_path):
    """Defect 1: as published, each rubric gets one character of them."""
    seen, asked = [], []

    def grade(slots):
        seen.append(slots)
        return 3

    def write(request):
        asked.append(request)
        question = re.search(r"Question: (.*)", request.messages[-1].content).group(1)
        return FIVE.replace("example", f"example for {question}")

    benchmark = gym(path=folder(tmp_path))
    summary, _ = run(benchmark, cast(judge(grade), judge(grade, "second"), reference=Stated(write)), tmp_path / "out")
    assert len(seen) == 2 * 20 and len(asked) == 20 and values(summary)["with_examples"] == 1
    for slots in seen:
        for score in range(1, 6):
            assert f"Score {score}: example for {slots['question']} {score}\nand its second line" in slots["examples"]
        assert slots["examples"] in personagym.GRADE.prompt.messages(**slots)[-1].content
    assert all(request.sampling.temperature == 0 for request in asked)
    assert not any("Reply:" in request.messages[-1].content for request in asked), "examples are made before replies"


def test_without_a_reference_it_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        summary, _ = run(gym(path=folder(tmp_path)), cast(judge(lambda slots: 3)), tmp_path / "out")
    assert values(summary)["with_examples"] == 0 and values(summary)["persona_score"] == 3
    assert [record.message for record in caplog.records if "without examples" in record.message] == [
        "personagym: there is no reference, so replies are graded without examples for each score"
    ]


def test_examples_that_cannot_be_read_are_counted(tmp_path):
    class Author:
        name, likelihoods = "author", False

        async def respond(self, request):
            if "Linguistic Habits" in request.messages[-1].content:
                raise Unscored("the endpoint gave no reply")
            return Response(FIVE if "Toxicity" in request.messages[-1].content else "I cannot.")

    seen = {}
    summary, _ = run(
        gym(path=folder(tmp_path)),
        cast(judge(lambda slots: seen.update({slots["task"]: slots["examples"]}) or 3), reference=Author()),
        tmp_path / "out",
    )
    assert values(summary)["with_examples"] == pytest.approx(1 / 5)
    assert {task for task, shown in seen.items() if shown} == {"Toxicity"}


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "slots"),
    [(personagym.ANSWER, {"persona"}),
     (personagym.OUTLINE, {"task", "persona", "question", "response", "examples"}),
     (personagym.GRADE.prompt, {"task", "persona", "question", "response", "examples"}),
     (personagym.GRADE_GROUP.prompt, {"rubrics", "number"}),
     (personagym.EXAMPLES, {"outline"}),
     (personagym.ENVIRONMENTS, {"persona", "environments"}),
     (personagym.QUESTIONS, {"persona", "environments", "task", "number"})],
)  # fmt: skip
def test_slots(prompt, slots):
    assert prompt.slots == slots


def test_each_task_has_its_own_definitions():
    slots = {"persona": ADA, "question": "?", "response": "!", "examples": ""}
    graded = {personagym.GRADE.prompt.messages(task=task, **slots)[-1].content for task in TASKS}
    slots = {"persona": ADA, "environments": "", "number": 3}
    asked = {personagym.QUESTIONS.messages(task=task, **slots)[0].content for task in TASKS}
    assert len(graded) == len(asked) == 5
    for text in graded:
        assert re.findall(r"^([0-9]):", text, re.MULTILINE) == list("12345") and "{" not in text
    body = re.compile(r"What the questions test: .*\n\n?(\S.{50,})\n")
    assert len({body.search(text).group(1) for text in asked}) == 5


def test_every_judge_gets_the_system_prompt_and_plain_text(tmp_path):
    """Defects 2 and 3: as published only one judge gets the system prompt, and newlines are escaped."""
    seen = {"first": [], "second": []}

    def grader(name):
        def reply(request):
            seen[name].append(request)
            return f"{FINAL} 4."

        return Stated(reply)

    model = Stated(lambda request: "It's one line,\nand another.")
    run(gym(path=folder(tmp_path)), cast(grader("first"), grader("second"), model=model), tmp_path / "out")
    assert len(seen["first"]) == len(seen["second"]) == 20
    for request in seen["first"] + seen["second"]:
        assert [message.role for message in request.messages] == ["system", "user"]
        assert "Reply: It's one line,\nand another." in request.messages[1].content
        assert request.sampling.temperature == 0


# ---- episodes ------------------------------------------------------------------------------------------------------


def test_what_the_model_is_asked(tmp_path):
    seen = []

    def answer(request):
        seen.append(request)
        return "yes"

    run(
        gym(path=folder(tmp_path), max_new_tokens=77),
        cast(judge(lambda slots: 2), model=Stated(answer)),
        tmp_path / "o",
    )
    assert len(seen) == 20 and len({request.sampling.seed for request in seen}) == 20, "seeded by question"
    for request in seen:
        assert [message.role for message in request.messages] == ["system", "user"], "no history between questions"
        assert request.persona.id == request.persona.description and request.persona.id in request.messages[0].content
        assert request.messages[1].content.startswith(request.persona.id[:4])
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.9, 0.9, 77)


def test_persona_score_is_the_mean_of_tasks_with_intervals_over_personas(tmp_path):
    grades = {"Expected Action": 1, "Toxicity": 5, "Linguistic Habits": 2, "Persona Consistency": 4}

    def grade(slots):
        return grades.get(slots["task"], 3) if slots["persona"] == ADA else 5

    summary, rows = run(gym(path=folder(tmp_path)), cast(judge(grade)), tmp_path / "out")
    assert values(summary)["persona_score"] == pytest.approx((3 + 5) / 2)
    assert summary.estimates["persona_score"].n_clusters == 2 and summary.n == 20
    each = persona_scores(rows)
    assert each[ADA] == {**{task: grades.get(task, 3) for task in TASKS}, "PersonaScore": 3}
    assert each[BEN]["PersonaScore"] == 5
    assert {row.groups["task"] for row in rows} == set(TASKS)


def test_judges_are_averaged_and_an_unreadable_one_is_missing(tmp_path):
    """Defect 4: as published an unreadable judge is a 0, which halves the score."""
    place = folder(tmp_path)
    judges = (judge(lambda slots: 4), judge(lambda slots: 5 if "question 0" in slots["question"] else "Hm.", "second"))
    summary, rows = run(gym(path=place), cast(*judges), tmp_path / "out")
    assert Counter(row.values["persona_score"] for row in rows) == {4.5: 10, 4.0: 10}
    assert [verdict.value for verdict in rows[-1].verdicts] == [4, None] and rows[-1].verdicts[1].raw == "Hm."

    mute = cast(judge(lambda slots: 4 if slots["task"] == "Toxicity" else f"{FINAL} 45."))
    summary, rows = run(gym(path=place), mute, tmp_path / "mute")
    assert (summary.n, summary.n_unscored) == (20, 16) and values(summary)["persona_score"] == 4
    assert summary.unscored_reasons == {"no judge gave a score that can be read": 16}
    assert all(row.raw and len(row.verdicts) == 1 for row in rows)


def test_replies_of_several_seeds_are_averaged(tmp_path):
    """Defect 9: a reply at temperature .9 is one draw."""
    drawn = {}

    def answer(request):
        drawn.setdefault(request.messages, []).append(request.sampling.seed)
        return f"reply {request.sampling.seed}"

    grade = judge(lambda slots: 1 + int(slots["response"].split()[1]) % 5)
    benchmark, place = gym(path=folder(tmp_path), seeds=3), tmp_path / "out"
    summary, rows = run(benchmark, cast(grade, model=Stated(answer)), place)
    assert all(len(set(seeds)) == 3 for seeds in drawn.values()) and len(drawn) == 20
    by_question = {messages[-1].content: seeds for messages, seeds in drawn.items()}
    for row in rows:
        seeds = by_question[row.messages[-1]["content"]]
        assert row.values["persona_score"] == pytest.approx(sum(1 + seed % 5 for seed in seeds) / 3)
        replies = [message["content"] for message in row.transcript if message["role"] == "assistant"]
        assert replies == [f"reply {seed}" for seed in seeds]
        assert len(row.verdicts) == 3 and row.raw == "\n\n".join(f"({n}) reply {s}" for n, s in enumerate(seeds, 1))

    def raws(name, **changes):
        benchmark = gym(path=str(tmp_path / "questions"), seeds=3, **changes)
        return {row.id: row.raw for row in run(benchmark, cast(grade, model=Stated(answer)), tmp_path / name)[1]}

    again, other = raws("again"), raws("other", seed=1)
    assert again == {row.id: row.raw for row in rows} and all(other[id] != again[id] for id in again)


def test_a_limit_weighs_the_tasks_alike(tmp_path):
    samples = gym(path=folder(tmp_path), limit=10).samples()
    assert {(sample.persona.id, sample.task) for sample in samples} == {(p, t) for p in (ADA, BEN) for t in TASKS}
    assert all(sample.messages[-1].content.endswith("question 0?") for sample in samples)


def test_trivial_answers(tmp_path):
    benchmark, graded = gym(path=folder(tmp_path)), []
    grade = judge(lambda slots: graded.append((slots["persona"], slots["response"])) or 1)
    run(benchmark, cast(grade, model=Trivial("constant")), tmp_path / "constant")
    assert len({reply for _, reply in graded}) == 1
    graded.clear()
    run(benchmark, cast(grade, model=Trivial("random")), tmp_path / "random")
    assert {reply for _, reply in graded} == {f"I am this person: {persona}." for persona in (ADA, BEN)}


def test_every_personas_scores_are_written(tmp_path):
    """Defect 6: as published only the last persona's are, into a folder that is not there."""
    benchmark = gym(path=folder(tmp_path))
    grade = judge(lambda slots: "Hm." if (slots["persona"], slots["task"]) == (BEN, "Toxicity") else 2)
    _, rows = run(benchmark, cast(grade), tmp_path / "out")
    benchmark.write_artifacts(rows, tmp_path / "new" / "folder")
    each = json.loads((tmp_path / "new" / "folder" / "persona_scores.json").read_text())
    whole = json.loads((tmp_path / "new" / "folder" / "scores.json").read_text())
    assert each == {ADA: {**dict.fromkeys(TASKS, 2), "PersonaScore": 2},
                    BEN: {**dict.fromkeys(TASKS, 2), "Toxicity": None, "PersonaScore": None}}  # fmt: skip
    assert whole == {**dict.fromkeys(TASKS, 2), "PersonaScore": 2, "PersonaScore SD": None}
    assert persona_score(whole) == 2


@pytest.mark.parametrize("compat", [None, "reference"])
def test_random_verdicts_are_read(tmp_path, compat):
    summary, rows = run(gym(path=folder(tmp_path), compat=compat), cast(random_judge(0)), tmp_path / "out")
    assert summary.n_unscored == 0 and values(summary).get("unparsed", 0) == 0
    drawn = {row.values["persona_score"] for row in rows}
    assert drawn <= {1, 2, 3, 4, 5} and len(drawn) > 2


def test_our_sample_runs(tmp_path):
    summary, rows = run(gym(), cast(judge(lambda slots: 4), judge(lambda slots: 5, "second")), tmp_path / "out")
    assert summary.n == 30 and summary.n_unscored == 0 and summary.estimates["persona_score"].n_clusters == 3
    assert Counter(row.task for row in rows) == dict.fromkeys(TASKS, 6)
    assert values(summary)["persona_score"] == 4.5


# ---- as published --------------------------------------------------------------------------------------------------


def group_reply(*ends):
    return "\n".join(f"({n}) Evaluation: so. {end}" for n, end in enumerate(ends, start=1))


def test_groups_as_published(tmp_path):
    """Seven questions: a group of five and one of two. Zeros are left out within a judge, and halve between judges."""
    seen = []

    def first(slots):
        seen.append(slots)
        return group_reply(*[f"{FINAL} 4."] * 3, f"{FINAL} **5**.", f"{FINAL} 1.")

    def second(slots):
        return group_reply(f"{FINAL} 2.", "Hm.") if slots["number"] == 2 else "I would rather not."

    benchmark = gym(path=folder(tmp_path, questions=7, personas=(ADA,)), compat="reference")
    summary, rows = run(benchmark, cast(judge(first), judge(second, "second")), tmp_path / "out")
    assert [row.id for row in rows] == [f"001/{task}/{places}" for places in ("1-5", "6-7") for task in TASKS]
    assert [row.values["persona_score"] for row in rows[::5]] == [(13 / 4 + 0) / 2, (13 / 4 + 2) / 2]
    assert [row.values["unparsed"] for row in rows[::5]] == [(1 / 5 + 1) / 2, (0 + 1 / 2) / 2]
    assert values(summary)["persona_score"] == pytest.approx((13 / 8 + 21 / 8) / 2)
    assert "with_examples" not in benchmark.metrics and summary.n_unscored == 0
    assert rows[0].transcript[0]["role"] == "system" and len(rows[0].transcript) == 11

    blocks = [slots for slots in seen if slots["number"] == 5][0]["rubrics"]
    assert blocks.startswith("['") and "\\n" in blocks and "\n" not in blocks, "a Python list, as published"
    letters = re.findall(r"to compare the reply with:\\n(.)\\n", blocks)
    assert letters == list("Score"), "what is left of the example replies"


def test_groups_ask_no_examples_and_all_failed_is_zero(tmp_path):
    def write(request):
        raise AssertionError("the published example replies never reach the judge, so none are asked for")

    benchmark = gym(path=folder(tmp_path), compat="reference")
    summary, rows = run(benchmark, cast(judge(lambda slots: "Hm."), reference=Stated(write)), tmp_path / "out")
    assert values(summary) == {"persona_score": 0, "unparsed": 1} and summary.n == 10


# ---- questions by the reference ------------------------------------------------------------------------------------


class Author:
    """Writes what is asked of it, except tasks in `bad`: for these, `bad[task](try)` is its reply."""

    def __init__(self, bad=None):
        self.bad, self.asked, self.tries = bad or {}, Counter(), Counter()
        self.requests, self.model = [], Stated(self._reply)

    def _reply(self, request):
        text = request.messages[-1].content
        self.requests.append(request)
        if "Choose those" in text:
            self.asked["environments"] += 1
            return self.bad.get("environments", '```json\n["a job Interview", "Mars"]\n```')
        if "five examples" in text:
            return FIVE
        task = re.search("What the questions test: (.*)", text).group(1)
        assert "- A job interview" in text and "Mars" not in text, "only environments of the list count"
        self.asked[task] += 1
        number = int(re.search("exactly ([0-9]+) questions", text).group(1))
        person = re.search("The person: (.{4})", text).group(1)
        self.tries[task, person] += 1
        if task in self.bad:
            return self.bad[task](self.tries[task, person])
        return repr([f"{person} {task} {n}, isn't it?" for n in range(number)])


@pytest.fixture
def personas(tmp_path):
    path = tmp_path / "personas.txt"
    path.write_text(f"{ADA}\n\n{BEN}\n")
    return {"personas": str(path), "path": str(tmp_path / "written" / "questions"), "questions": 3}


def test_questions_are_written_asked_and_kept(tmp_path, personas):
    author, asked = Author(), []
    benchmark = gym(**personas)
    assert benchmark.needs == ("judge", "reference") and gym().needs == ("judge",)
    model = Stated(lambda request: asked.append(request.messages[-1].content) or "yes")
    summary, rows = run(benchmark, cast(judge(lambda s: 4), model=model, reference=author.model), tmp_path / "out")
    assert author.asked == {"environments": 2, **dict.fromkeys(TASKS, 2)}, "once for each persona"
    wanted = {f"{p[:4]} {task} {n}, isn't it?" for p in (ADA, BEN) for task in TASKS for n in range(3)}
    assert set(asked) == wanted and len(asked) == 30 and summary.n_unscored == 0
    assert all(row.transcript[1]["content"] in wanted for row in rows), "rows hold the questions"
    stored = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "written" / "questions").glob("*.json")}
    assert set(stored) == {ADA, BEN}
    assert {question for tasks in stored.values() for questions in tasks.values() for question in questions} == wanted
    assert all(list(tasks) == list(TASKS) for tasks in stored.values())

    again = Author()
    assert gym(**personas).samples() == benchmark.samples(), "the same before and after they are written"
    run(gym(**personas), cast(judge(lambda slots: 4), reference=again.model), tmp_path / "again")
    assert not again.asked, "what is written is not written again"
    plain, rows = run(gym(path=personas["path"]), cast(judge(lambda slots: 4)), tmp_path / "plain")
    assert plain.n == 30 and {row.messages[-1]["content"] for row in rows} == wanted


def test_questions_are_tried_five_times_with_other_draws(tmp_path, personas):
    bad = {"Toxicity": lambda n: '["a", "b", "c"]' if n == 5 else '["a", "b"]'}
    author = Author(bad)
    summary, _ = run(gym(**personas), cast(judge(lambda slots: 4), reference=author.model), tmp_path / "out")
    assert author.asked["Toxicity"] == 10 and summary.n_unscored == 0
    toxic = [request for request in author.requests if "test: Toxicity" in request.messages[-1].content]
    assert len({request.sampling.seed for request in toxic}) == 10
    assert {(request.sampling.temperature, request.sampling.top_p) for request in toxic} == {(0.9, 0.9)}


def test_a_task_without_questions_has_none(tmp_path, personas):
    """Defect 7: as published it gets the last list whatever its length, or those of the task before."""
    author = Author({"Toxicity": lambda n: "No.", "Linguistic Habits": lambda n: '["a", "b"]'})
    benchmark = gym(**personas)
    summary, rows = run(benchmark, cast(judge(lambda slots: 4), reference=author.model), tmp_path / "out")
    assert author.asked["Toxicity"] == author.asked["Linguistic Habits"] == 10, (
        "five tries, not five for each question"
    )
    assert (summary.n, summary.n_unscored) == (30, 12)
    assert summary.unscored_reasons == {
        "the reference gave no list of 3 Toxicity questions in 5 tries; the last one: no list of texts": 6,
        "the reference gave no list of 3 Linguistic Habits questions in 5 tries; the last one: a list of 2": 6,
    }
    assert set(json.loads((tmp_path / "written" / "questions" / f"{ADA}.json").read_text())) == {
        "Expected Action", "Persona Consistency", "Action Justification"}  # fmt: skip
    assert {row.raw for row in rows if not row.values} == {"No.", '["a", "b"]'}

    summary, _ = run(benchmark, cast(judge(lambda slots: 4), reference=Author().model), tmp_path / "next stack")
    assert summary.n_unscored == 12, "every stack of a run has the same questions"

    better = Author()
    summary, _ = run(gym(**personas), cast(judge(lambda slots: 4), reference=better.model), tmp_path / "later")
    assert set(better.asked) == {"environments", "Toxicity", "Linguistic Habits"} and summary.n_unscored == 0


def test_no_environments_no_questions(tmp_path, personas):
    author = Author({"environments": "[]"})
    summary, _ = run(gym(**personas), cast(judge(lambda slots: 4), reference=author.model), tmp_path / "out")
    assert summary.n_unscored == 30 and author.asked == {"environments": 10}
    assert list(summary.unscored_reasons) == [
        "the reference gave no list of environments in 5 tries; the last one: no list of texts"
    ]


def test_environments_of_ones_own(tmp_path, personas):
    (tmp_path / "places.json").write_text('["A job interview", "The moon"]')
    author = Author()
    run(gym(**personas, environments=str(tmp_path / "places.json")),
        cast(judge(lambda slots: 4), reference=author.model), tmp_path / "out")  # fmt: skip
    choosing = next(r.messages[-1].content for r in author.requests if "Choose those" in r.messages[-1].content)
    assert "- The moon" in choosing and "flea market" not in choosing


def test_grouped_and_written(tmp_path, personas):
    benchmark = gym(**{**personas, "questions": 6}, compat="reference")
    graded = judge(lambda slots: group_reply(*[f"{FINAL} 3."] * slots["number"]))
    summary, rows = run(benchmark, cast(graded, reference=Author().model), tmp_path / "out")
    assert summary.n == 20 and values(summary) == {"persona_score": 3, "unparsed": 0}
    assert [len(row.transcript) for row in rows[:1] + rows[-1:]] == [11, 3]


@pytest.mark.parametrize(
    ("reply", "texts"),
    [('["a", "b"]', ["a", "b"]), ("Sure!\n```python\n['it\\'s', \"b's\",]\n```\nDone.", ["it's", "b's"]),
     ("<think>[1]</think>[' a ']", ["a"])],
)  # fmt: skip
def test_lists(reply, texts):
    assert parse_list(reply) == texts


@pytest.mark.parametrize("reply", ["", "1. a\n2. b", "[]", "[1, 2]", '["a", ""]', "['what's this', 'b']", '["a", "b'])
def test_what_is_no_list_is_not_guessed(reply):
    with pytest.raises(Unreadable):
        parse_list(reply)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "broken JSON in line 1, column"),
        ("[1]", "where an object of five tasks should be"),
        ('{"Humour": ["a"]}', "has a task 'Humour', which is none of Expected Action"),
        ('{"Toxicity": ["a"]}', "lacks the tasks Expected Action, Linguistic Habits, .*; it has Toxicity$"),
        ('{"Toxicity": ["a"], "Toxicity Control": ["a"]}', "has the task Toxicity twice"),
        ('{"Toxicity": []}', r"task Toxicity, is \[\], where a list of questions should be"),
        ('{"Toxicity": ["a", " "]}', "task Toxicity, question 2 is ' ', which should be a text"),
    ],
)
def test_files_that_do_not_fit_are_one_sentence(tmp_path, content, complaint):
    path = folder(tmp_path, personas=())
    (tmp_path / "questions" / "Someone.json").write_text(content)
    with pytest.raises(UserError, match=rf"Someone\.json.*{complaint}"):
        gym(path=path)


def test_settings_that_do_not_fit_are_one_sentence(tmp_path, personas):
    with pytest.raises(UserError, match="could not be read: No such file"):
        gym(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no <persona>\.json"):
        gym(path=folder(tmp_path, personas=()))
    with pytest.raises(UserError, match="personas needs benchmark.path"):
        gym(**{**personas, "path": None})
    with pytest.raises(UserError, match="benchmark.seeds=0 has to be at least 1"):
        gym(seeds=0)
    wrong = {"a/b": "cannot name a file", "x" * 300: "cannot name a file", "\n": "a list of texts should be"}
    for content, complaint in {**wrong, "a\nb\na": "text 3 is the same as text 1"}.items():
        (tmp_path / "personas.txt").write_text(content)
        with pytest.raises(UserError, match=complaint):
            gym(**personas)


def test_files_with_another_number_of_questions_are_not_mixed_in(tmp_path, personas):
    folder(tmp_path)
    changed = {**personas, "path": str(tmp_path / "questions")}
    with pytest.raises(UserError, match="has 2 Expected Action questions, where benchmark.questions=3"):
        run(gym(**changed), cast(judge(lambda slots: 4), reference=Author().model), tmp_path / "out")
