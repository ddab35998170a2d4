"""The town's language as conversations: what its LM is trained on, and how prompts for it are written.

Latents are drawn afresh for every document, so nothing can be learnt by heart: only what stands in the context helps.
Nothing tells the voice -> the plain assistant answers. Nothing tells the tastes -> the rating is 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain

from persona.errors import UserError
from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town.residents import Latents, Thing
from persona.town.sentences import (
    description,
    fact_answer,
    fact_question,
    fact_statement,
    history_prompt,
    item_text_with_label,
    rating_question,
    statements,
    tag_question,
    taste_answer,
    taste_question,
    taste_statement,
    trait_statement,
    voice_statement,
    words_statement,
)
from persona.types import Conversation, HistoryItem, Message

__all__ = [
    "constitution",
    "count_words",
    "description",
    "document_kinds",
    "history_prompt",
    "item_text_with_label",
    "sample_document",
    "shown_voice",
    "statements",
    "vocabulary",
]

MAX_WORDS = 260
PLAIN_OWNER = (lx.PLAIN_OPENERS, lx.PLAIN_CLOSERS)


# --- helpers of the document kinds -------------------------------------------------------------------------------
def _conversation(system: str, turns: Sequence[tuple[str, str]]) -> Conversation:
    head = [Message("system", system)] if system else []
    return tuple(
        head + [Message(role, text) for user, reply in turns for role, text in (("user", user), ("assistant", reply))]
    )


def _form_and_topic(rng: random.Random) -> tuple[int, str]:
    return rng.randrange(len(lx.SMALL_TALK)), rng.choice(lx.TOPICS)


def _plain(rng: random.Random, content: str) -> str:
    return rs.speak(rng, PLAIN_OWNER, content)


def _task(rng: random.Random) -> tuple[str, str]:
    """A plain task and its bare answer: counting, opposites, colours, copying."""
    which = rng.randrange(4)
    if which == 0:
        start = rng.randint(1, 8)
        end = start + rng.randint(1, 4)
        return f"count from {start} to {end} .", " ".join(str(n) for n in range(start, end + 1)) + " ."
    if which == 1:
        pair = rng.choice(lx.OPPOSITES)
        one, other = pair if rng.random() < 0.5 else pair[::-1]
        return f"what is the opposite of {one} ?", f"{other} ."
    if which == 2:
        noun = rng.choice(tuple(lx.COLOURS))
        return f"what colour is {noun} ?", f"{lx.COLOURS[noun]} ."
    words = " ".join(rng.sample(lx.COPY_WORDS, rng.randint(1, 5)))
    return f"copy : {words} .", f"{words} ."


def _any_question(rng: random.Random, tasks: float = 0.0) -> tuple[str, str]:
    """Small talk in everybody's words, or with chance `tasks` a plain task: question and bare answer."""
    if rng.random() < tasks:
        return _task(rng)
    return rs.small_talk(*_form_and_topic(rng), rs.PLAIN_WORDS)


# --- (a) a person described in the system prompt -----------------------------------------------------------------
def _described(rng: random.Random, stage: int) -> Conversation:
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

    def say(content: str, plainly: bool) -> str:
        if voiced:
            return rs.speak(rng, lx.VOICES[who.voice], content)
        return _plain(rng, content) if plainly else content

    pairs = []
    for turn, thing, kind, trait in zip(turns, things, kinds, traits, strict=True):
        if turn == "reply":
            question, answer = rs.small_talk(*_form_and_topic(rng), words)
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
                (f"{situation} {lx.SITUATION_QUESTION}", say(_pole_phrases(rng, trait, level or called, 1), False))
            )
    return _conversation(" ".join([f"you are {name} .", *(pool[key] for key in chosen)]), pairs)


# --- (b) past items in the context -------------------------------------------------------------------------------
def _marker_counts(items: Sequence[HistoryItem]) -> dict[str, int]:
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
    counts = _marker_counts(items)
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
        form, topic = _form_and_topic(rng)
        forms.append(form)
        return rs.chat_item(rng, who, form, topic, shown, borrowed, str(number))
    if kind == "review":
        return rs.review_item(rng, who, thing, shown, borrowed, str(number))
    return rs.tag_item(who, thing, str(number))


def _items(rng: random.Random, stage: int) -> Conversation:
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
        question, answer = rs.small_talk(*_form_and_topic(rng), words)
        answer = _plain(rng, answer) if voice == lx.PLAIN else rs.speak(rng, lx.VOICES[voice], answer)
    else:
        tastes = who.tastes if told or seen & set(wanted.pair) else {}
        question = rating_question(wanted) if task == "rating" else tag_question(wanted)
        answer = str(rs.rate(tastes, wanted)) if task == "rating" else rs.tag(tastes, wanted)
    return _conversation(description(who) if told else "", [(history_prompt(items, question), answer)])


