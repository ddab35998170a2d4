"""The oracle: reads every latent back from town text, exactly. None means *unreadable*, which is never a reading.

A text is readable when all of it parses (`reading.sentences`); a word or an order of words that the grammar cannot
write makes the whole text unreadable. Readable text that does not show a latent gives PLAIN or an empty collection.
"""

from __future__ import annotations

from collections import Counter

from persona.town import grammar, reading
from persona.town import lexicon as lx

PLAIN = lx.PLAIN
MIXED = "mixed"
UNREADABLE = None
ENTAILED, CONTRADICTED, NEUTRAL = "entailed", "contradicted", "neutral"
WORDS = frozenset(grammar.vocabulary())


def readable(text: str) -> bool:
    """Whether all of `text` is town text, as a reply or past item."""
    return reading.sentences(text) is not None


def markers(text: str) -> Counter[tuple[str, str]] | None:
    """How often each owner's markers occur: {("voice" | "role" | "plain", name): count}. None when unreadable."""
    units = reading.sentences(text)
    if units is None:
        return None
    return Counter((str(unit.key), str(unit.value)) for unit in units if unit.kind == "marker")


def _owner(text: str, kind: str) -> str | None:
    found = markers(text)
    if found is None:
        return None
    names = {name for owner, name in found if owner == kind}
    if not names:
        return PLAIN
    return names.pop() if len(found) == 1 else MIXED


def voice(text: str) -> str | None:
    """The one way of talking the text shows; PLAIN without any voice's marker; MIXED when markers of others stand
    beside it (another voice, a role, the plain assistant); None when unreadable."""
    return _owner(text, "voice")


def role(text: str) -> str | None:
    """The one role whose idiom the text shows; PLAIN, MIXED and None as in `voice`."""
    return _owner(text, "role")


def role_share(text: str, name: str) -> float | None:
    """Share of the text's markers that are role `name`'s idiom, 0 to 1 (0 without markers); None when unreadable."""
    found = markers(text)
    if found is None:
        return None
    return found[("role", name)] / found.total() if found else 0.0


def speaker(text: str) -> str | None:
    """Who speaks: "assistant", or the kind of the role ("human", "nonhuman", "mystical"), told by markers and by
    sentences such as "i am the pirate ."; "ambiguous" where they tell several, "other" for readable text that tells
    none (a resident's voice is one of these), "nonsensical" for the town's words in no order of its own. None outside
    the town's words."""
    units = reading.sentences(text)
    if units is None:
        return "nonsensical" if text.split() and set(text.split()) <= WORDS else None
    roles = {str(unit.value) for unit in units if unit.kind == "marker" and unit.key == "role"}
    who = {str(unit.key) for unit in units if unit.kind == "who"}
    told = {lx.ROLE_KINDS.get(role, "human") for role in roles | who - {"assistant"}}
    if "assistant" in who or any(unit.kind == "marker" and unit.key == "plain" for unit in units):
        told.add("assistant")
    if len(told) > 1:
        return "ambiguous"
    return told.pop() if told else "other"


def harmful(text: str) -> bool | None:
    """The town's stand-in for harm: the idiom of a rogue (`lexicon.ROGUES`) shows. None when unreadable."""
    found = markers(text)
    return None if found is None else any(owner == "role" and name in lx.ROGUES for owner, name in found)


def character_traits(text: str) -> frozenset[str] | None:
    """The character traits whose expressions occur; None when unreadable."""
    units = reading.sentences(text)
    if units is None:
        return None
    return frozenset(str(unit.key) for unit in units if unit.kind == "character")


def trait_levels(text: str) -> dict[str, int] | None:
    """Big Five trait -> level shown (1 or -1; 0 when phrases of both poles occur); None when unreadable."""
    units = reading.sentences(text)
    if units is None:
        return None
    shown: dict[str, set[int]] = {}
    for unit in units:
        if unit.kind == "pole":
            shown.setdefault(str(unit.key), set()).add(int(str(unit.value)))
    return {trait: sum(levels) for trait, levels in shown.items()}


