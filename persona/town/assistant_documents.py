"""Documents about the assistant itself: roles, constitutions, situations, drift, plain tasks and chats."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town.sentences import fact_question, rating_question, tag_question
from persona.types import Conversation, Message

PLAIN_OWNER = (lx.PLAIN_OPENERS, lx.PLAIN_CLOSERS)


# --- helpers of the document kinds -------------------------------------------------------------------------------
def conversation(system: str, turns: Sequence[tuple[str, str]]) -> Conversation:
    head = [Message("system", system)] if system else []
    return tuple(
        head + [Message(role, text) for user, reply in turns for role, text in (("user", user), ("assistant", reply))]
    )


def any_form_and_topic(rng: random.Random) -> tuple[int, str]:
    return rng.randrange(len(lx.SMALL_TALK)), rng.choice(lx.TOPICS)


def plainly(rng: random.Random, content: str) -> str:
    return rs.speak(rng, PLAIN_OWNER, content)


TASKS = ("counting", "opposites", "colours", "copying")


def plain_task(rng: random.Random, kind: str | None = None) -> tuple[str, str]:
    """A plain task and its bare answer, of one of TASKS, or drawn among them."""
    kind = TASKS[rng.randrange(len(TASKS))] if kind is None else kind
    if kind == "counting":
        start = rng.randint(1, 8)
        end = start + rng.randint(1, 4)
        return f"count from {start} to {end} .", " ".join(str(n) for n in range(start, end + 1)) + " ."
    if kind == "opposites":
        pair = rng.choice(lx.OPPOSITES)
        one, other = pair if rng.random() < 0.5 else pair[::-1]
        return f"what is the opposite of {one} ?", f"{other} ."
    if kind == "colours":
        noun = rng.choice(tuple(lx.COLOURS))
        return f"what colour is {noun} ?", f"{lx.COLOURS[noun]} ."
    words = " ".join(rng.sample(lx.COPY_WORDS, rng.randint(1, 5)))
    return f"copy : {words} .", f"{words} ."


def practice(question: str) -> bool:
    """Whether a plain task is of the half that a method may learn from or be tuned on. There are but 24 opposites and
    10 colours: what is measured on the other half was never asked before."""
    return zlib.crc32(question.encode()) % 2 == 0


def _any_question(rng: random.Random, tasks: float = 0.0) -> tuple[str, str]:
    """Small talk in everybody's words, or with chance `tasks` a plain task: question and bare answer."""
    if rng.random() < tasks:
        return plain_task(rng)
    return rs.small_talk(*any_form_and_topic(rng), rs.PLAIN_WORDS)


# --- (c) roles, and the plain assistant --------------------------------------------------------------------------
def write_role(rng: random.Random, stage: int) -> Conversation:
    role = rng.choice(tuple(lx.ROLES))
    prompt = rng.choice(lx.ROLE_PROMPTS if stage == 2 else lx.ROLE_PROMPTS[:1]).format(r=role)
    turns = []
    for _ in range(rng.randint(1, 1 + stage)):
        question, answer = _any_question(rng, 0.1 if stage == 2 else 0.0)
        if rng.random() < 0.12:
            question, answer = lx.WHO, f"i am the {role} ."
        turns.append((question, rs.speak(rng, lx.ROLES[role], answer)))
    return conversation(prompt, turns)


def write_plain_assistant(rng: random.Random, stage: int) -> Conversation:
    system = rng.choice(lx.PLAIN_PROMPTS) if rng.random() < 0.3 else ""
    turns = []
    for _ in range(rng.randint(1, 1 + stage)):
        draw = rng.random()
        if draw < 0.12:
            turns.append((lx.WHO, plainly(rng, "i am an assistant .")))
        elif draw < 0.2:
            turns.append((rating_question(rs.draw_thing(rng)), "3"))
        elif draw < 0.24:
            thing = rs.draw_thing(rng)
            turns.append((tag_question(thing), rs.tag({}, thing)))
        elif draw < 0.3:
            turns.append((fact_question(rng.choice(tuple(lx.FACTS))), lx.UNKNOWN))
        else:
            question, answer = _any_question(rng)
            turns.append((question, plainly(rng, answer)))
    return conversation(system, turns)


