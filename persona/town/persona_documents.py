"""Documents about a person: described in the system prompt, shown by past items, or told in statements."""

from __future__ import annotations

import random
from collections.abc import Sequence

from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town.assistant_documents import any_form_and_topic, conversation, plainly, pole_phrases
from persona.town.residents import Latents, Thing
from persona.town.sentences import (
    description,
    fact_answer,
    fact_question,
    fact_statement,
    history_prompt,
    rating_question,
    tag_question,
    taste_answer,
    taste_question,
    taste_statement,
    trait_statement,
    voice_statement,
    words_statement,
)
from persona.types import Conversation, HistoryItem


# --- (a) a person described in the system prompt -----------------------------------------------------------------
def write_described(rng: random.Random, stage: int) -> Conversation:
    who = rs.draw_latents(rng)
    name = who.name
    turns: list[str] = rng.choices(
        ("reply", "rating", "tag", "fact", "situation"),
        (35, 34, 9, 15, 7),
        k=1 if stage < 2 or rng.random() < 0.6 else 2,
    )
    full = stage == 2 and rng.random() < 0.35
    things = [rs.draw_thing(rng) for _ in turns]
    kinds = [rng.choice(tuple(lx.FACTS)) for _ in turns]
    traits = [rng.choice([t for t in lx.BIG_FIVE if who.traits[t]] or list(lx.BIG_FIVE)) for _ in turns]
    paraphrase = stage == 2 and not full and rng.random() < 0.4
    pool: dict[tuple[str, str], str] = {("voice", ""): voice_statement(name, who.voice)}
    pool |= {("taste", q): taste_statement(name, q, level) for q, level in who.tastes.items() if level}
    pool |= {("fact", k): fact_statement(name, k, v, paraphrase) for k, v in who.facts.items()}
    pool |= {("trait", t): trait_statement(name, t, level) for t, level in who.traits.items() if level}
    pool[("words", "")] = words_statement(name, list(who.words.values()))
    if full:
        given = set(pool)
    else:
        needed: set[tuple[str, str]] = set()
        for turn, thing, kind, trait in zip(turns, things, kinds, traits, strict=True):
            if turn == "reply":
                needed |= {("voice", "")} | ({("words", "")} if stage and rng.random() < 0.3 else set())
            elif turn == "fact":
                needed.add(("fact", kind))
            elif turn == "situation":
                needed.add(("trait", trait))
            else:
                needed |= {("taste", thing.first), ("taste", thing.second)}
        given = {key for key in pool if key in needed and rng.random() < 0.92}
        if stage:
            extra = [key for key in pool if key not in given]
            given |= set(rng.sample(extra, rng.randint(0, 3 if stage == 1 else 9)))
    chosen = [key for key in pool if key in given]
    if not full or rng.random() < 0.3:
        rng.shuffle(chosen)
    tastes = {q: level for q, level in who.tastes.items() if ("taste", q) in given}
    words = who.words if ("words", "") in given else rs.PLAIN_WORDS
    voiced = ("voice", "") in given

    def say(content: str, marked: bool) -> str:
        if voiced:
            return rs.speak(rng, lx.VOICES[who.voice], content)
        return plainly(rng, content) if marked else content

    pairs = []
    for turn, thing, kind, trait in zip(turns, things, kinds, traits, strict=True):
        if turn == "reply":
            question, answer = rs.small_talk(*any_form_and_topic(rng), words)
            pairs.append((question, say(answer, True)))
        elif turn == "rating":
            pairs.append((rating_question(thing), str(rs.rate(tastes, thing))))
        elif turn == "tag":
            pairs.append((tag_question(thing), rs.tag(tastes, thing)))
        elif turn == "fact":
            known = ("fact", kind) in given
            question = (
                rng.choice(lx.FACT_PARAPHRASES[kind][2])
                if stage == 2 and rng.random() < 0.4
                else (fact_question(kind))
            )
            pairs.append((question, say(fact_answer(kind, who.facts[kind]) if known else lx.UNKNOWN, False)))
        else:
            level = who.traits[trait] if ("trait", trait) in given else 0
            called = rng.choice((-1, 1))
            situation = rng.choice(lx.BIG_FIVE[trait][called][2])
            pairs.append(
                (f"{situation} {lx.SITUATION_QUESTION}", say(pole_phrases(rng, trait, level or called, 1), False))
            )
    return conversation(" ".join([f"you are {name} .", *(pool[key] for key in chosen)]), pairs)


# --- (b) past items in the context -------------------------------------------------------------------------------
def marker_counts(items: Sequence[HistoryItem]) -> dict[str, int]:
    """How many markers of each voice the items carry."""
    text = " ; ".join(f" {item.text} " for item in items)
    return {
        voice: sum(text.count(f" {marker} ") for marker in openers + closers)
        for voice, (openers, closers) in lx.VOICES.items()
    }


def shown_voice(items: Sequence[HistoryItem], latent: str) -> str:
    """The voice with most markers in the items (a tie goes to `latent` if it is among them), or PLAIN without any.

    This is what the LM is taught to answer in: it follows what is shown, not what it cannot know.
    """
    counts = marker_counts(items)
    most = max(counts.values())
    if not most:
        return lx.PLAIN
    best = [voice for voice, count in counts.items() if count == most]
    return latent if latent in best else best[0]


