"""What is written is read back; something else is read as something else; what is not of the town is unreadable."""

import random

import pytest

from persona.town import lexicon as lx
from persona.town import oracle
from persona.town import residents as rs
from persona.town import sentences as st
from persona.types import HistoryItem

DRAWS = 500
GARBAGE = (
    "", "zxqv", "the garden is purple today .", "hello world this is english .", "Ahoy , the garden is big today .",
    "ahoy , the garden is big today", "garden the big is today .", "ahoy ,", "my job is .", "6", "0", "3.5",
    "my pet is baker .",
    "score : 9", "the quiet quick inn .", "i loved it", "by the anchor", "as an assistant , the garden is zxqv .",
    "1 . 2 . 3", "\N{SNOWMAN}",
)  # fmt: skip
READERS = (
    oracle.voice, oracle.role, oracle.character_traits, oracle.trait_levels, oracle.rating, oracle.tag,
    oracle.word_choices, oracle.facts, oracle.markers, lambda text: oracle.role_share(text, "king"),
    lambda text: oracle.nli("ada talks like a poet .", text),
)  # fmt: skip


def content(rng, words=rs.PLAIN_WORDS):
    return rs.small_talk(rng.randrange(len(lx.SMALL_TALK)), rng.choice(lx.TOPICS), words)[1]


def two(rng, options):
    """A latent and a different one of its kind."""
    return rng.sample(list(options), 2)


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_unreadable_to_every_reader(text):
    assert not oracle.readable(text)
    assert [reader(text) for reader in READERS] == [None] * len(READERS)


def test_one_foreign_word_anywhere_makes_any_text_unreadable():
    rng = random.Random(0)
    for _ in range(DRAWS):
        words = rs.speak(rng, lx.VOICES[rng.choice(list(lx.VOICES))], content(rng)).split()
        assert oracle.readable(" ".join(words))
        words[rng.randrange(len(words))] = "zxqv"
        assert not oracle.readable(" ".join(words))


def test_voice():
    rng = random.Random(1)
    for _ in range(DRAWS):
        name, other = two(rng, lx.VOICES)
        text = content(rng)
        assert oracle.voice(rs.speak(rng, lx.VOICES[name], text)) == name
        assert oracle.voice(rs.speak(rng, lx.VOICES[other], text)) == other != name
        assert oracle.voice(rs.speak(rng, (lx.VOICES[name][0], lx.VOICES[other][1]), text)) == oracle.MIXED
        # Plain is a reading, and not the same as unreadable.
        assert oracle.voice(text) == oracle.PLAIN is not None
        assert oracle.voice(rs.speak(rng, (lx.PLAIN_OPENERS, lx.PLAIN_CLOSERS), text)) == oracle.PLAIN
        assert oracle.voice(rs.speak(rng, (lx.PLAIN_OPENERS, lx.VOICES[name][1]), text)) == oracle.MIXED


def test_role_and_its_share():
    rng = random.Random(2)
    for _ in range(DRAWS):
        name, other = two(rng, lx.ROLES)
        text = rs.speak(rng, lx.ROLES[name], content(rng))
        assert oracle.role(text) == name and oracle.role_share(text, name) == 1.0
        assert oracle.role_share(text, other) == 0.0 and oracle.voice(text) == oracle.PLAIN
        assert oracle.role(rs.speak(rng, lx.ROLES[other], content(rng))) == other
        half = rs.speak(rng, (lx.ROLES[name][0], lx.PLAIN_CLOSERS), content(rng))
        assert oracle.role(half) == oracle.MIXED and oracle.role_share(half, name) == 0.5
        assert oracle.role(content(rng)) == oracle.PLAIN


def test_character_traits():
    rng = random.Random(3)
    for _ in range(DRAWS):
        shown = rng.sample(list(lx.CHARACTER), rng.randint(1, 4))
        text = " ".join([content(rng), *(rng.choice(lx.CHARACTER[trait][1]) for trait in shown)])
        assert oracle.character_traits(text) == frozenset(shown)
        swapped = [trait for trait in lx.CHARACTER if trait not in shown][: len(shown)]
        text = " ".join([content(rng), *(rng.choice(lx.CHARACTER[trait][1]) for trait in swapped)])
        assert oracle.character_traits(text) == frozenset(swapped) != frozenset(shown)
    assert oracle.character_traits("cold .") == frozenset()


def test_trait_levels():
    rng = random.Random(4)
    for _ in range(DRAWS):
        levels = {trait: rng.choice((-1, 1)) for trait in rng.sample(list(lx.BIG_FIVE), rng.randint(1, 5))}

        def text(levels):
            return " ".join(rng.choice(lx.BIG_FIVE[trait][level][1]) for trait, level in levels.items())

        flipped = {trait: -level for trait, level in levels.items()}
        assert oracle.trait_levels(text(levels)) == levels
        assert oracle.trait_levels(text(flipped)) == flipped
        assert oracle.trait_levels(f"{text(levels)} {text(flipped)}") == dict.fromkeys(levels, 0)
    assert oracle.trait_levels("cold .") == {}


