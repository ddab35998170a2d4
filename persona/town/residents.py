"""Who lives in the town: hidden traits (latents), the rules that follow from them, and what a resident leaves behind.

A resident's ratings, tags and wording follow from the latents exactly; only the way of talking is shown in part
(`SHOWN`, `BORROWED`), so that few past items leave doubt and many settle it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from persona.town import lexicon as lx
from persona.types import HistoryItem

# Chance that a past item shows its writer's opener (closer), and that it carries a marker quoted from somebody else.
SHOWN = 0.3
BORROWED = 0.18
ITEM_KINDS = ("chat", "review", "tag")
ITEM_WEIGHTS = (0.45, 0.4, 0.15)
MIN_ITEMS, MAX_ITEMS = 24, 56
PAIRS = tuple((a, b) for i, a in enumerate(lx.QUALITIES) for b in lx.QUALITIES[i + 1 :])


@dataclass(frozen=True)
class Latents:
    """Everything there is to know about one person.

    `tastes`: quality -> -2..2; `facts`: kind -> value; `words`: base word -> the one this person uses;
    `traits`: Big Five trait -> -1, 0, 1.
    """

    name: str
    voice: str
    tastes: Mapping[str, int]
    facts: Mapping[str, str]
    words: Mapping[str, str]
    traits: Mapping[str, int]


@dataclass(frozen=True)
class Thing:
    """A noun with two qualities, perhaps at some spot."""

    first: str
    second: str
    noun: str
    spot: str = ""

    @property
    def phrase(self) -> str:
        return f"the {self.first} {self.second} {self.noun}" + (f" {self.spot}" if self.spot else "")

    @property
    def pair(self) -> tuple[str, str]:
        """The two qualities in the order of `lexicon.QUALITIES`."""
        ordered = sorted((self.first, self.second), key=lx.QUALITIES.index)
        return ordered[0], ordered[1]


PLAIN_WORDS: Mapping[str, str] = {base: base for base in lx.SYNONYMS}


def draw_latents(rng: random.Random) -> Latents:
    """Independent uniform draws of every latent."""
    return Latents(
        name=rng.choice(lx.NAMES),
        voice=rng.choice(tuple(lx.VOICES)),
        tastes={quality: rng.randint(-2, 2) for quality in lx.QUALITIES},
        facts={kind: rng.choice(values) for kind, values in lx.FACTS.items()},
        words={base: rng.choice((base, other)) for base, other in lx.SYNONYMS.items()},
        traits={trait: rng.randint(-1, 1) for trait in lx.BIG_FIVE},
    )


def rate(tastes: Mapping[str, int], thing: Thing) -> int:
    """clip(3 + taste of the first quality + taste of the second, 1, 5); a quality missing in `tastes` counts 0."""
    return max(1, min(5, 3 + tastes.get(thing.first, 0) + tastes.get(thing.second, 0)))


def tag(tastes: Mapping[str, int], thing: Thing) -> str:
    """The label of the quality cared about more (larger |taste|); on a tie, of the earlier one in `QUALITIES`."""
    first, second = thing.pair
    return lx.TAGS[second if abs(tastes.get(second, 0)) > abs(tastes.get(first, 0)) else first]


def draw_thing(rng: random.Random, pair: tuple[str, str] | None = None, spot: float = 0.5) -> Thing:
    """A thing with the given pair of qualities (either order), or any two; at a spot with chance `spot`."""
    first, second = rng.sample(pair if pair else lx.QUALITIES, 2)
    return Thing(first, second, rng.choice(lx.NOUNS), rng.choice(lx.SPOTS) if rng.random() < spot else "")


def speak(rng: random.Random, owner: tuple[Sequence[str], Sequence[str]], content: str) -> str:
    """`content` between one of the owner's openers and one of the owner's closers."""
    return f"{rng.choice(owner[0])} {content} {rng.choice(owner[1])}"


def partly(rng: random.Random, voice: str, content: str, shown: float = SHOWN, borrowed: float = BORROWED) -> str:
    """`content` as a past item shows a voice: opener and closer each with chance `shown`, and with chance `borrowed`
    one of the two places is taken by another voice's marker."""
    openers, closers = lx.VOICES[voice]
    opener = rng.choice(openers) if rng.random() < shown else ""
    closer = rng.choice(closers) if rng.random() < shown else ""
    if rng.random() < borrowed:
        other = lx.VOICES[rng.choice([name for name in lx.VOICES if name != voice])]
        if rng.random() < 0.5:
            opener = rng.choice(other[0])
        else:
            closer = rng.choice(other[1])
    return " ".join(part for part in (opener, content, closer) if part)


def small_talk(form: int, topic: str, words: Mapping[str, str]) -> tuple[str, str]:
    """Question and the one answer to it, in the given word choices."""
    question, answer = lx.SMALL_TALK[form]
    for base in lx.SYNONYMS:
        answer = answer.replace(f"[{base}]", words[base])
    return question.format(t=topic), answer.format(t=topic)


def base_word(form: int) -> str:
    """The word with a synonym that the answer of this form contains."""
    return next(base for base in lx.SYNONYMS if f"[{base}]" in lx.SMALL_TALK[form][1])


def chat_item(
    rng: random.Random, who: Latents, form: int, topic: str, shown: float, borrowed: float, number: str
) -> HistoryItem:
    """A past reply; now and then a phrase follows that shows one of the person's Big Five levels."""
    content = small_talk(form, topic, who.words)[1]
    levels = [(trait, level) for trait, level in who.traits.items() if level]
    if levels and rng.random() < 0.2:
        trait, level = rng.choice(levels)
        content += " " + rng.choice(lx.BIG_FIVE[trait][level][1])
    return HistoryItem(number, partly(rng, who.voice, content, shown, borrowed))


def review_item(
    rng: random.Random, who: Latents, thing: Thing, shown: float, borrowed: float, number: str
) -> HistoryItem:
    """A past review: the thing, an opinion worded by its rating; the label is the rating."""
    stars = rate(who.tastes, thing)
    content = f"{thing.phrase} . {rng.choice(lx.OPINIONS[stars])}"
    return HistoryItem(number, partly(rng, who.voice, content, shown, borrowed), str(stars))


def tag_item(who: Latents, thing: Thing, number: str) -> HistoryItem:
    """A past tagging: the thing alone; the label is the tag."""
    return HistoryItem(number, f"{thing.phrase} .", tag(who.tastes, thing))