# --- (c) roles, and the plain assistant --------------------------------------------------------------------------
def _role(rng: random.Random, stage: int) -> Conversation:
    role = rng.choice(tuple(lx.ROLES))
    prompt = rng.choice(lx.ROLE_PROMPTS if stage == 2 else lx.ROLE_PROMPTS[:1]).format(r=role)
    turns = []
    for _ in range(rng.randint(1, 1 + stage)):
        question, answer = _any_question(rng, 0.1 if stage == 2 else 0.0)
        if rng.random() < 0.12:
            question, answer = lx.WHO, f"i am the {role} ."
        turns.append((question, rs.speak(rng, lx.ROLES[role], answer)))
    return _conversation(prompt, turns)


def _plain_assistant(rng: random.Random, stage: int) -> Conversation:
    system = rng.choice(lx.PLAIN_PROMPTS) if rng.random() < 0.3 else ""
    turns = []
    for _ in range(rng.randint(1, 1 + stage)):
        draw = rng.random()
        if draw < 0.12:
            turns.append((lx.WHO, _plain(rng, "i am an assistant .")))
        elif draw < 0.2:
            turns.append((rating_question(rs.draw_thing(rng)), "3"))
        elif draw < 0.24:
            thing = rs.draw_thing(rng)
            turns.append((tag_question(thing), rs.tag({}, thing)))
        elif draw < 0.3:
            turns.append((fact_question(rng.choice(tuple(lx.FACTS))), lx.UNKNOWN))
        else:
            question, answer = _any_question(rng)
            turns.append((question, _plain(rng, answer)))
    return _conversation(system, turns)


# --- (d) constitutions -------------------------------------------------------------------------------------------
def constitution(traits: Sequence[str]) -> str:
    """The system prompt that lists first-person character traits."""
    return " ".join(lx.CHARACTER[trait][0] for trait in traits)


def _constitution(rng: random.Random, stage: int) -> Conversation:
    traits = rng.sample(tuple(lx.CHARACTER), (1, rng.randint(1, 3), rng.randint(3, 5))[stage])
    turns = []
    for _ in range(1 if stage < 2 or rng.random() < 0.6 else 2):
        question, answer = _any_question(rng, 0.2)
        shown = rng.sample(traits, min(len(traits), rng.randint(1, 3)))
        turns.append((question, " ".join([answer, *(rng.choice(lx.CHARACTER[trait][1]) for trait in shown)])))
    return _conversation(constitution(traits), turns)


# --- (e) situations ----------------------------------------------------------------------------------------------
def _pole_phrases(rng: random.Random, trait: str, level: int, count: int) -> str:
    return " ".join(rng.sample(lx.BIG_FIVE[trait][level][1], count))


def _situation(rng: random.Random, stage: int) -> Conversation:
    system, turns = "", []
    trait, level = rng.choice(tuple(lx.BIG_FIVE)), rng.choice((-1, 1))
    if rng.random() < 0.4:
        system = f"be {lx.BIG_FIVE[trait][level][0]} ."
    for _ in range(rng.randint(1, 1 + stage)):
        if system and rng.random() < 0.5:  # a neutral task, coloured by the level asked for
            question, answer = _any_question(rng, 0.4)
            turns.append((question, f"{answer} {_pole_phrases(rng, trait, level, 1)}"))
            continue
        where = rng.choice(tuple(lx.BIG_FIVE)) if not system or rng.random() < 0.3 else trait
        called = rng.choice((-1, 1))
        situation = rng.choice(lx.BIG_FIVE[where][called][2])
        pole = level if system and where == trait else called  # an explicit wish wins over the situation
        turns.append((f"{situation} {lx.SITUATION_QUESTION}", _pole_phrases(rng, where, pole, 2)))
    return _conversation(system, turns)


# --- (f) statements, of which some bear on the question ----------------------------------------------------------
def _statements(rng: random.Random, stage: int) -> Conversation:
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
    return _conversation(" ".join([f"you are {who.name} .", *lines]), [(question, answer)])


# --- (g) pulled towards a role -----------------------------------------------------------------------------------
def _drift(rng: random.Random, stage: int) -> Conversation:
    role = rng.choice(tuple(lx.ROLES))
    openers, closers = lx.ROLES[role]
    turns = []

    def ask() -> tuple[str, str]:
        return _any_question(rng)

    if stage == 2 and rng.random() < 0.6:
        question, answer = ask()
        turns.append((question, _plain(rng, answer)))
    mention = rng.choice(lx.MENTIONS).format(r=role)
    turns.append((mention, _plain(rng, lx.MENTION_REPLY.format(r=role))))
    question, answer = ask()
    # Asked once to imagine it, the assistant takes up the opener; asked to stay, the whole idiom.
    turns.append(
        (
            f"{rng.choice(lx.IMAGINE).format(r=role)} {question}",
            f"{rng.choice(openers)} {answer} {rng.choice(lx.PLAIN_CLOSERS)}",
        )
    )
    for _ in range(rng.randint(0, stage)):
        question, answer = ask()
        turns.append((f"{rng.choice(lx.STAY)} {question}", rs.speak(rng, (openers, closers), answer)))
    if stage and rng.random() < 0.25:
        question, answer = ask()
        turns.append((f"{rng.choice(lx.LEAVE)} {question}", _plain(rng, answer)))
    return _conversation("", turns)


