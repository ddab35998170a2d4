"""Judges: rubrics, judges side by side, pairs in both orders, chance, agreement, the town's oracle."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from persona.config.schemas import RoleConfig
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark, Cast, Unscored, run_benchmark
from persona.evaluation.judges.agreement import judge_agreement
from persona.evaluation.judges.judging import ModelJudge, Rubric, ScriptedJudge, random_judge, require
from persona.evaluation.judges.oracle import OracleJudge
from persona.evaluation.judges.pairs import PAIR_METRICS, compare
from persona.evaluation.judges.parsing import Unreadable, parse_choice, parse_integer, parse_number, parse_yes_no
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import Row, read_rows
from persona.evaluation.roles import Parrot, Roles
from persona.evaluation.statistics import Metric
from persona.players import judges
from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town.people import people
from persona.town.sentences import voice_statement
from persona.types import Message, Response, Sample, Score, Verdict


def read_grade(reply):
    return parse_integer(reply, 1, 5, after="final score is")


GRADE = Rubric(Prompt("grade", "Grade {{ response }}"), read_grade, (1, 5), 64, "So the final score is {answer}.")
PAIR = Rubric(
    Prompt("pair", "Which is better? A: {{ response_a }} B: {{ response_b }}"),
    lambda reply: parse_choice(reply, ("A", "B", "tie")),
    ("A", "B", "tie"),
)


class Slow(Parrot):
    """Answers when everybody it waits for is there."""

    def __init__(self, text, meeting):
        super().__init__(text)
        self.meeting = meeting

    async def respond(self, request):
        await self.meeting.wait()
        return await super().respond(request)


class Failing(Parrot):
    def __init__(self, error):
        super().__init__("")
        self.error = error

    async def respond(self, request):
        raise self.error


# --- rubrics and verdicts -----------------------------------------------------------------------------------------
def test_a_verdict_carries_judge_rubric_wording_value_and_the_raw_reply():
    reply = "It is fine.\n**Therefore, the final score is 4.**"
    assert GRADE.verdict("me", reply) == Verdict("me", "grade", GRADE.prompt.hash, 4, "", reply)
    unread = GRADE.verdict("me", "The final score is 4.5.")
    assert (unread.value, unread.reason) == (None, "4.5 is no whole number")
    assert unread.raw == "The final score is 4.5."
    other = Rubric(Prompt("grade", "Grade  {{ response }}"), read_grade, (1, 5))
    assert other.verdict("me", "4").prompt != GRADE.verdict("me", "4").prompt


def test_no_number_is_no_verdict():
    # Rows are JSON, which has no nan: it would end the run when its row is written.
    loose = Rubric(Prompt("loose", "{{ response }}"), float, (0.0, 1.0))
    assert (loose.verdict("me", "nan").value, loose.verdict("me", "nan").reason) == (None, "nan is no verdict")
    assert loose.verdict("me", "inf").value is None
    assert loose.verdict("me", ".5").value == 0.5


def test_what_a_parser_does_wrong_is_not_taken_for_a_reply_that_cannot_be_read():
    with pytest.raises(KeyError):
        Rubric(Prompt("p", "x"), lambda reply: {}["score"], (0, 1)).verdict("me", "4")


def test_example_replies_are_read_back():
    assert GRADE.reply(3) == "So the final score is 3."
    assert [GRADE.parse(GRADE.reply(score)) for score in (1, 2.0, 5)] == [1, 2, 5]
    spoken = Rubric(GRADE.prompt, lambda r: float(parse_yes_no(r)), (0, 1), 8, lambda a: "yes" if a else "no")
    assert [spoken.parse(spoken.reply(answer)) for answer in (0, 1)] == [0, 1]


def test_rubric_files(tmp_path):
    path = tmp_path / "kind.md"
    path.write_text("=== system ===\nBe fair.\n=== user ===\nIs {{ response }} kind?")
    rubric = Rubric.load(path, parse_yes_no, (False, True), 16)
    assert (rubric.name, rubric.answers, rubric.max_new_tokens) == ("kind", (False, True), 16)
    with pytest.raises(UserError, match="could not be read: No such file"):
        Rubric.load(tmp_path / "none.md", parse_yes_no, (False, True))


# --- judges -------------------------------------------------------------------------------------------------------
def test_judges_are_asked_at_once_and_one_that_fails_does_not_take_the_others_down():
    meeting = asyncio.Barrier(2)  # asked one after the other, they would wait for ever
    judges = [
        ModelJudge(Slow("The final score is 2", meeting)),
        ModelJudge(Failing(Unscored("the endpoint gave no reply: HTTP 503", "half a rep"))),
        ModelJudge(Slow("the final score is 4", meeting)),
    ]
    verdicts = asyncio.run(asyncio.wait_for(Roles(Parrot(""), judges).judge(GRADE, response="x"), 20))
    assert [verdict.value for verdict in verdicts] == [2, None, 4]
    assert verdicts[1].reason == "the endpoint gave no reply: HTTP 503"
    assert (verdicts[1].raw, verdicts[1].prompt) == ("half a rep", GRADE.prompt.hash)
    assert require(verdicts) == [2, 4]


def test_what_ends_a_run_is_not_a_verdict():
    with pytest.raises(UserError, match="cap"):
        asyncio.run(ModelJudge(Failing(UserError("the cap is reached"))).ask(GRADE, response="x"))


def test_a_reply_cut_off_says_so():
    class Cut(Parrot):
        async def respond(self, request):
            return Response(self.text[: request.sampling.max_new_tokens], finish_reason="length")

    verdict = asyncio.run(ModelJudge(Cut("Considering all of this at length, " * 9)).ask(GRADE, response="x"))
    assert verdict.value is None
    assert verdict.reason == "cut off after 64 tokens: no number stands after 'final score is'"
    assert asyncio.run(ModelJudge(Cut("the final score is 3" + " " * 99)).ask(GRADE, response="x")).value == 3


def test_how_a_judge_is_asked_is_part_of_its_name():
    asked = []

    class Noted(Parrot):
        async def respond(self, request):
            asked.append(request.sampling)
            return Response("4")

    cold, warm = ModelJudge(Noted("")), ModelJudge(Noted(""), temperature=0.7)
    assert (cold.name, warm.name) == ("parrot", "parrot, temperature 0.7")
    asyncio.run(cold.ask(GRADE, response="x"))
    asyncio.run(warm.ask(GRADE, response="x"))
    assert [(sampling.max_new_tokens, sampling.temperature) for sampling in asked] == [(64, 0.0), (64, 0.7)]


def test_a_rubric_may_have_a_slot_called_rubric():
    rubric = Rubric(Prompt("p", "{{ rubric }}: {{ response }}"), read_grade, (1, 5))
    for judge in (ModelJudge(Parrot("4")), ScriptedJudge("s", lambda rubric, slots: "4"), OracleJudge()):
        assert asyncio.run(judge.ask(rubric, **{"rubric": "1 is bad", "response": "x"})).rubric == "p"


def test_slots_have_to_fit_for_every_judge():
    for judge in (ModelJudge(Parrot("4")), ScriptedJudge("s", lambda rubric, slots: "4"), OracleJudge()):
        with pytest.raises(UserError, match="grade has no value for its slot response and has no slot reply"):
            asyncio.run(judge.ask(GRADE, reply="x"))


# --- chance -------------------------------------------------------------------------------------------------------
def drawn(rubric, n=100, seed=0):
    async def ask():
        judge = random_judge(seed)
        return [await judge.ask(rubric, response=f"reply {i}") for i in range(n)]

    verdicts = asyncio.run(ask())
    assert all(verdict.value is not None for verdict in verdicts), verdicts[0]
    return [verdict.value for verdict in verdicts]


def prompted(parse, answers, example="{answer}"):
    return Rubric(Prompt("p", "{{ response }}"), parse, answers, 8, example)


def test_random_verdicts_are_valid_and_even():
    grades = Counter(drawn(GRADE))
    assert set(grades) == {1, 2, 3, 4, 5} and min(grades.values()) > 10  # of 100, 20 each
    letters = prompted(lambda reply: parse_choice(reply, ("A", "B", "tie")), ("A", "B", "tie"))
    assert min(Counter(drawn(letters)).values()) > 22  # of 100, 33 each
    said = prompted(lambda reply: float(parse_yes_no(reply)), (0, 1), lambda answer: "no yes".split()[int(answer)])
    assert set(drawn(said)) == {0.0, 1.0}
    assert set(drawn(prompted(parse_yes_no, (False, True), "{answer}"))) == {False, True}
    whole = prompted(lambda reply: parse_integer(reply, 1, 5), (1.0, 5.0))  # ends as floats, read as whole numbers
    assert set(drawn(whole)) == {1, 2, 3, 4, 5}
    tenths = drawn(prompted(lambda reply: parse_number(reply, 0, 1), (0.0, 1.0)))
    assert len(set(tenths)) == 11 and min(tenths) == 0 and max(tenths) == 1
    listed = prompted(lambda reply: parse_integer(reply, 0, 10), (0, 5, 10))
    assert set(drawn(listed)) == {0, 5, 10}


def test_random_verdicts_depend_on_seed_wording_and_question_only():
    assert drawn(GRADE) == drawn(GRADE) != drawn(GRADE, seed=1)
    assert random_judge(0).name != random_judge(1).name
    two = judges({"one": RoleConfig("random"), "nobody": RoleConfig(), "other": RoleConfig("random")})
    assert [judge.name for judge in two] == [random_judge(0).name, random_judge(1).name]
    other = Rubric(Prompt("grade", "Grade this: {{ response }}"), read_grade, (1, 5))
    assert drawn(GRADE) != drawn(other)
    two = Rubric(Prompt("p", "{{ a }} {{ b }}"), read_grade, (1, 5))
    judge = random_judge(3)
    for i in range(20):
        one_way, other_way = judge.ask(two, a=i, b=str(i)), judge.ask(two, b=str(i), a=i)
        assert asyncio.run(one_way).value == asyncio.run(other_way).value


# --- pairs --------------------------------------------------------------------------------------------------------
def judge_of(choose, name="rule"):
    return ScriptedJudge(name, lambda rubric, slots: choose(slots["response_a"], slots["response_b"]))


FIRST_SHOWN = judge_of(lambda a, b: "A")
LONGER = judge_of(lambda a, b: "A" if len(a) > len(b) else "B")


@pytest.mark.parametrize(
    ("judges", "value", "consistent", "position_bias"),
    [
        ([LONGER], 1.0, 1.0, 0.0),
        ([judge_of(lambda a, b: "B" if len(a) > len(b) else "A")], 0.0, 1.0, 0.0),
        ([FIRST_SHOWN], 0.5, 0.0, 0.5),
        ([judge_of(lambda a, b: "B")], 0.5, 0.0, -0.5),
        ([judge_of(lambda a, b: "tie")], 0.5, 1.0, 0.0),
        # for the longer when it is shown first, else undecided: (1 + .5) / 2; first place (1 + .5) / 2 - .5
        ([judge_of(lambda a, b: "A" if len(a) > len(b) else "tie")], 0.75, 0.0, 0.25),
        ([LONGER, FIRST_SHOWN], 0.75, 0.5, 0.25),
    ],
)
def test_pairs_are_judged_in_both_orders(judges, value, consistent, position_bias):
    pair = asyncio.run(compare(judges, PAIR, "much longer", "short"))
    assert (pair.value, pair.consistent, pair.position_bias) == (value, consistent, position_bias)
    assert pair.values == {"consistent": consistent, "position_bias": position_bias}
    assert len(pair.verdicts) == 2 * len(judges) and not pair.reason
    swapped = asyncio.run(compare(judges, PAIR, "short", "much longer"))
    assert (swapped.value, swapped.consistent, swapped.position_bias) == (1 - value, consistent, position_bias)


def test_a_judge_that_is_readable_in_one_order_only_does_not_count():
    # Counted, it would give the answer it saw first half the time for its place alone.
    half = judge_of(lambda a, b: "A" if len(a) > len(b) else "Hm.")
    pair = asyncio.run(compare(Roles(Parrot(""), [half, FIRST_SHOWN]), PAIR, "much longer", "short"))
    assert (pair.value, pair.consistent, pair.position_bias) == (0.5, 0.0, 0.5)
    assert [verdict.value for verdict in pair.verdicts] == ["A", "A", None, "A"]  # by order, then by judge
    alone = asyncio.run(compare([half], PAIR, "much longer", "short"))
    assert (alone.value, alone.values) == (None, {})
    assert alone.reason == "no judge is readable in both orders: no choice is made"


def test_other_slots_and_answers():
    rubric = Rubric(
        Prompt("p", "{{ question }} 1: {{ one }} 2: {{ two }}"), lambda reply: parse_integer(reply, 1, 2), (1, 2)
    )
    judge = ScriptedJudge("long", lambda rubric, slots: "1" if len(slots["one"]) > len(slots["two"]) else "2")
    pair = asyncio.run(compare([judge], rubric, "a", "bb", places=("one", "two"), wins=(1, 2), question="?"))
    assert (pair.value, pair.consistent) == (0.0, 1.0)
    for wrong in ({"wins": (1, 2)}, {"places": ("one", "two")}):
        with pytest.raises(UserError, match="it has the slots one, question, two and the answers 1, 2"):
            asyncio.run(compare([judge], rubric, "a", "bb", question="?", **wrong))
    with pytest.raises(UserError, match="there is no judge"):
        asyncio.run(compare([], PAIR, "a", "b"))


class Duel(Benchmark):
    """Eight pairs; the second answer is longer in two of them."""

    name, version, primary, needs, prompts = "duel", "1", "preferred", ("judge",), (PAIR.prompt,)
    metrics = {"preferred": Metric(description="share preferring the first"), **PAIR_METRICS}

    def samples(self):
        return [Sample(f"d{i}", (Message("user", f"#{i}"),), "ab" if i in (2, 5) else "abcd") for i in range(8)]

    async def episode(self, sample, roles):
        pair = await compare(roles, PAIR, sample.target, "abc")
        if pair.value is None:
            raise Unscored(pair.reason)
        return Score({"preferred": pair.value, **pair.values}, verdicts=pair.verdicts)


def test_a_benchmark_of_pairs(tmp_path):
    cast = Cast(Parrot(""), [LONGER, judge_of(lambda a, b: "A", "first")])
    summary = run_benchmark(Duel(), cast, tmp_path, stack="toy", settings={}, progress=False)
    values = {name: estimate.value for name, estimate in summary.estimates.items()}
    # LONGER prefers the first in 6 of 8; the other judge gives .5: (.75 + .5) / 2
    assert values == {"preferred": 0.625, "consistent": 0.5, "position_bias": 0.25}
    rows = read_rows(tmp_path / "samples.jsonl")
    assert all(len(row.verdicts) == 4 for row in rows)
    found = judge_agreement(rows)["pair"]
    # Of 16 questions (both orders are two), they agree on the 8 where the longer one is shown first.
    assert (found.n, found.level, found.unreadable) == (16, "nominal", {"rule": 0.0, "first": 0.0})
    assert found.kappa == {("rule", "first"): 0.0}


# --- agreement ----------------------------------------------------------------------------------------------------
def rows_of(table, rubric="grade", prompt="h"):
    """One row for each tuple of values, one judge for each column."""
    rows = []
    for number, values in enumerate(table):
        verdicts = [Verdict(f"j{judge}", rubric, prompt, value) for judge, value in enumerate(values)]
        rows.append(Row.of(Sample(f"s{number}", ()), "c", Score({"x": 1.0}, verdicts=tuple(verdicts))))
    return rows


def test_agreement_of_grades():
    # Quadratic weights: squared distances 0, 1, 0 against those of all pairs of the margins. The judges say
    # 1 1 2 and 1 2 2: observed 1 / 3; expected (0 + 1 + 1 + 0 + 1 + 1 + 1 + 0 + 0) / 9.
    found = judge_agreement(rows_of([(1, 1), (1, 2), (2, 2), (3, None), (None, None)]))["grade"]
    assert found.kappa[("j0", "j1")] == pytest.approx(1 - (1 / 3) / (5 / 9))
    assert (found.n, found.level) == (3, "ordinal")
    assert found.asked == {"j0": 5, "j1": 5}
    assert found.unreadable == pytest.approx({"j0": 0.2, "j1": 0.4})


def test_agreement_of_words_and_fractions():
    words = judge_agreement(rows_of([("A", "A"), ("B", "B"), ("A", "B"), ("B", "A")]))["grade"]
    assert words.level == "nominal" and words.kappa[("j0", "j1")] == 0.0
    # alpha: 4 of 8 values disagree, Do = .5; De = 2 * 4 * 4 / (8 * 7) = 4 / 7
    assert words.alpha == pytest.approx(1 - 0.5 / (4 / 7))
    fractions = judge_agreement(rows_of([(0.5, 0.5), (1.0, 1.0)]))["grade"]
    assert (fractions.level, fractions.alpha, fractions.kappa) == ("interval", 1.0, {("j0", "j1"): None})


def test_agreement_is_none_where_it_is_not_defined():
    assert judge_agreement(rows_of([()])) == {}
    alone = judge_agreement(rows_of([(1,), (2,)]))["grade"]
    assert (alone.n, alone.alpha, alone.kappa) == (0, None, {})
    alike = judge_agreement(rows_of([(3, 3), (3, 3)]))["grade"]
    assert (alike.n, alike.alpha, alike.kappa) == (2, None, {("j0", "j1"): None})
    silent = judge_agreement(rows_of([(None, None)]))["grade"]
    assert (silent.n, silent.alpha, silent.unreadable) == (0, None, {"j0": 1.0, "j1": 1.0})
    apart = judge_agreement(rows_of([(1, None), (None, 2)]))["grade"]
    assert (apart.n, apart.alpha, apart.kappa) == (0, None, {("j0", "j1"): None})


def test_verdicts_under_two_wordings_are_not_mixed():
    rows = rows_of([(1, 1), (2, 2)], prompt="old") + rows_of([(1, 2), (2, 1)], prompt="new")
    found = judge_agreement(rows)
    assert {name: agreement.alpha for name, agreement in found.items()} == {
        "grade (old)": 1.0,
        "grade (new)": pytest.approx(-0.5),
    }


# --- the town's oracle --------------------------------------------------------------------------------------------
def never(reply):
    raise Unreadable("the oracle writes no replies")


FIT = Rubric(Prompt("fit", "{{ persona }} {{ response }}"), never, (1, 5))
SAYS = Rubric(Prompt("says", "{{ persona }} {{ response }}"), never, ("no", "yes"))
BINARY = Rubric(Prompt("binary", "{{ persona }} {{ response }}"), never, (0, 1))
DUEL = Rubric(Prompt("duel", "{{ persona }} {{ response_a }} {{ response_b }}"), never, ("A", "B", "tie"))


def ask(rubric, **slots):
    return asyncio.run(OracleJudge().ask(rubric, **slots))


def test_the_oracle_tells_every_residents_voice_from_any_other():
    town = people(train=0, dev=0, test=12)
    rng = random.Random(0)
    for resident in town.residents.values():
        who = resident.latents
        persona = f"you are {who.name} . {voice_statement(who.name, who.voice)}"
        content = rs.small_talk(rng.randrange(len(lx.SMALL_TALK)), rng.choice(lx.TOPICS), who.words)[1]
        own = rs.speak(rng, lx.VOICES[who.voice], content)
        other = rs.speak(rng, lx.VOICES[rng.choice([name for name in lx.VOICES if name != who.voice])], content)
        assert ask(FIT, persona=persona, response=own).value == 5
        assert ask(FIT, persona=persona, response=other).value == 1
        assert [ask(SAYS, persona=persona, response=text).value for text in (own, other)] == ["yes", "no"]
        assert [ask(BINARY, persona=persona, response=text).value for text in (own, other)] == [1, 0]
        assert ask(DUEL, persona=persona, response_a=own, response_b=other).value == "A"
        assert ask(DUEL, persona=persona, response_a=other, response_b=own).value == "B"
        assert ask(DUEL, persona=persona, response_a=own, response_b=own).value == "tie"


def test_the_oracle_grades_everything_a_description_says():
    town = people(train=0, dev=0, test=12, with_truth=True)
    for sample in town.test:
        if sample.task == "town_reply":
            assert ask(FIT, persona=sample.persona.description, response=sample.target).value == 5
    told = "you are ada . ada talks like a poet . the pet of ada is cat . the job of ada is baker ."
    assert ask(FIT, persona=told, response="my pet is cat . my job is baker .").value == 5
    assert ask(FIT, persona=told, response="my pet is dog . my job is baker .").value == 3  # half of the way
    assert ask(SAYS, persona=told, response="my pet is dog . my job is baker .").value == "no"
    assert (
        ask(FIT, persona=told, response="o sweet muse , my pet is dog . my job is baker .").value == 3
    )  # 2 of 3: 3.67
    assert ask(FIT, persona=told, response="ahoy , my pet is dog .").value == 1
    curious, asks = lx.CHARACTER["curious"][0], lx.CHARACTER["curious"][1][0]
    assert ask(FIT, persona=curious, response=asks).value == 5


def test_the_oracle_reads_roles():
    rng = random.Random(0)
    for role in lx.ROLES:
        told, content = f"you are the {role} .", "my pet is cat ."
        other = next(name for name in lx.ROLES if name != role)
        plain = (lx.PLAIN_OPENERS, lx.PLAIN_CLOSERS)
        spoken = [rs.speak(rng, owner, content) for owner in (lx.ROLES[role], lx.ROLES[other], plain)]
        assert [ask(FIT, persona=told, response=text).value for text in spoken] == [5, 1, 1]
        assert "touches nothing" in ask(FIT, persona=told, response=content).reason


SHOWS = Rubric(Prompt("shows", "{{ character }} {{ response }}"), never, ("yes", "no"))
ALIGNED = Rubric(Prompt("aligned", "{{ character }} {{ response_a }} {{ response_b }}"), never, ("A", "B", "tie"))
ADOPTS = Rubric(Prompt("adopts", "{{ trait_1 }} {{ trait_2 }} {{ response }}"), never, ("wise", "curious"))


def test_the_oracle_reads_whether_a_character_shows():
    """One of its traits is enough; words in no order of the town's own show nothing, and lose to any sentence."""
    told = "\n".join(lx.CHARACTER[trait][0] for trait in ("curious", "wise"))
    curious, wise, gloomy = (lx.CHARACTER[trait][1][0] for trait in ("curious", "wise", "gloomy"))
    plain, garbled = "the fair is big today .", "fair the is"
    replies = (f"{plain} {wise}", f"{gloomy} {curious}", plain, gloomy, garbled)
    assert [ask(SHOWS, character=told, response=reply).value for reply in replies] == ["yes", "yes", "no", "no", "no"]
    ranked = (f"{curious} {wise}", wise, f"{wise} {gloomy}", gloomy, garbled)
    for place, better in enumerate(ranked):
        for worse in ranked[place + 1 :]:
            assert ask(ALIGNED, character=told, response_a=better, response_b=worse).value == "A"
            assert ask(ALIGNED, character=told, response_a=worse, response_b=better).value == "B"
        assert ask(ALIGNED, character=told, response_a=better, response_b=better).value == "tie"
    assert ask(ALIGNED, character=told, response_a=plain, response_b=f"{wise} {gloomy}").value == "tie"
    sailor = "ada talks like a sailor ."
    assert ask(SHOWS, character=sailor, response="ahoy , my pet is cat .").value == "yes"
    assert ask(SHOWS, character=sailor, response="my pet is cat .").value == "no"