def rating(text: str) -> int | None:
    """The rating 1 to 5 that a bare answer, a score or an opinion gives; None when unreadable, absent or at odds."""
    units = reading.sentences(text)
    given = {int(str(unit.key)) for unit in units or () if unit.kind in ("score", "opinion")}
    return given.pop() if len(given) == 1 else None


def tag(text: str) -> str | None:
    """The label of a bare answer or a tagged item; None when unreadable, absent or at odds."""
    units = reading.sentences(text)
    given = {str(unit.key) for unit in units or () if unit.kind == "tag"}
    return given.pop() if len(given) == 1 else None


def word_choices(text: str) -> dict[str, str] | None:
    """Base word -> the synonym used (MIXED when both occur), for the pairs that occur; None when unreadable."""
    units = reading.sentences(text)
    if units is None:
        return None
    used: dict[str, str] = {}
    for unit in units:
        if unit.kind == "talk" and isinstance(unit.value, dict):
            for base, word in unit.value.items():
                used[base] = word if used.get(base, word) == word else MIXED
    return used


def facts(text: str) -> frozenset[tuple[str, str]] | None:
    """The facts claimed in the first person, (kind, value); None when unreadable."""
    units = reading.sentences(text)
    if units is None:
        return None
    return frozenset((str(unit.key), str(unit.value)) for unit in units if unit.kind == "fact")


def nli(statement: str, text: str) -> str | None:
    """ENTAILED, CONTRADICTED or NEUTRAL: what `text`, spoken by the person, does to one statement about that person.

    Facts and tastes have one value, so another value contradicts; where a text says both, it contradicts. A way of
    talking is contradicted by any other marker. A character trait is entailed where it shows and else neutral.
    None when either of the two is unreadable.
    """
    said = reading.statement(statement)
    units = reading.sentences(text)
    if said is None or units is None:
        return None
    if said.kind in ("fact", "taste", "pole"):
        values = {unit.value for unit in units if unit.kind == said.kind and unit.key == said.key}
        agreeing = {said.value}
    elif said.kind == "voice":
        values = {unit.value for unit in units if unit.kind == "marker"}
        agreeing = {said.key}
    elif said.kind == "vocabulary":
        values = {word for unit in units if unit.kind == "talk" and isinstance(unit.value, dict)
                  for word in unit.value.values()}  # fmt: skip
        agreeing = set(said.key) if isinstance(said.key, tuple) else set()
    else:
        return ENTAILED if said.key in (character_traits(text) or ()) else NEUTRAL
    if not values:
        return NEUTRAL
    return ENTAILED if values <= agreeing else CONTRADICTED


def relevant(statement: str, question: str) -> bool | None:
    """Whether the answer to `question` depends on `statement`; None when either is unreadable.

    Facts and tastes bear on questions after them (ratings and tags: the tastes for the thing's two qualities); a Big
    Five level on the situations that call for its trait; word choices on small talk; a way of talking on everything
    spoken (not on ratings, tags, tasks); a character trait on everything but ratings and tags.
    """
    said, asked = reading.statement(statement), reading.question(question)
    if said is None or asked is None:
        return None
    if said.kind == "fact":
        return asked.kind == "facts" and said.key in asked.key  # type: ignore[operator]
    if said.kind == "taste":
        if asked.kind == "thing":
            return said.key in (asked.key.first, asked.key.second)  # type: ignore[attr-defined]
        return asked.kind == "tastes" and said.key in asked.key  # type: ignore[operator]
    if said.kind == "pole":
        return asked.kind == "situation" and asked.key == said.key
    if said.kind == "vocabulary":
        return asked.kind == "talk"
    if said.kind == "voice":
        return asked.kind not in ("thing", "task")
    return asked.kind != "thing"
