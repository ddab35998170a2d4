"""Documents with many questions to one context, for training the LM only.

A look-up leaves one informative token per question, and reading the context is what costs: asking eight things about a
person instead of one brings ratings, tags and facts among several within reach of an hour of CPU. The language and its
rules are the grammar's; only the number of turns is larger.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from persona.town import assistant_documents as ad
from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town import sentences as say
from persona.town.persona_documents import shown_voice
from persona.town.residents import Latents
from persona.types import Conversation, HistoryItem

# More than the grammar's own documents hold, but well within the model's positions.
MAX_WORDS = 320


def _among(rng: random.Random, qualities: Sequence[str]) -> rs.Thing:
    first, second = rng.sample(list(qualities), 2)
    return rs.draw_thing(rng, (first, second))


def _shortened(system: str, turns: Sequence[tuple[str, str]]) -> Conversation:
    """The conversation without the last turns that would exceed MAX_WORDS; one turn always stays."""
    words, kept = len(system.split()), 0
    for user, reply in turns:
        words += len(user.split()) + len(reply.split())
        kept += words <= MAX_WORDS
    return ad.conversation(system, turns[: max(kept, 1)])


def _fact_question(rng: random.Random, stage: int, kind: str) -> str:
    if stage == 2 and rng.random() < 0.4:
        return rng.choice(lx.FACT_PARAPHRASES[kind][2])
    return say.fact_question(kind)


def drill_described(rng: random.Random, stage: int) -> Conversation:
    """A description, in part or whole, and up to eight questions of all kinds about what follows from it."""
    who = rs.draw_latents(rng)
    paraphrase = stage == 2 and rng.random() < 0.3
    pool = {("voice", ""): say.voice_statement(who.name, who.voice)}
    pool |= {("taste", q): say.taste_statement(who.name, q, level) for q, level in who.tastes.items() if level}
    pool |= {("fact", k): say.fact_statement(who.name, k, v, paraphrase) for k, v in who.facts.items()}
    pool |= {("trait", t): say.trait_statement(who.name, t, level) for t, level in who.traits.items() if level}
    pool[("words", "")] = say.words_statement(who.name, list(who.words.values()))
    given = list(pool)
    if stage < 2 or rng.random() < 0.5:
        most = (5, 10, len(pool))[stage]
        given = rng.sample(given, rng.randint(2, most))
    tastes = {q: who.tastes[q] for which, q in given if which == "taste"}
    words = who.words if ("words", "") in given else rs.PLAIN_WORDS
    voiced = ("voice", "") in given

    def spoken(content: str, marked: bool) -> str:
        if voiced:
            return rs.speak(rng, lx.VOICES[who.voice], content)
        return ad.plainly(rng, content) if marked else content

    turns = []
    for _ in range((3, 5, 8)[stage]):
        which = rng.choices(("rating", "tag", "fact", "reply", "situation"), (46, 16, 22, 10, 6))[0]
        told = [q for q in tastes] if rng.random() < 0.75 else []
        thing = _among(rng, told if len(told) > 1 else lx.QUALITIES)
        if which == "rating":
            turns.append((say.rating_question(thing), str(rs.rate(tastes, thing))))
        elif which == "tag":
            turns.append((say.tag_question(thing), rs.tag(tastes, thing)))
        elif which == "fact":
            known = [k for of, k in given if of == "fact"]
            kind = rng.choice(known if known and rng.random() < 0.85 else tuple(lx.FACTS))
            answer = say.fact_answer(kind, who.facts[kind]) if kind in known else lx.UNKNOWN
            turns.append((_fact_question(rng, stage, kind), spoken(answer, False)))
        elif which == "reply":
            question, answer = rs.small_talk(*ad.any_form_and_topic(rng), words)
            turns.append((question, spoken(answer, True)))
        else:
            trait, called = rng.choice(tuple(lx.BIG_FIVE)), rng.choice((-1, 1))
            level = who.traits[trait] if ("trait", trait) in given else 0
            question = f"{rng.choice(lx.BIG_FIVE[trait][called][2])} {lx.SITUATION_QUESTION}"
            turns.append((question, spoken(ad.pole_phrases(rng, trait, level or called, 1), False)))
    if rng.random() < 0.5:
        rng.shuffle(given)
    else:
        given.sort(key=list(pool).index)
    return _shortened(" ".join([f"you are {who.name} .", *(pool[key] for key in given)]), turns)


def drill_statements(rng: random.Random, stage: int) -> Conversation:
    """Facts and tastes told in statements, each asked for in turn, with others in between that were not told."""
    who = rs.draw_latents(rng)
    keys = [("fact", kind) for kind in lx.FACTS] + [("taste", quality) for quality in rng.sample(lx.QUALITIES, 4)]
    rng.shuffle(keys)
    given = keys[: rng.randint(2, (3, 5, 8)[stage])]
    asked = given + rng.sample(keys[len(given) :], 1 + len(given) // 4)
    rng.shuffle(asked)
    turns = []
    for which, key in asked:
        known = (which, key) in given
        if which == "fact":
            answer = say.fact_answer(key, who.facts[key]) if known else lx.UNKNOWN
            turns.append((_fact_question(rng, stage, key), answer))
        else:
            answer = say.taste_answer(key, who.tastes[key]) if known else lx.UNKNOWN
            turns.append((say.taste_question(key), answer))
    lines = [
        say.fact_statement(who.name, key, who.facts[key], stage == 2 and rng.random() < 0.3)
        if which == "fact"
        else say.taste_statement(who.name, key, who.tastes[key])
        for which, key in given
    ]
    return _shortened(" ".join([f"you are {who.name} .", *lines]), turns)


def drill_items(rng: random.Random, stage: int) -> Conversation:
    """Past items, then up to six questions; easy documents keep to few qualities, so that each is met often."""
    who = rs.draw_latents(rng)
    count = rng.randint((1, 2, 4)[stage], (3, 7, 16)[stage])
    qualities = rng.sample(lx.QUALITIES, (2, 3, rng.choice((4, 6, 8)))[stage])
    shown = 1.0 if stage == 0 else rng.choice((rs.SHOWN, rs.SHOWN, 0.6, 1.0))
    borrowed = 0.0 if stage == 0 else rng.choice((0.0, rs.BORROWED))
    items: list[HistoryItem] = []
    seen: set[str] = set()
    forms: list[int] = []
    for number in range(count):
        kind = rng.choices(rs.ITEM_KINDS, (30, 55, 15))[0]
        if kind == "chat":
            form, topic = ad.any_form_and_topic(rng)
            forms.append(form)
            items.append(rs.chat_item(rng, who, form, topic, shown, borrowed, str(number)))
            continue
        thing = _among(rng, qualities)
        seen |= set(thing.pair)
        if kind == "review":
            items.append(rs.review_item(rng, who, thing, shown, borrowed, str(number)))
        else:
            items.append(rs.tag_item(who, thing, str(number)))
    turns = _questions_on_items(rng, who, items, seen, forms, qualities, (2, 4, 6)[stage])
    turns[0] = (say.history_prompt(items, turns[0][0]), turns[0][1])
    return _shortened("", turns)


def _questions_on_items(
    rng: random.Random, who: Latents, items: Sequence[HistoryItem], seen: set[str], forms: Sequence[int],
    qualities: Sequence[str], count: int,
) -> list[tuple[str, str]]:  # fmt: skip
    voice = shown_voice(items, who.voice)
    known = {rs.base_word(form) for form in forms}
    words = {base: who.words[base] if base in known else base for base in lx.SYNONYMS}
    turns = []
    for _ in range(count):
        which = rng.choices(("rating", "tag", "reply"), (55, 20, 25))[0]
        thing = _among(rng, qualities)
        tastes = who.tastes if seen & set(thing.pair) else {}
        if which == "rating":
            turns.append((say.rating_question(thing), str(rs.rate(tastes, thing))))
        elif which == "tag":
            turns.append((say.tag_question(thing), rs.tag(tastes, thing)))
        else:
            question, answer = rs.small_talk(*ad.any_form_and_topic(rng), words)
            reply = ad.plainly(rng, answer) if voice == lx.PLAIN else rs.speak(rng, lx.VOICES[voice], answer)
            turns.append((question, reply))
    return turns


DRILLS: dict[str, Callable[[random.Random, int], Conversation]] = {
    "drill_described": drill_described,
    "drill_statements": drill_statements,
    "drill_items": drill_items,
}