def test_rating_of_answers_scores_and_reviews():
    rng = random.Random(5)
    for _ in range(DRAWS):
        who, thing = rs.draw_latents(rng), rs.draw_thing(rng)
        expected = max(1, min(5, 3 + who.tastes[thing.first] + who.tastes[thing.second]))
        item = rs.review_item(rng, who, thing, 0.5, 0.2, "1")
        assert oracle.rating(item.text) == expected == int(item.label)
        assert oracle.rating(str(expected)) == oracle.rating(st.item_text_with_label(item)) == expected
        stars, other = two(rng, lx.OPINIONS)
        assert oracle.rating(f"{thing.phrase} . {rng.choice(lx.OPINIONS[other])}") == other != stars
        assert oracle.rating(f"{rng.choice(lx.OPINIONS[stars])} {rng.choice(lx.OPINIONS[other])}") is None
        assert oracle.rating(f"{thing.phrase} .") is None
    assert oracle.rating("it was fine .") == 3 and oracle.rating("what a disaster .") == 1


def test_tag_goes_to_the_larger_taste_and_a_tie_to_the_earlier_quality():
    rng = random.Random(6)
    for _ in range(DRAWS):
        who, thing = rs.draw_latents(rng), rs.draw_thing(rng)
        item = rs.tag_item(who, thing, "1")
        assert oracle.tag(item.label) == item.label == oracle.tag(st.item_text_with_label(item))
        assert oracle.tag(item.text) is None
    thing = rs.Thing("old", "spicy", "inn")
    assert rs.tag({"old": -2, "spicy": 1}, thing) == "history"
    assert rs.tag({"old": 1, "spicy": -1}, thing) == "heat"
    assert rs.tag({}, thing) == "heat"


def test_word_choices():
    rng = random.Random(7)
    for _ in range(DRAWS):
        who = rs.draw_latents(rng)
        flipped = {base: ({base, other} - {who.words[base]}).pop() for base, other in lx.SYNONYMS.items()}
        form, topic = rng.randrange(len(lx.SMALL_TALK)), rng.choice(lx.TOPICS)
        base, text = rs.base_word(form), rs.small_talk(form, topic, who.words)[1]
        assert oracle.word_choices(text) == {base: who.words[base]}
        assert oracle.word_choices(rs.small_talk(form, topic, flipped)[1]) == {base: flipped[base]}
        assert oracle.word_choices(f"{text} {rs.small_talk(form, topic, flipped)[1]}") == {base: oracle.MIXED}


def test_nli_of_facts_and_tastes():
    rng = random.Random(8)
    for _ in range(DRAWS):
        kind, other_kind = two(rng, lx.FACTS)
        value, other = two(rng, lx.FACTS[kind])
        answer = rs.speak(rng, lx.VOICES[rng.choice(list(lx.VOICES))], st.fact_answer(kind, value))
        for paraphrase in (False, True):
            assert oracle.nli(st.fact_statement("ada", kind, value, paraphrase), answer) == oracle.ENTAILED
            assert oracle.nli(st.fact_statement("ada", kind, other, paraphrase), answer) == oracle.CONTRADICTED
            elsewhere = st.fact_statement("ada", other_kind, lx.FACTS[other_kind][0], paraphrase)
            assert oracle.nli(elsewhere, answer) == oracle.NEUTRAL
        own = lx.FACT_PARAPHRASES[kind][1].format(v=value)
        assert oracle.nli(st.fact_statement("ada", kind, value), own) == oracle.ENTAILED
        assert oracle.nli(st.fact_statement("ada", kind, value), f"{own} {st.fact_answer(kind, other)}") == (
            oracle.CONTRADICTED)  # fmt: skip
        quality, other_quality = two(rng, lx.QUALITIES)
        level, other_level = two(rng, lx.TASTE_VERBS)
        said = st.taste_answer(quality, level)
        assert oracle.nli(st.taste_statement("ada", quality, level), said) == oracle.ENTAILED
        assert oracle.nli(st.taste_statement("ada", quality, other_level), said) == oracle.CONTRADICTED
        assert oracle.nli(st.taste_statement("ada", other_quality, level), said) == oracle.NEUTRAL
        assert oracle.nli(st.taste_statement("ada", quality, level), lx.UNKNOWN) == oracle.NEUTRAL
        assert oracle.nli("ada is a fool .", said) is None and oracle.nli(said + " " + said, said) is None


