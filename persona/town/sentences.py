"""Single sentences and prompts of the town: past items in a prompt, questions, statements about a person, answers."""

from __future__ import annotations

from collections.abc import Sequence

from persona.town import lexicon as lx
from persona.town.residents import Latents, Thing
from persona.types import HistoryItem


# --- prompts -----------------------------------------------------------------------------------------------------
def item_text_with_label(item: HistoryItem) -> str:
    """A past item as it stands in a prompt: a reply as it is, a review with its score, a tagged thing with its tag."""
    if item.label is None:
        return item.text
    return f"{item.text} {'score' if item.label in lx.NUMBERS else 'tag'} : {item.label}"


def history_prompt(items: Sequence[HistoryItem], question: str) -> str:
    """The user message that gives past items (with their labels) before the question; the question alone without."""
    if not items:
        return question
    return " ; ".join(["past : " + item_text_with_label(items[0]), *map(item_text_with_label, items[1:])]) + (
        f" ; question : {question}"
    )


def rating_question(thing: Thing) -> str:
    return f"score for {thing.phrase} ?"


def tag_question(thing: Thing) -> str:
    return f"tag for {thing.phrase} ?"


def fact_question(kind: str) -> str:
    return f"what is your {kind} ?"


def taste_question(quality: str) -> str:
    return f"do you like {quality} things ?"


# --- statements about a person -----------------------------------------------------------------------------------
def fact_statement(name: str, kind: str, value: str, paraphrase: bool = False) -> str:
    """Third person: "the pet of ada is cat ." or "ada keeps a cat at home ."."""
    if paraphrase:
        return lx.FACT_PARAPHRASES[kind][0].format(n=name, v=value)
    return f"the {kind} of {name} is {value} ."


def taste_statement(name: str, quality: str, level: int) -> str:
    return f"{name} {lx.TASTE_VERBS[level][0]} {quality} things ."


def voice_statement(name: str, voice: str) -> str:
    return f"{name} talks like a {voice} ."


def trait_statement(name: str, trait: str, level: int) -> str:
    return f"{name} is {lx.BIG_FIVE[trait][level][0]} ."


def words_statement(name: str, words: Sequence[str]) -> str:
    return f"{name} says {' '.join(words)} ."


def fact_answer(kind: str, value: str) -> str:
    return f"my {kind} is {value} ."


def taste_answer(quality: str, level: int) -> str:
    return f"i {lx.TASTE_VERBS[level][1]} {quality} things ."


def statements(who: Latents, paraphrase: bool = False) -> tuple[str, ...]:
    """Everything about a person in third-person sentences: voice, tastes that are not 0, facts, Big Five, words."""
    name = who.name
    return (
        voice_statement(name, who.voice),
        *(taste_statement(name, quality, level) for quality, level in who.tastes.items() if level),
        *(fact_statement(name, kind, value, paraphrase) for kind, value in who.facts.items()),
        *(trait_statement(name, trait, level) for trait, level in who.traits.items() if level),
        words_statement(name, list(who.words.values())),
    )


def description(who: Latents) -> str:
    """The system prompt that tells all: the upper bound, which no method is shown."""
    return " ".join((f"you are {who.name} .", *statements(who)))