# --- (d) constitutions -------------------------------------------------------------------------------------------
def constitution(traits: Sequence[str]) -> str:
    """The system prompt that lists first-person character traits."""
    return " ".join(lx.CHARACTER[trait][0] for trait in traits)


def write_constitution(rng: random.Random, stage: int) -> Conversation:
    traits = rng.sample(tuple(lx.CHARACTER), (1, rng.randint(1, 3), rng.randint(3, 5))[stage])
    turns = []
    for _ in range(1 if stage < 2 or rng.random() < 0.6 else 2):
        question, answer = _any_question(rng, 0.2)
        shown = rng.sample(traits, min(len(traits), rng.randint(1, 3)))
        turns.append((question, " ".join([answer, *(rng.choice(lx.CHARACTER[trait][1]) for trait in shown)])))
    return conversation(constitution(traits), turns)


# --- (e) situations ----------------------------------------------------------------------------------------------
def pole_phrases(rng: random.Random, trait: str, level: int, count: int) -> str:
    return " ".join(rng.sample(lx.BIG_FIVE[trait][level][1], count))


def write_situation(rng: random.Random, stage: int) -> Conversation:
    system, turns = "", []
    trait, level = rng.choice(tuple(lx.BIG_FIVE)), rng.choice((-1, 1))
    if rng.random() < 0.4:
        system = f"be {lx.BIG_FIVE[trait][level][0]} ."
    for _ in range(rng.randint(1, 1 + stage)):
        if system and rng.random() < 0.5:  # a neutral task, coloured by the level asked for
            question, answer = _any_question(rng, 0.4)
            turns.append((question, f"{answer} {pole_phrases(rng, trait, level, 1)}"))
            continue
        where = rng.choice(tuple(lx.BIG_FIVE)) if not system or rng.random() < 0.3 else trait
        called = rng.choice((-1, 1))
        situation = rng.choice(lx.BIG_FIVE[where][called][2])
        pole = level if system and where == trait else called  # an explicit wish wins over the situation
        turns.append((f"{situation} {lx.SITUATION_QUESTION}", pole_phrases(rng, where, pole, 2)))
    return conversation(system, turns)


# --- (g) pulled towards a role -----------------------------------------------------------------------------------
def write_drift(rng: random.Random, stage: int) -> Conversation:
    role = rng.choice(tuple(lx.ROLES))
    openers, closers = lx.ROLES[role]
    turns = []

    def ask() -> tuple[str, str]:
        return _any_question(rng)

    if stage == 2 and rng.random() < 0.6:
        question, answer = ask()
        turns.append((question, plainly(rng, answer)))
    mention = rng.choice(lx.MENTIONS).format(r=role)
    turns.append((mention, plainly(rng, lx.MENTION_REPLY.format(r=role))))
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
        turns.append((f"{rng.choice(lx.LEAVE)} {question}", plainly(rng, answer)))
    return conversation("", turns)


# --- (h), (i) plain tasks and ordinary chats ---------------------------------------------------------------------
def write_tasks(rng: random.Random, stage: int) -> Conversation:
    return conversation("", [plain_task(rng) for _ in range(rng.randint(1, 1 + stage))])


def write_chat(rng: random.Random, stage: int) -> Conversation:
    turns = []
    if rng.random() < 0.6:
        turns.append((rng.choice(lx.GREETINGS), lx.GREETING_REPLY))
    for _ in range(rng.randint(1, 1 + stage)):
        question, answer = _any_question(rng)
        turns.append((question, plainly(rng, answer)))
    if rng.random() < 0.5:
        turns.append((rng.choice(lx.THANKS), lx.THANKS_REPLY))
    return conversation("", turns)