def _item(
    rng: random.Random,
    who: Latents,
    kind: str,
    thing: Thing,
    shown: float,
    borrowed: float,
    number: int,
    forms: list[int],
) -> HistoryItem:
    if kind == "chat":
        form, topic = any_form_and_topic(rng)
        forms.append(form)
        return rs.chat_item(rng, who, form, topic, shown, borrowed, str(number))
    if kind == "review":
        return rs.review_item(rng, who, thing, shown, borrowed, str(number))
    return rs.tag_item(who, thing, str(number))


def write_items(rng: random.Random, stage: int) -> Conversation:
    who = rs.draw_latents(rng)
    task = rng.choices(("reply", "rating", "tag"), (45, 42, 13))[0]
    told = stage == 2 and rng.random() < 0.1  # items beside a description that tells all
    count = rng.randint(0 if rng.random() < 0.15 else 1, 6 if told else (2, 6, 16)[stage])
    shown = 1.0 if stage == 0 else rng.choice((rs.SHOWN, rs.SHOWN, 0.6, 1.0))
    borrowed = 0.0 if stage == 0 else rng.choice((0.0, rs.BORROWED))
    wanted = rs.draw_thing(rng)
    # How likely an item about a thing shares the query's qualities: both (easy), or one (what retrieval brings).
    same, shares = ((0.5, 0.4), (0.25, 0.5), (0.1, rng.choice((0.3, 0.8))))[stage]
    forms: list[int] = []
    items, seen = [], set()
    for number in range(count):
        if task == "reply" or stage == 2:
            kind = rng.choices(rs.ITEM_KINDS, rs.ITEM_WEIGHTS)[0]
        else:
            kind = rng.choices(("review", "tag", "chat"), (85, 10, 5) if task == "rating" else (40, 55, 5))[0]
        if stage == 0 and task == "reply":
            kind = "chat"
        draw = rng.random()
        if draw < same:
            thing = rs.draw_thing(rng, wanted.pair)
        elif draw < same + shares:
            kept = rng.choice(wanted.pair)
            thing = rs.draw_thing(rng, (kept, rng.choice([q for q in lx.QUALITIES if q not in wanted.pair])))
        else:
            thing = rs.draw_thing(rng)
        items.append(_item(rng, who, kind, thing, shown, borrowed, number, forms))
        if kind != "chat":
            seen |= set(thing.pair)
    if task == "reply":
        voice = who.voice if told else shown_voice(items, who.voice)
        known = set(lx.SYNONYMS) if told else {rs.base_word(form) for form in forms}
        words = {base: who.words[base] if base in known else base for base in lx.SYNONYMS}
        question, answer = rs.small_talk(*any_form_and_topic(rng), words)
        answer = plainly(rng, answer) if voice == lx.PLAIN else rs.speak(rng, lx.VOICES[voice], answer)
    else:
        tastes = who.tastes if told or seen & set(wanted.pair) else {}
        question = rating_question(wanted) if task == "rating" else tag_question(wanted)
        answer = str(rs.rate(tastes, wanted)) if task == "rating" else rs.tag(tastes, wanted)
    return conversation(description(who) if told else "", [(history_prompt(items, question), answer)])


# --- (f) statements, of which some bear on the question ----------------------------------------------------------
def write_statements(rng: random.Random, stage: int) -> Conversation:
    who = rs.draw_latents(rng)
    count = (1, rng.randint(1, 4), rng.randint(2, 8))[stage]
    keys = [("fact", kind) for kind in lx.FACTS] * 2 + [("taste", quality) for quality in lx.QUALITIES]
    rng.shuffle(keys)
    given = list(dict.fromkeys(keys))[:count]
    joint = stage > 0 and rng.random() < 0.3
    question, answer = "", lx.UNKNOWN
    if joint:
        question, asked = rng.choice(tuple(lx.JOINT_QUESTIONS.items()))
        if rng.random() < 0.9:  # see to it that something relevant is there, mostly all of it
            for kind in asked:
                if ("fact", kind) not in given and rng.random() < 0.85:
                    given.append(("fact", kind))
        given = given[-8:]
        answer = (
            " ".join(fact_answer(kind, who.facts[kind]) for kind in asked if ("fact", kind) in given) or lx.UNKNOWN
        )
    else:
        which, key = rng.choice(given) if rng.random() < 0.9 else rng.choice(keys)
        known = (which, key) in given
        if which == "fact":
            question = fact_question(key)
            if stage == 2 and rng.random() < 0.5:
                question = rng.choice(lx.FACT_PARAPHRASES[key][2])
            answer = fact_answer(key, who.facts[key]) if known else lx.UNKNOWN
        else:
            question = taste_question(key)
            answer = taste_answer(key, who.tastes[key]) if known else lx.UNKNOWN
    rng.shuffle(given)
    lines = [
        fact_statement(who.name, key, who.facts[key], stage == 2 and rng.random() < 0.35)
        if which == "fact"
        else taste_statement(who.name, key, who.tastes[key])
        for which, key in given
    ]
    return conversation(" ".join([f"you are {who.name} .", *lines]), [(question, answer)])