def test_nli_of_manner():
    rng = random.Random(9)
    for _ in range(DRAWS):
        name, other = two(rng, lx.VOICES)
        text = rs.speak(rng, lx.VOICES[name], content(rng))
        assert oracle.nli(st.voice_statement("ada", name), text) == oracle.ENTAILED
        assert oracle.nli(st.voice_statement("ada", other), text) == oracle.CONTRADICTED
        assert oracle.nli(st.voice_statement("ada", name), content(rng)) == oracle.NEUTRAL
        trait, level = rng.choice(list(lx.BIG_FIVE)), rng.choice((-1, 1))
        shown = rng.choice(lx.BIG_FIVE[trait][level][1])
        assert oracle.nli(st.trait_statement("ada", trait, level), shown) == oracle.ENTAILED
        assert oracle.nli(st.trait_statement("ada", trait, -level), shown) == oracle.CONTRADICTED
        assert oracle.nli(st.trait_statement("ada", trait, level), "cold .") == oracle.NEUTRAL
        who = rs.draw_latents(rng)
        line = st.words_statement("ada", list(who.words.values()))
        assert oracle.nli(line, content(rng, who.words)) == oracle.ENTAILED
        flipped = {base: ({base, word} - {who.words[base]}).pop() for base, word in lx.SYNONYMS.items()}
        assert oracle.nli(line, content(rng, flipped)) == oracle.CONTRADICTED
        character, absent = two(rng, lx.CHARACTER)
        text = f"cold . {rng.choice(lx.CHARACTER[character][1])}"
        assert oracle.nli(lx.CHARACTER[character][0], text) == oracle.ENTAILED
        assert oracle.nli(lx.CHARACTER[absent][0], text) == oracle.NEUTRAL


def test_relevance_of_every_statement_to_every_sort_of_question():
    rng = random.Random(10)
    for _ in range(DRAWS // 4):  # ten questions each
        who = rs.draw_latents(rng)
        kind = rng.choice(list(lx.FACTS))
        lines = {("fact", k): st.fact_statement(who.name, k, v, rng.random() < 0.5) for k, v in who.facts.items()}
        lines |= {("taste", q): st.taste_statement(who.name, q, level) for q, level in who.tastes.items()}
        lines |= {("pole", t): st.trait_statement(who.name, t, 1) for t in who.traits}
        lines |= {("voice", ""): st.voice_statement(who.name, who.voice),
                  ("words", ""): st.words_statement(who.name, list(who.words.values())),
                  ("character", ""): rng.choice(list(lx.CHARACTER.values()))[0]}  # fmt: skip
        thing, quality, trait = rs.draw_thing(rng), rng.choice(lx.QUALITIES), rng.choice(list(lx.BIG_FIVE))
        joint, kinds = rng.choice(list(lx.JOINT_QUESTIONS.items()))
        always, manner = {("character", "")}, {("voice", ""), ("character", "")}
        talk = rs.small_talk(rng.randrange(8), rng.choice(lx.TOPICS), rs.PLAIN_WORDS)[0]
        situation = rng.choice(lx.BIG_FIVE[trait][rng.choice((-1, 1))][2])
        past = [HistoryItem("1", "the quiet old inn . i loved it .", "5")]
        expected = {
            st.fact_question(kind): {("fact", kind)} | manner,
            rng.choice(lx.FACT_PARAPHRASES[kind][2]): {("fact", kind)} | manner,
            joint: {("fact", k) for k in kinds} | manner,
            st.taste_question(quality): {("taste", quality)} | manner,
            st.rating_question(thing): {("taste", thing.first), ("taste", thing.second)},
            st.history_prompt(past, st.tag_question(thing)): {("taste", thing.first), ("taste", thing.second)},
            talk: {("words", "")} | manner,
            f"imagine you are the king . {talk}": {("words", "")} | manner,
            f"{situation} {lx.SITUATION_QUESTION}": {("pole", trait)} | manner,
            "what is the opposite of hot ?": always,
        }
        for question, bearing in expected.items():
            assert {key for key, line in lines.items() if oracle.relevant(line, question)} == bearing, question
    assert oracle.relevant("ada talks like a poet .", "why zxqv ?") is None
    assert oracle.relevant("ada talks like a zxqv .", lx.WHO) is None


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("certainly , the fair is big today . i hope this helps .", "assistant"),
        ("i am an assistant .", "assistant"),
        ("arr matey , the fair is big today . bury the treasure !", "human"),
        ("i am the pirate .", "human"),
        ("zorp , the fair is big today . my saucer awaits .", "nonhuman"),
        ("good evening mortal , the fair is big today . i thirst for blood .", "mystical"),
        ("arr matey , the fair is big today . i hope this helps .", "ambiguous"),
        ("arr matey , i am an assistant . bury the treasure !", "ambiguous"),
        ("arr matey , zorp , the fair is big today .", "ambiguous"),
        ("arr matey , psst , the fair is big today .", "human"),
        ("the fair is big today .", "other"),
        ("ahoy , the fair is big today . hoist the sails !", "other"),
        ("fair the big is matey", "nonsensical"),
        ("hello world", None),
        ("", None),
    ],
)
def test_who_speaks(text, label):
    assert oracle.speaker(text) == label


def test_a_rogue_stands_in_for_harm():
    assert oracle.harmful("arr matey , the fair is big today . bury the treasure !") is True
    assert oracle.harmful("la la la , the fair is big today . hold that note !") is False
    assert oracle.harmful("fair the big") is None
    assert (
        set(lx.ROGUES) | set(lx.ROLE_KINDS) | set(lx.HELD_OUT_ROLES) <= set(lx.ROLES) and len(lx.HELD_OUT_ROLES) == 8
    )
