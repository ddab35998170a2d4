"""How town text is parsed: a text is read whole, as a row of sentences the grammar can write, or not at all.

`sentences(text)` gives the units of a text (see `Unit`); `statement` and `question` read a single sentence of that
sort. None always means unreadable: some part of the text is not of the town.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town.residents import Thing


class Unit(NamedTuple):
    """One sentence read back. What `key` and `value` are depends on `kind`:

    marker: (owner kind "voice" | "role" | "plain", owner name); talk: (form, {base: word}); fact: (kind, value);
    taste: (quality, level); character: (trait, phrase); pole: (trait, level); thing: (Thing, "");
    opinion, score: (rating, ""); tag: (label, ""); who: (role or "assistant", "");
    words: (tuple of words, ""); voice: (voice, ""); vocabulary: (tuple of words, "");
    unknown, life, courtesy: ("", "").
    """

    kind: str
    key: object
    value: object = ""


Slots = dict[str, str]


@dataclass(frozen=True)
class Pattern:
    """Literal words and slots; a slot is (name, allowed words)."""

    parts: tuple[str | tuple[str, frozenset[str]], ...]
    read: Callable[[Slots], Unit]

    def match(self, words: Sequence[str], start: int) -> Slots | None:
        if start + len(self.parts) > len(words):
            return None
        slots: Slots = {}
        for part, word in zip(self.parts, words[start:], strict=False):
            if isinstance(part, str):
                if part != word:
                    return None
            elif word in part[1]:
                slots[part[0]] = word
            else:
                return None
        return slots


def _pattern(template: str, read: Callable[[Slots], Unit], **slots: Sequence[str]) -> Pattern:
    """`template` with its {name} words turned into slots."""
    parts = tuple(
        (word[1:-1], frozenset(slots[word[1:-1]])) if word.startswith("{") else word for word in template.split()
    )
    return Pattern(parts, read)


def _fixed(template: str, kind: str, key: object = "", value: object = "") -> Pattern:
    unit = Unit(kind, key, value)
    return _pattern(template, lambda slots: unit)


class Parser:
    """Patterns filed under their first word (or under "" where that is a slot)."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._filed: dict[str, list[Pattern]] = {}
        for pattern in patterns:
            first = pattern.parts[0]
            self._filed.setdefault(first if isinstance(first, str) else "", []).append(pattern)

    def at(self, words: Sequence[str], start: int) -> list[tuple[Unit, int]]:
        """Every sentence that begins at `start`, with the position behind it."""
        found = []
        for pattern in (*self._filed.get(words[start], ()), *self._filed.get("", ())):
            slots = pattern.match(words, start)
            if slots is not None:
                found.append((pattern.read(slots), start + len(pattern.parts)))
        return found

    def whole(self, words: Sequence[str]) -> tuple[Unit, ...] | None:
        """The first way to read all the words, or None. An opener must be followed by something."""
        dead: set[int] = set()

        def walk(start: int) -> list[Unit] | None:
            if start == len(words):
                return []
            if start in dead:
                return None
            for unit, end in self.at(words, start):
                if end == len(words) and words[-1] == ",":
                    continue
                rest = walk(end)
                if rest is not None:
                    return [unit, *rest]
            dead.add(start)
            return None

        units = walk(0) if words else None
        return tuple(units) if units else None


_GRADED = (*lx.TAGS.values(),)
_ANSWER_WORDS = tuple(
    {word for pair in lx.OPPOSITES for word in pair} | set(lx.COLOURS.values()) | set(lx.COPY_WORDS) | set(lx.NUMBERS)
)
_LEVEL_OF = {adjective: (trait, level) for trait, poles in lx.BIG_FIVE.items()
             for level, (adjective, _, _) in poles.items()}  # fmt: skip
_SPOKEN = {word: base for base, other in lx.SYNONYMS.items() for word in (base, other)}


def _thing(slots: Slots, spot: str) -> Thing:
    return Thing(slots["a"], slots["b"], slots["noun"], spot)


def _thing_patterns(template: str, kind: str) -> list[Pattern]:
    """`template` holds {thing}; one pattern without a spot and one for each spot."""
    found = []
    for spot in ("", *lx.SPOTS):
        text = template.replace("{thing}", f"the {{a}} {{b}} {{noun}} {spot}")
        found.append(_pattern(text, lambda slots, spot=spot: Unit(kind, _thing(slots, spot)),  # type: ignore[misc]
                              a=lx.QUALITIES, b=lx.QUALITIES, noun=lx.NOUNS))  # fmt: skip
    return found


