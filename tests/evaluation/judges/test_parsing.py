"""What a reply says, by hand: golden replies, hostile ones, and every decoration a model puts around its answer."""

from __future__ import annotations

import contextlib
import itertools
import time

import pytest

from persona.evaluation.judges.parsing import (
    Unreadable,
    parse_choice,
    parse_integer,
    parse_json,
    parse_json_list,
    parse_number,
    parse_yes_no,
    strip_markdown,
    strip_reasoning,
)

AFTER = "final score is"


# --- numbers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Therefore, the final score is 4.", 4),
        ("therefore, the FINAL SCORE is: **4**", 4),  # the published regex wants this sentence letter by letter
        ("The final score is 4/5", 4),
        ("the final score is 4 out of 5.", 4),
        ("the final score is:\n\n4", 4),
        ("| final score | 4 |", 4),
        ("the final score is `4` (good, but no more)", 4),
        ("the final score is $\\boxed{4}$", 4),
        ("the final score is four.", 4),
        ("The final score is 4. So the final score is 4.", 4),
        ("The final score is determined by 3 criteria. The final score is 2.", 2),
        ("最终得分是４分。", 4),
        ("4", 4),
        ("**4/5**", 4),
        ("4.0", 4),
        ("<think>Perhaps the final score is 2.</think>The final score is 5", 5),
    ],
)
def test_a_score_behind_the_phrase_that_was_asked_for(reply, score):
    assert parse_integer(reply, 1, 5, AFTER) == score


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Therefore, the final score is 45.", "45 is not on the scale from 1 to 5"),  # published: 45
        ("Therefore, the final score is 4.5.", "4.5 is no whole number"),  # published: 4
        ("Therefore, the final score is -4.", "-4 is not on the scale"),
        ("Therefore, the final score is 4,5.", "more than one way"),
        ("Therefore, the final score is 4½.", "no number stands after 'final score is'"),
        ("The final score is 3. No: the final score is 4.", "several different scores: 3, 4"),
        ("The final score is 3 or 4.", "'3 or 4' is more than one number"),
        ("The final score is 3-4.", "'3-4' is more than one number"),
        ("The final score is 8/10.", "'8/10' is on another scale than 1 to 5"),
        ("The final score is good.", "no number stands after"),
        ("It gives 3 facts about the persona and", "no number stands after"),  # cut off before its score
        ("I can't say the final score is 4.", "no number stands after"),
        ("<think>The final score is 4", "no answer outside its reasoning"),
        ("", "the reply is empty"),
        (" \n", "the reply is empty"),
    ],
)
def test_no_score_is_guessed(reply, reason):
    with pytest.raises(Unreadable) as caught:
        parse_integer(reply, 1, 5, AFTER)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("On a scale of 1 to 5, I'd say 4", 4),  # the first digit is 1
        ("On a 5-point scale: 4", 4),
        ("I'd rate it 4 stars out of 5.", 4),
        ("Score (1-5): 4\nReason: 3 of the 2 traits", 4),
        ("1. Clear\n2. Warm\nScore: 3", 3),
        ("Score: 3. On reflection, final score: 4", 4),
        ('```json\n{"score": 4}\n```', 4),
        ("Rating: [[4]], since 2 traits show", 4),
        ("<score>4</score>", 4),
        ("评分：4分", 4),
        ("得分为四分。", 4),
    ],
)
def test_a_score_without_a_phrase(reply, score):
    assert parse_integer(reply, 1, 5) == score


@pytest.mark.parametrize(
    "reply",
    [
        "4.5",
        "-1",
        "10",
        "3/3",
        "I'd give 3 or 4",
        "4th",
        "GPT-4",
        "Rating: ★★★★",
        "2+2",
        "It names 3 facts",
        "It names 3 facts: the",
    ],
)
def test_no_score_without_a_phrase(reply):
    with pytest.raises(Unreadable):
        parse_integer(reply, 1, 5)


