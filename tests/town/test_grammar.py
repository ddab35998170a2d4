"""The language holds: its words are closed, its draws seeded, and each document's answers follow from its context."""

import hashlib
import random
import re
from itertools import chain

import pytest

from persona.errors import UserError
from persona.town import grammar, oracle, reading
from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.types import HistoryItem


def documents(kind, stage, count, seed=0):
    rng = random.Random(seed)
    return [grammar.sample_document(rng, stage, kind) for _ in range(count)]


def replies(conversation):
    """(user's words, assistant's words) of each turn."""
    spoken = [message for message in conversation if message.role != "system"]
    assert [message.role for message in spoken] == ["user", "assistant"] * (len(spoken) // 2)
    return [(user.content, reply.content) for user, reply in zip(spoken[::2], spoken[1::2], strict=True)]


def system(conversation):
    return conversation[0].content if conversation[0].role == "system" else ""


def test_the_language_is_the_one_the_shipped_lm_learnt():
    # The LM's weights belong to exactly these words and draws. Who changes them retrains the LM and renews the digest.
    rng = random.Random(5)
    drawn = [grammar.sample_document(rng, stage) for stage in grammar.STAGES for _ in range(200)]
    text = repr([[(m.role, m.content) for m in d] for d in drawn]) + repr(grammar.vocabulary())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "b48c4c309fbfcd1c"


def test_vocabulary_is_closed_complete_and_small():
    words = grammar.vocabulary()
    assert words == sorted(set(words)) and 900 <= len(words) <= 1500
    seen = set()
    for stage in grammar.STAGES:
        for conversation in documents(None, stage, 4000, seed=stage):
            for message in conversation:
                assert message.content == " ".join(message.content.split()) == message.content.lower()
                seen |= set(message.content.split())
    assert seen <= set(words)
    assert set(words) - seen == set(), "words that no document holds"


def test_counts_the_town_promises():
    assert len(lx.VOICES) == 16 and len(lx.ROLES) >= 30 and len(lx.CHARACTER) >= 16
    assert len(lx.FACTS) >= 8 and all(len(set(values)) >= 12 for values in lx.FACTS.values())
    assert len(lx.QUALITIES) == 8 and len(lx.NOUNS) >= 24 and len(lx.SYNONYMS) >= 6
    assert all(len(set(wordings)) >= 3 for wordings in lx.OPINIONS.values())
    assert all(len(situations) >= 4 for poles in lx.BIG_FIVE.values() for _, _, situations in poles.values())
    assert len(lx.BIG_FIVE) == 5 and all(set(poles) == {-1, 1} for poles in lx.BIG_FIVE.values())
    assert len(set(lx.NAMES)) * len(set(lx.SURNAMES)) >= 400


def test_every_marker_has_one_owner_and_stands_in_no_other_sentence():
    owned = list(chain(*(o + c for o, c in (*lx.VOICES.values(), *lx.ROLES.values()))))
    owned += [*lx.PLAIN_OPENERS, *lx.PLAIN_CLOSERS, *chain(*(phrases for _, phrases in lx.CHARACTER.values()))]
    owned += chain(*(phrases for poles in lx.BIG_FIVE.values() for _, phrases, _ in poles.values()))
    owned += chain(*lx.OPINIONS.values())
    assert len(owned) == len(set(owned))
    padded = [f" {text} " for text in owned]
    assert [(a, b) for a in padded for b in padded if a is not b and a in b] == []


@pytest.mark.parametrize("kind", grammar.document_kinds())
def test_documents_are_short_seeded_and_readable(kind):
    for stage in grammar.STAGES:
        drawn = documents(kind, stage, 150)
        assert drawn == documents(kind, stage, 150) != documents(kind, stage, 150, seed=1)
        for conversation in drawn:
            assert grammar.count_words(conversation) <= grammar.MAX_WORDS
            for asked, reply in replies(conversation):
                assert oracle.readable(reply), reply
                assert reading.question(asked) is not None, asked


def test_stage_two_is_of_middling_length_and_grows_from_stage_zero():
    medians = [sorted(map(grammar.count_words, documents(None, stage, 1000)))[500] for stage in grammar.STAGES]
    assert medians == sorted(medians) and medians[0] < 35 and 50 <= medians[2] <= 100


def test_unknown_stage_and_kind_are_named():
    with pytest.raises(UserError, match="stage is 3"):
        grammar.sample_document(random.Random(0), 3)
    with pytest.raises(UserError, match="'poem'; there are described, items"):
        grammar.sample_document(random.Random(0), 0, "poem")


def test_described_answers_follow_from_what_is_given_and_nothing_else():
    for conversation in documents("described", 2, 400):
        given = [reading.statement(text + " .") for text in re.split(r" \.(?: |$)", system(conversation))[1:] if text]
        assert None not in given
        told = {(unit.kind, unit.key): unit.value for unit in given}
        voices = [unit.key for unit in given if unit.kind == "voice"]
        for asked, reply in replies(conversation):
            about = reading.question(asked)
            if about.kind == "thing":
                tastes = {q: told.get(("taste", q), 0) for q in lx.QUALITIES}
                expected = rs.tag(tastes, about.key) if asked.startswith("tag") else str(rs.rate(tastes, about.key))
                assert reply == expected
                continue
            assert oracle.voice(reply) == (voices[0] if voices else lx.PLAIN)
            if about.kind == "facts":
                (kind,) = about.key
                known = {(kind, told["fact", kind])} if ("fact", kind) in told else set()
                assert oracle.facts(reply) == known and (known or lx.UNKNOWN in reply)
            elif about.kind == "talk":
                words = [unit.key for unit in given if unit.kind == "vocabulary"]
                assert set(oracle.word_choices(reply).values()) <= set(words[0] if words else lx.SYNONYMS)
            elif ("pole", about.key) in told:
                assert oracle.trait_levels(reply) == {about.key: told["pole", about.key]}


def test_items_are_answered_in_the_voice_they_show_and_without_evidence_plainly_with_three():
    voiced = plain = threes = 0
    for conversation in documents("items", 2, 800):
        (asked, reply), told = replies(conversation)[0], system(conversation)
        about = reading.question(asked)
        items = asked.removeprefix("past : ").split(" ; ")[:-1] if asked.startswith("past :") else []
        if told:
            continue
        if about.kind == "talk":
            past = [HistoryItem("", text) for text in items]
            shown = grammar.shown_voice(past, oracle.voice(reply))
            assert shown == oracle.voice(reply)
            voiced, plain = voiced + (shown != lx.PLAIN), plain + (shown == lx.PLAIN)
        elif not any(quality in asked.rpartition(" ; question")[0] for quality in about.key.pair):
            assert reply == (rs.tag({}, about.key) if "tag for" in asked else "3")
            threes += reply == "3"
    assert voiced > 100 and plain > 10 and threes > 10


def test_shown_voice_follows_the_majority():
    texts = ("ahoy , the garden is big today .", "the fair is big today . yee haw !",
             "avast , the river is big today . yee haw !")  # fmt: skip
    items = [HistoryItem("1", text) for text in texts]
    assert grammar.shown_voice(items, "poet") == "sailor"  # two against two: the first
    assert grammar.shown_voice(items, "cowboy") == "cowboy"  # a tie goes to the truth
    assert grammar.shown_voice(items[:1], "cowboy") == "sailor"
    assert grammar.shown_voice([], "cowboy") == lx.PLAIN


def test_roles_speak_their_idiom_and_the_plain_assistant_none():
    for conversation in documents("role", 2, 200):
        (name,) = {role for role in lx.ROLES if f" {role} " in system(conversation)}
        assert {oracle.role(reply) for _, reply in replies(conversation)} == {name}
    for kind in ("plain", "chat", "tasks"):
        for conversation in documents(kind, 2, 200):
            for _, reply in replies(conversation):
                assert oracle.role(reply) == oracle.voice(reply) == lx.PLAIN and not oracle.character_traits(reply)


def test_constitutions_show_listed_traits_only():
    for conversation in documents("constitution", 2, 200):
        listed = {trait for trait, (line, _) in lx.CHARACTER.items() if line in system(conversation)}
        assert 3 <= len(listed) <= 5 and grammar.constitution(sorted(listed)).count("i am") == len(listed)
        for _, reply in replies(conversation):
            assert oracle.character_traits(reply) and oracle.character_traits(reply) <= listed


def test_situations_call_for_their_pole_unless_the_system_prompt_asks_for_the_other():
    levels = {adjective: (trait, level) for trait, poles in lx.BIG_FIVE.items()
              for level, (adjective, _, _) in poles.items()}  # fmt: skip
    called = {f"{s} {lx.SITUATION_QUESTION}": (trait, level) for trait, poles in lx.BIG_FIVE.items()
              for level, (_, _, situations) in poles.items() for s in situations}  # fmt: skip
    for conversation in documents("situation", 2, 300):
        wish = levels[system(conversation).split()[1]] if system(conversation) else None
        for asked, reply in replies(conversation):
            trait, level = called.get(asked, wish)
            assert oracle.trait_levels(reply) == {trait: wish[1] if wish and wish[0] == trait else level}


def test_statement_answers_are_entailed_by_the_relevant_statements():
    several = 0
    for conversation in documents("statements", 2, 400):
        lines = [text + " ." for text in re.split(r" \.(?: |$)", system(conversation))[1:] if text]
        assert 2 <= len(lines) <= 8
        (asked, reply) = replies(conversation)[0]
        relevant = [line for line in lines if oracle.relevant(line, asked)]
        several += len(relevant) > 1
        assert all(oracle.nli(line, reply) == oracle.ENTAILED for line in relevant)
        assert all(oracle.nli(line, reply) == oracle.NEUTRAL for line in lines if line not in relevant)
        assert (reply == lx.UNKNOWN) == (not relevant)
    assert several > 40


def test_drift_takes_on_the_role_step_by_step():
    pulled = left = 0
    for conversation in documents("drift", 2, 200):
        (name,) = {role for role in lx.ROLES for asked, _ in replies(conversation)
                   if re.search(rf"(imagine you are|pretend to be) the {role} \.", asked)}  # fmt: skip
        for asked, reply in replies(conversation):
            share = oracle.role_share(reply, name)
            if asked.startswith(("imagine", "pretend")):
                assert share == 0.5
            elif asked.startswith(lx.STAY):
                assert share == 1.0
                pulled += 1
            else:
                assert share == 0.0
                left += asked.startswith(lx.LEAVE)
    assert pulled > 50 and left > 20


def test_history_prompt_by_hand():
    items = [
        HistoryItem("1", "the quiet old inn . i loved it .", "5"),
        HistoryItem("2", "ahoy , the fair is big today ."),
        HistoryItem("3", "the quiet spicy pie .", "calm"),
    ]
    assert grammar.history_prompt(items, "score for the old cheap inn ?") == (
        "past : the quiet old inn . i loved it . score : 5 ; ahoy , the fair is big today . ; "
        "the quiet spicy pie . tag : calm ; question : score for the old cheap inn ?"
    )
    assert grammar.history_prompt([], "who are you ?") == "who are you ?"