def _marker_patterns() -> list[Pattern]:
    owners = [("voice", name, marks) for name, marks in lx.VOICES.items()]
    owners += [("role", name, marks) for name, marks in lx.ROLES.items()]
    owners.append(("plain", lx.PLAIN, (lx.PLAIN_OPENERS, lx.PLAIN_CLOSERS)))
    return [_fixed(marker, "marker", kind, name) for kind, name, (openers, closers) in owners
            for marker in (*openers, *closers)]  # fmt: skip


def _fact_patterns(templates: Mapping[str, Sequence[str]]) -> list[Pattern]:
    return [_pattern(template, lambda slots, kind=kind: Unit("fact", kind, slots["v"]),  # type: ignore[misc]
                     v=lx.FACTS[kind], n=lx.NAMES)
            for kind, forms in templates.items() for template in forms]  # fmt: skip


def _taste_patterns(subject: str, form: int) -> list[Pattern]:
    return [_pattern(f"{subject} {verbs[form]} {{q}} things .",
                     lambda slots, level=level: Unit("taste", slots["q"], level),  # type: ignore[misc]
                     q=lx.QUALITIES, n=lx.NAMES) for level, verbs in lx.TASTE_VERBS.items()]  # fmt: skip


def _talk(form: int, answer: str) -> Pattern:
    base = rs.base_word(form)
    return _pattern(answer.replace(f"[{base}]", "{w}"), lambda slots: Unit("talk", form, {base: slots["w"]}),
                    w=(base, lx.SYNONYMS[base]), t=lx.TOPICS)  # fmt: skip


def _own_words() -> list[Pattern]:
    """First-person sentences, markers, reviews, bare answers: what an assistant's message or a past item holds."""
    found = _marker_patterns()
    found += [_talk(form, answer) for form, (_, answer) in enumerate(lx.SMALL_TALK)]
    found += _fact_patterns({kind: (f"my {kind} is {{v}} .", lx.FACT_PARAPHRASES[kind][1]) for kind in lx.FACTS})
    found += _taste_patterns("i", 1)
    found += [_fixed(phrase, "character", trait, phrase) for trait, (_, phrases) in lx.CHARACTER.items()
              for phrase in phrases]  # fmt: skip
    found += [_fixed(phrase, "pole", trait, level) for trait, poles in lx.BIG_FIVE.items()
              for level, (_, phrases, _) in poles.items() for phrase in phrases]  # fmt: skip
    found += _thing_patterns("{thing} .", "thing")
    found += [_fixed(wording, "opinion", rating) for rating, wordings in lx.OPINIONS.items() for wording in wordings]
    found += [_fixed(f"score : {rating}", "score", rating) for rating in lx.OPINIONS]
    found += [_fixed(f"tag : {label}", "tag", label) for label in _GRADED]
    found += [_fixed(f"i am the {role} .", "who", role) for role in lx.ROLES]
    found += [_fixed("i am an assistant .", "who", "assistant")]
    found += [_pattern(lx.MENTION_REPLY, lambda slots: Unit("life", ""), r=tuple(lx.ROLES))]
    found += [_pattern(template.replace("{r}", "{role}"), lambda slots: Unit("life", ""), role=tuple(lx.ROLES))
              for template in lx.MENTIONS]  # fmt: skip
    found += [_fixed(text, "courtesy") for text in (*lx.GREETINGS, lx.GREETING_REPLY, *lx.THANKS, lx.THANKS_REPLY)]
    found += [_fixed(lx.UNKNOWN, "unknown")]
    for count in range(1, 6):
        slots = {f"w{i}": _ANSWER_WORDS for i in range(count)}
        found.append(_pattern(" ".join([*(f"{{{name}}}" for name in slots), "."]),
                              lambda slots: Unit("words", tuple(slots.values())), **slots))  # fmt: skip
    return found