def test_numbers_with_fractions_and_signs():
    assert parse_number("Score: 7.5/10", 0, 10) == 7.5
    assert parse_number("0.5", 0, 1) == 0.5
    assert parse_number("1,234.5", 0, 2000) == 1234.5
    assert parse_integer("80%", 0, 100) == 80
    assert parse_integer("Score: -1", -2, 2) == -1
    assert parse_integer("Score: −1", -2, 2) == -1  # a minus sign, not a hyphen
    assert parse_integer("Score - 1", -2, 2) == 1
    with pytest.raises(Unreadable, match="not on the scale from 0 to 1"):
        parse_number("I give it 1.01.", 0, 1)


# --- choices ------------------------------------------------------------------------------------------------------
LETTERS = ("A", "B", "C", "D")


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A", "A"),
        ("a.", "A"),
        ("(b)", "B"),
        ("<B>", "B"),
        ("「B」", "B"),
        ("Option C.", "C"),
        ("Answer: B", "B"),
        ("The answer is (b).", "B"),
        ("The correct answer is: C) Paris", "C"),
        ("Answer: A or something like it", None),
        ("The answer is A because B fails.", "A"),
        ("The answer is B, not A.", "B"),
        ("B) Paris", "B"),
        ("B. Response A fails the second test.", "B"),
        ("Option B. Paris", "B"),
        ("Option 2: no", None),
        ("Response B wins.", "B"),
        ("Option a is wrong, so (c)", "C"),
        ("They like tea, not coffee: the quiet tea room (d).", "D"),
        ("Because (a) it is short and (b) it is kind, so (c)", None),
        ("Response A is clearly the best.", "A"),
        ("B\n\nExplanation: Response A is bad.", "B"),
        ("Let me see.\n\nB", "B"),
        ("I prefer response A.", "A"),
        ("I think it is B.", "B"),
        ("Option b is better.", "B"),
        ("I choose C because it is short.", "C"),
        ("not B but A", "A"),
        ("The answer is not B but A.", "A"),
        ("Answer: A\nWait. Final answer: B", "B"),
        ("Reasoning: A is bad at this. Answer: B", "B"),
        ('{"reason": "A is bad", "choice": "B"}', "B"),
        ("[[A]]", "A"),
        ("So it is $\\boxed{\\text{D}}$", "D"),
        ("<answer>B</answer>", "B"),
        ("答案：B", "B"),
        ("我选B，因为更好。", "B"),
        ("答案不是B而是A", "A"),
        ("最终答案是（C）", "C"),
        # nothing, or no telling; cut off before the verdict, too
        ("Response A is a well written reply that", None),
        ("Response A: it is well written.\nIt", None),
        ("**Response A**\nIt has two flaws.", None),
        ("Option A: Paris is a city.\nIt", None),
        ("Response A has 2 flaws.", None),
        ("Not A.", None),
        ("The answer is not B.", None),
        ("I don't think the answer is B.", None),
        ("If the answer is B, so be it.", None),
        ("A good reply.", None),
        ("Bad", None),
        ("Both", None),
        ("The answer is a matter of taste.", None),
        ("answer: a matter of taste", None),
        ("I agree with a friend", None),
        ("Vitamin C is good.", None),
        ("A or B", None),
        ("Answer: A, C", None),
        ("Answer: B and C", None),
        ("A, B and C are wrong.", None),
        ("A) one\nB) two", None),
        ("Response A is better than Response B.", None),
        ("A is no better than B.", None),
        ("Response B is not better than Response A.", None),
        ("Final answer: A. Final answer: B.", None),
        ("<think>A? No, B.", None),
        ("", None),
    ],
)
def test_a_letter(reply, choice):
    if choice is None:
        with pytest.raises(Unreadable):
            parse_choice(reply, LETTERS)
    else:
        assert parse_choice(reply, LETTERS) == choice


STANCES = ("AGREE", "DISAGREE", "PARTIALLY AGREE", "PARTIALLY DISAGREE")


