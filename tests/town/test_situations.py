"""Situations of the town: truth that can be read back, splits that share nothing, what is new in the test split."""

from collections import Counter

import pytest

from persona import data
from persona.data.situations import POLES, TRAITS, expert_vector_of, traits_of
from persona.errors import UserError
from persona.town import lexicon as lx
from persona.town import oracle, reading, situations
from persona.town.grammar import vocabulary


@pytest.fixture(scope="module")
def town():
    return situations.situations()


def test_every_word_is_the_lms_and_every_reply_shows_what_is_called_for(town):
    words = set(vocabulary())
    assert reading.question(f"the exam is next week . {lx.SITUATION_QUESTION}").kind == "situation"
    for one in (one for split in town.values() for one in split):
        assert set(one.question.split()) <= words
        assert oracle.trait_levels(one.reply) == one.calls
        if one.kind == "neutral":
            assert not one.calls and reading.question(one.question).kind in ("talk", "task")
        else:  # none of the situations that the LM was trained on
            assert one.calls and reading.question(one.question) is None


def test_the_call_follows_from_the_three_cues():
    pattern = (("extraversion", 1), ("agreeableness", -1), ("conscientiousness", -1))
    for cue, call, word in zip(situations.CUES, pattern, ("festival", "guard", "tomorrow"), strict=True):
        assert word in cue[call]
    assert situations.calls_of(pattern) == {"extraversion": 1, "agreeableness": -1, "conscientiousness": -1}
    assert situations.calls_of((None, None, None)) == {} and len(situations.patterns()) == 5 * 5 * 3 - 1
    for cue in situations.CUES:
        words = [word for group in cue.values() for word in group]
        assert len(set(words)) == len(words)
    poles = {call for cue in situations.CUES for call in cue if call}
    assert poles == {(trait, level) for trait in lx.BIG_FIVE for level in (1, -1)}


def cues(one: situations.Situation) -> tuple[str, ...]:
    padded = f" {one.question} "
    return tuple(
        next(word for group in cue.values() for word in group if f" {word} " in padded) for cue in situations.CUES
    )


def pattern(one: situations.Situation):
    return tuple(sorted(one.calls.items()))


def test_splits_share_no_combination_and_the_test_is_new_in_three_ways(town):
    assert {split: len(rows) for split, rows in town.items()} == {"test": 375, "dev": 75, "train": 600}
    assert Counter(one.kind for one in town["test"]) == {"combination": 100, "pattern": 100, "wording": 100,
                                                         "neutral": 75}  # fmt: skip
    called = {split: [one for one in rows if one.calls] for split, rows in town.items()}
    combinations = [cues(one) for rows in called.values() for one in rows]
    assert len(set(combinations)) == len(combinations) == 840
    neutral = {split: {one.question for one in rows if not one.calls} for split, rows in town.items()}
    assert len(set.union(*neutral.values())) == sum(map(len, neutral.values()))
    known = {pattern(one) for one in called["train"]}
    for one in called["test"]:
        assert (pattern(one) in known) == (one.kind != "pattern")
    assert {one.question.split()[2] for one in called["test"] if one.kind == "wording"} == {"asks", "comes"}
    assert not {one.question.split()[2] for one in called["train"]} & {"asks", "comes"}
    shown = Counter(call for one in called["train"] for call in one.calls.items())
    assert len(shown) == 10 and min(shown.values()) > 60, "every pole has examples to learn from"


def test_the_seed_fixes_them_and_fewer_to_train_on_leave_the_rest(town):
    fewer = situations.situations(train=60)
    assert fewer["test"] == town["test"] and fewer["dev"] == town["dev"] and len(fewer["train"]) == 75
    assert situations.situations(seed=1, train=60)["test"] != town["test"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    (
        ({"train": 2000}, "not enough situations for 2000 train"),
        ({"neutral": 1.0}, "neutral questions is 1.0; it sho"),
    ),
)
def test_more_than_there_is(asked, sentence):
    with pytest.raises(UserError, match=sentence):
        situations.situations(**asked)


def test_as_people_they_carry_traits_and_no_truth_unless_asked():
    people = data.load(data.TownSituationsConfig(train=30, dev=5, test=6))
    sample = next(sample for sample in people.test if sample.metadata["kind"] == "pattern")
    traits, vector = traits_of(sample), expert_vector_of(sample)
    assert list(traits) == list(TRAITS) and sum(vector) == sum(map(abs, traits.values())) > 1
    for number, pole in enumerate(POLES):
        assert vector[number] == (traits[pole[0]] == {"+": 1, "-": -1}[pole[1]])
    assert {TRAITS[t]: level for t, level in traits.items() if level} == oracle.trait_levels(sample.target)
    assert all(s.persona is None for split in (people.train, people.dev, people.test) for s in split)
    told = data.load(data.TownSituationsConfig(train=30, dev=5, test=6, with_truth=True))
    wishes = {sample.id: sample.persona.statements for sample in told.test}
    called = {(trait, level) for trait, level in oracle.trait_levels(sample.target).items()}
    assert set(wishes[sample.id]) == {f"be {lx.BIG_FIVE[trait][level][0]} ." for trait, level in called}
    assert all(not wishes[s.id] for s in told.test if s.metadata["kind"] == "neutral")