def _statement_forms() -> list[Pattern]:
    """Sentences that say something about a person: third person, first person, or a line of a constitution."""
    found = [_pattern(f"{{n}} talks like a {voice} .", lambda slots, voice=voice: Unit("voice", voice),  # type: ignore
                      n=lx.NAMES) for voice in lx.VOICES]  # fmt: skip
    found += _fact_patterns({kind: (f"the {kind} of {{n}} is {{v}} .", *lx.FACT_PARAPHRASES[kind][:2],
                                    f"my {kind} is {{v}} .") for kind in lx.FACTS})  # fmt: skip
    found += _taste_patterns("{n}", 0) + _taste_patterns("i", 1)
    found += [_pattern("{n} is {adjective} .", lambda slots: Unit("pole", *_LEVEL_OF[slots["adjective"]]),
                       n=lx.NAMES, adjective=tuple(_LEVEL_OF))]  # fmt: skip
    slots = {f"w{i}": pair for i, pair in enumerate(lx.SYNONYMS.items())}
    found += [_pattern(" ".join(["{n} says", *(f"{{{name}}}" for name in slots), "."]),
                       lambda slots: Unit("vocabulary", tuple(w for k, w in slots.items() if k != "n")),
                       n=lx.NAMES, **slots)]  # fmt: skip
    found += [_fixed(line, "character", trait) for trait, (line, _) in lx.CHARACTER.items()]
    return found


def _question_forms() -> list[Pattern]:
    """Questions; the unit's key says what they ask for."""
    found = [_pattern(ask, lambda slots: Unit("talk", ""), t=lx.TOPICS) for ask, _ in lx.SMALL_TALK]
    found += [_fixed(text, "facts", (kind,)) for kind in lx.FACTS
              for text in (f"what is your {kind} ?", *lx.FACT_PARAPHRASES[kind][2])]  # fmt: skip
    found += [_fixed(text, "facts", kinds) for text, kinds in lx.JOINT_QUESTIONS.items()]
    found += [_pattern("do you like {q} things ?", lambda slots: Unit("tastes", (slots["q"],)), q=lx.QUALITIES)]
    found += _thing_patterns("score for {thing} ?", "thing") + _thing_patterns("tag for {thing} ?", "thing")
    found += [_fixed(f"{situation} {lx.SITUATION_QUESTION}", "situation", trait)
              for trait, poles in lx.BIG_FIVE.items()
              for _, _, situations in poles.values() for situation in situations]  # fmt: skip
    found += [_fixed(lx.WHO, "talk")]
    found += [_fixed(text, "talk") for text in (*lx.GREETINGS, *lx.THANKS)]
    found += [_pattern(text, lambda slots: Unit("talk", ""), r=tuple(lx.ROLES)) for text in lx.MENTIONS]
    found += [_pattern("count from {a} to {b} .", lambda slots: Unit("task", ""), a=lx.NUMBERS, b=lx.NUMBERS)]
    words = tuple(word for pair in lx.OPPOSITES for word in pair)
    found += [_pattern("what is the opposite of {w} ?", lambda slots: Unit("task", ""), w=words)]
    found += [_pattern("what colour is {w} ?", lambda slots: Unit("task", ""), w=tuple(lx.COLOURS))]
    for count in range(1, 6):
        slots = {f"w{i}": lx.COPY_WORDS for i in range(count)}
        found.append(_pattern(" ".join(["copy :", *(f"{{{name}}}" for name in slots), "."]),
                              lambda slots: Unit("task", ""), **slots))  # fmt: skip
    lead_ins = (*lx.IMAGINE, *lx.STAY, *lx.LEAVE)
    found += [_pattern(text, lambda slots: Unit("lead-in", ""), r=tuple(lx.ROLES)) for text in lead_ins]
    return found


_OWN = Parser(_own_words())
_STATEMENTS = Parser(_statement_forms())
_QUESTIONS = Parser(_question_forms())


@lru_cache(maxsize=4096)
def sentences(text: str) -> tuple[Unit, ...] | None:
    """The sentences of a reply, an item of a history or a bare answer ("4", "calm"); None when it is not town text."""
    words = text.split()
    if len(words) == 1 and words[0] in _GRADED:
        return (Unit("tag", words[0]),)
    if len(words) == 1 and words[0] in {str(rating) for rating in lx.OPINIONS}:
        return (Unit("score", int(words[0])),)
    return _OWN.whole(words)


def statement(text: str) -> Unit | None:
    """What a single statement about a person says: a unit of kind voice, fact, taste, pole, vocabulary, character."""
    units = _STATEMENTS.whole(text.split())
    return units[0] if units and len(units) == 1 else None


def question(text: str) -> Unit | None:
    """What a user's message asks for (past items before it and lead-ins to a role are passed over).

    The unit's kind is talk, facts (key: the kinds), tastes (the qualities), thing, situation (the trait) or task.
    """
    asked = text.rpartition(" ; question : ")[2]
    units = [unit for unit in _QUESTIONS.whole(asked.split()) or () if unit.kind != "lead-in"]
    return units[0] if len(units) == 1 else None