@pytest.mark.parametrize(
    ("reply", "stance"),
    [
        ("agree", "AGREE"),
        ("Partially agree.", "PARTIALLY AGREE"),
        ("I partially  disagree with that.", "PARTIALLY DISAGREE"),
        ("**Stance:** disagree", "DISAGREE"),
        ("I disagree.", "DISAGREE"),
        ("I do not agree.", None),  # published: AGREE
        ("I disagree, though some agree.", None),  # published: AGREE
        ("Disagreeable", None),
    ],
)
def test_words_are_found_whole_and_the_longest_first(reply, stance):
    if stance is None:
        with pytest.raises(Unreadable):
            parse_choice(reply, STANCES)
    else:
        assert parse_choice(reply, STANCES) == stance


def test_other_choices():
    assert parse_choice("我不同意", ("同意", "不同意")) == "不同意"
    assert parse_choice("It reads human to me.", ("human", "machine")) == "human"
    for reply in ("It reads non-human to me.", "It is not human.", "Human or machine?"):
        with pytest.raises(Unreadable):
            parse_choice(reply, ("human", "machine"))
    with pytest.raises(Unreadable):
        parse_choice("There is no doubt.", ("yes", "no", "maybe"))
    assert parse_choice("I pick 1.", ("1", "2")) == "1"
    assert parse_choice("答案：是", ("是", "否")) == "是"
    with pytest.raises(Unreadable):
        parse_choice("1.5", ("1", "2"))
    with pytest.raises(ValueError, match="differ"):
        parse_choice("a", ("A", "a"))
    with pytest.raises(ValueError, match="choices"):
        parse_choice("a", ())


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Yes", True),
        ("yes.", True),
        ("No, it does not.", False),
        ("Yes, there is no contradiction.", True),
        ("**No**", False),
        ("It wanders.\nNo.", False),
        ("Answer: Yes", True),
        ("Final answer: FALSE", False),
        ("是的。", True),
        ("不是", False),
        ("答案：是", True),
        ("No doubt, yes!", None),
        ("Yes and no", None),
        ("Yes, but no.", None),
        ("There is no mention of it.", None),
        ("The answer is not yes.", None),
        ("Nothing", None),
    ],
)
def test_yes_or_no(reply, answer):
    if answer is None:
        with pytest.raises(Unreadable):
            parse_yes_no(reply)
    else:
        assert parse_yes_no(reply) is answer