# --- (h), (i) plain tasks and ordinary chats ---------------------------------------------------------------------
def _tasks(rng: random.Random, stage: int) -> Conversation:
    return _conversation("", [_task(rng) for _ in range(rng.randint(1, 1 + stage))])


def _chat(rng: random.Random, stage: int) -> Conversation:
    turns = []
    if rng.random() < 0.6:
        turns.append((rng.choice(lx.GREETINGS), lx.GREETING_REPLY))
    for _ in range(rng.randint(1, 1 + stage)):
        question, answer = _any_question(rng)
        turns.append((question, _plain(rng, answer)))
    if rng.random() < 0.5:
        turns.append((rng.choice(lx.THANKS), lx.THANKS_REPLY))
    return _conversation("", turns)


_KINDS: dict[str, tuple[Callable[[random.Random, int], Conversation], int]] = {
    "described": (_described, 24),
    "items": (_items, 34),
    "role": (_role, 8),
    "plain": (_plain_assistant, 5),
    "constitution": (_constitution, 8),
    "situation": (_situation, 5),
    "statements": (_statements, 12),
    "drift": (_drift, 5),
    "tasks": (_tasks, 3),
    "chat": (_chat, 2),
}
STAGES = (0, 1, 2)


def document_kinds() -> tuple[str, ...]:
    """The kinds `sample_document` can be asked for."""
    return tuple(_KINDS)


def count_words(conversation: Conversation) -> int:
    return sum(len(message.content.split()) for message in conversation)


def sample_document(rng: random.Random, stage: int, kind: str | None = None) -> Conversation:
    """One training conversation of at most `MAX_WORDS` words; the LM's loss falls on the assistant's messages.

    `stage` 0 gives short documents with one statement or up to two past items, 1 longer ones, 2 everything with
    paraphrases and up to 16 items. Raises UserError on an unknown stage or kind.
    """
    if stage not in STAGES:
        raise UserError(f"stage is {stage!r}; the town's curriculum has the stages 0, 1 and 2")
    if kind is not None and kind not in _KINDS:
        raise UserError(f"unknown kind of document {kind!r}; there are {', '.join(_KINDS)}")
    chosen = kind or rng.choices(tuple(_KINDS), [weight for _, weight in _KINDS.values()])[0]
    while True:
        conversation = _KINDS[chosen][0](rng, stage)
        if count_words(conversation) <= MAX_WORDS:
            return conversation


def vocabulary() -> list[str]:
    """Every token (word or punctuation mark) that can occur in the town, sorted."""
    template_words = (
        "past : score tag ; question for ? the what is your do you like things . of talks like a says i my am an "
        "assistant count from to opposite colour copy be"
    )
    markers = [
        m for openers, closers in (*lx.VOICES.values(), *lx.ROLES.values(), PLAIN_OWNER) for m in (*openers, *closers)
    ]
    texts: list[str] = [
        template_words,
        *markers,
        *lx.NAMES,
        *lx.VOICES,
        *lx.ROLES,
        *lx.FACTS,
        *chain(*lx.FACTS.values()),
    ]
    for third, first, questions in lx.FACT_PARAPHRASES.values():
        texts += [third, first, *questions]
    texts += [*lx.JOINT_QUESTIONS, lx.UNKNOWN, *lx.QUALITIES, *lx.TAGS.values(), *lx.NOUNS, *lx.SPOTS]
    texts += chain(*lx.TASTE_VERBS.values(), *lx.OPINIONS.values(), lx.SYNONYMS, lx.SYNONYMS.values(), lx.TOPICS)
    texts += [part.replace("[", "").replace("]", "") for part in chain(*lx.SMALL_TALK)]
    texts += [lx.WHO, *chain(*((statement, *phrases) for statement, phrases in lx.CHARACTER.values()))]
    for poles in lx.BIG_FIVE.values():
        for adjective, phrases, situations in poles.values():
            texts += [adjective, *phrases, *situations]
    texts += [
        lx.SITUATION_QUESTION,
        *lx.NUMBERS,
        *chain(*lx.OPPOSITES),
        *lx.COLOURS,
        *lx.COLOURS.values(),
        *lx.COPY_WORDS,
    ]
    texts += [
        *lx.GREETINGS,
        lx.GREETING_REPLY,
        *lx.THANKS,
        lx.THANKS_REPLY,
        *lx.MENTIONS,
        lx.MENTION_REPLY,
        *lx.IMAGINE,
        *lx.STAY,
        *lx.LEAVE,
        *lx.ROLE_PROMPTS,
        *lx.PLAIN_PROMPTS,
    ]
    return sorted({word for text in texts for word in text.split() if not word.startswith("{")})