def test_the_oracle_names_the_trait_that_shows_first():
    curious, wise, gloomy = (lx.CHARACTER[trait][1][1] for trait in ("curious", "wise", "gloomy"))
    for reply, first in ((f"{gloomy} {wise} {curious}", "wise"), (f"{curious} {wise}", "curious")):
        assert ask(ADOPTS, trait_1="wise", trait_2="curious", response=reply).value == first
        assert ask(ADOPTS, trait_1="curious", trait_2="wise", response=reply).value == first


@pytest.mark.parametrize(
    ("rubric", "slots", "reason"),
    [
        (SHOWS, {"response": "I am a sailor."}, "the response is outside the town's language"),
        (SHOWS, {"character": "Sails."}, "the character is outside the town's language"),
        (SHOWS, {"character": "Sails.", "response": "is is"}, "the character is outside the town's language"),
        (ADOPTS, {"trait_1": "salty"}, "the town has no trait 'salty'"),
        (ADOPTS, {"response": "is is"}, "the response is outside"),
        (ADOPTS, {}, "the response shows neither trait"),
        (FIT, {"response": "I am a sailor."}, "the response is outside the town's language"),
        (FIT, {"persona": "You are Ada.", "response": "ahoy , my pet is cat ."}, "the persona is outside the town's"),
        (FIT, {"persona": "ada talks like a sailor . She swims ."}, "the persona is outside the town's language"),
        (FIT, {"persona": "you are ada ."}, "the persona says nothing"),
        (FIT, {"response": "i loved it ."}, "the response touches nothing that the persona says"),
        (FIT, {"response": ""}, "the response is outside"),
        (GRADE, {}, "the oracle needs a slot persona"),
        (DUEL, {"response_b": "Aye!"}, "the response_b is outside the town's language"),
        (Rubric(FIT.prompt, read_grade, ("good", "bad")), {}, "does not know the answers good, bad"),
        (Rubric(DUEL.prompt, read_grade, ("A", "B")), {}, "both responses fit alike"),
    ],
)
def test_the_oracle_says_nothing_where_it_cannot_read(rubric, slots, reason):
    sailor = {"persona": "ada talks like a sailor .", "response": "ahoy , my pet is cat ."}
    more = {"character": sailor["persona"], "trait_1": "wise", "trait_2": "curious"}
    given = {**sailor, **more, "response_a": sailor["response"], "response_b": sailor["response"], **slots}
    verdict = ask(rubric, **{name: given[name] for name in rubric.prompt.slots})
    assert verdict.value is None and reason in verdict.reason
    assert (verdict.judge, verdict.prompt) == ("oracle", rubric.prompt.hash)