# --- JSON ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Here it is, {name}:\n```json\n{"a": 1,}\n```\nDone.', {"a": 1}),
        ("{'a': True, 'b': None}", {"a": True, "b": None}),
        ("{a: 1}", {"a": 1}),
        ('{"a": {"b": 1}, }', {"a": {"b": 1}}),
        ('{"a": "x "y" z"}', {"a": 'x "y" z'}),
        ('<think>{"a": 2}</think>{"a": 1}', {"a": 1}),
        ('{"a": 1}\nAgain: {"a": 1}', {"a": 1}),
        ('As told [1]: {"a": 1}', {"a": 1}),
        ('{"a": "**bold** stays"}', {"a": "**bold** stays"}),
    ],
)
def test_json(reply, value):
    assert parse_json(reply) == value


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ('{"a": 1} or {"a": 2}', "2 different pieces"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": 1', "cut off"),
        ('{"a": NaN}', "NaN"),
        ("[1, 2]", "not an object"),
        ("no", "no JSON"),
        ("", "empty"),
    ],
)
def test_no_json(reply, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_json(reply)


def test_json_lists():
    assert parse_json_list('["a", "b",]') == ["a", "b"]
    assert parse_json_list('A [link](x), then\n[{"a": 1}]') == [{"a": 1}]
    for reply, reason in (('{"items": ["a"]}', "not a list"), ('["a"', "cut off"), ("- a\n- b", "no JSON")):
        with pytest.raises(Unreadable, match=reason):
            parse_json_list(reply)


# --- what is looked through ---------------------------------------------------------------------------------------
def test_reasoning_is_taken_away():
    assert strip_reasoning("<think>one</think>two") == "two"
    assert strip_reasoning("<Thinking>\none\n</Thinking>\n two <think>three</think>") == "two"
    assert strip_reasoning("one</think>\n\ntwo") == "two"  # the prompt held the opening tag
    assert strip_reasoning("zero <think>one") == "zero"
    channels = "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>final<|message|>two<|return|>"
    assert strip_reasoning(channels) == "two"
    assert strip_reasoning("<|channel|>analysis<|message|>one") == ""
    assert strip_reasoning("I <b>think</b> so") == "I <b>think</b> so"


def test_markdown_is_taken_away_and_arithmetic_is_not():
    assert strip_markdown("## **Score**\n> - `4`\n```\nfour\n```") == "Score\n4\n\nfour"
    assert (
        strip_markdown("2*3*4 and snake_case_name and *this* and _that_")
        == "2*3*4 and snake_case_name and this and that"
    )
    assert strip_markdown("-4") == "-4"
    assert strip_markdown("1. one") == "1. one"


INNER = ("{}", "**{}**", "*{}*", "__{}__", "`{}`", "({})", "[{}]", '"{}"', "“{}”", "【{}】", "<b>{}</b>")
THOUGHT = "<think>It is 1, or A. No.</think>\n{}"
OUTER = ("{}", "{}.", "{}。", "> {}", "- {}", "### {}", "```\n{}\n```", "  {}\n\n", THOUGHT)
WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


@pytest.mark.parametrize("shape", [str, str.upper, str.lower, lambda text: text.translate(WIDE)])
@pytest.mark.parametrize(
    ("announce", "answer", "parse", "value"),
    [
        ("Therefore, the final score is {}", "4", lambda reply: parse_integer(reply, 1, 5, AFTER), 4),
        ("Score: {}", "4", lambda reply: parse_integer(reply, 1, 5), 4),
        ("{}", "3.5", lambda reply: parse_number(reply, 0, 10), 3.5),
        ("Reasoning: it is B-like. Answer: {}", "C", lambda reply: parse_choice(reply, LETTERS), "C"),
        ("My final answer is {}", "partially agree", lambda reply: parse_choice(reply, STANCES), "PARTIALLY AGREE"),
        ("Answer: {}", "yes", parse_yes_no, True),
    ],
)
def test_a_verdict_is_the_same_under_any_decoration(announce, answer, parse, value, shape):
    # The shape is put on what the model says, and markup stays as it is.
    said, about = shape(answer), shape(announce.replace("{}", "\0"))
    for number, (first, outer, other) in enumerate(itertools.product(INNER, OUTER, OUTER)):
        if outer.startswith("<") and other != "{}":
            continue  # reasoning comes first in a reply
        answer_in = first.format(INNER[number % len(INNER)].format(said))
        reply = other.format(outer.format(about.replace("\0", answer_in)))
        assert parse(reply) == value, reply


@pytest.mark.parametrize(
    "piece",
    [" ", "*", "**", "[", "(", "{", "1", "1,", "A ", "> ", "<b>", "<think>", "not ", "answer: ", "the answer is ",
     "final score is ", '{"a":', "word ", "I like B. "],
)  # fmt: skip
def test_hostile_replies_take_no_time(piece):
    # Repetition within repetition in a pattern would take minutes for these. Processor time: others may be busy too.
    reply = piece * (4000 // len(piece))
    started = time.process_time()
    for parse in (
        lambda reply: parse_integer(reply, 1, 5, AFTER),
        lambda reply: parse_integer(reply, 1, 5),
        lambda reply: parse_choice(reply, LETTERS),
        parse_yes_no,
        parse_json,
    ):
        with contextlib.suppress(Unreadable):
            parse(reply)
    assert time.process_time() - started < 2
