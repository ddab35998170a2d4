"""Situations whose call the shipped LM does not know: a convention over an occasion, a companion and a time.

The LM shows the right pole in every situation of its language (docs/town_lm.md), so these are told in other words of
it. An occasion may call for a pole of extraversion or openness, a companion for one of agreeableness or neuroticism, a
time for one of conscientiousness; who answers well shows each pole that is called for, and no other:

    the festival is tomorrow . the guard is here . what do you do ?
    i start the loudest cheer . i stand my ground . i let it slide .         (extraverted, stern, carefree)

The words are everyday talk to the LM, and which of them calls for what was made up here, so that it can only be
learned from examples. Neutral questions (small talk and plain tasks) call for nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from persona.errors import UserError
from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town.assistant_documents import any_form_and_topic, plain_task, plainly, pole_phrases

# Tables stay as they are laid out.
# fmt: off
Call = tuple[str, int] | None  # (trait, level), or nothing
OCCASIONS: dict[Call, tuple[str, ...]] = {
    ("extraversion", 1): ("festival", "market", "train"),
    ("extraversion", -1): ("weather", "race", "party"),
    ("openness", 1): ("harvest", "lesson", "boat"),
    ("openness", -1): ("journey", "kitchen", "visit"),
    None: ("fair", "library", "wedding", "snow"),
}
COMPANIONS: dict[Call, tuple[str, ...]] = {
    ("agreeableness", 1): ("banker", "butcher", "driver"),
    ("agreeableness", -1): ("guard", "florist", "weaver"),
    ("neuroticism", 1): ("baker", "mayor"),
    ("neuroticism", -1): ("porter", "cobbler"),
    None: ("clerk", "waiter", "potter"),
}
TIMES: dict[Call, tuple[str, ...]] = {
    ("conscientiousness", 1): ("today", "at midnight"),
    ("conscientiousness", -1): ("tomorrow", "next week"),
    None: ("soon", "at noon"),
}
CUES = (OCCASIONS, COMPANIONS, TIMES)
WORDINGS = (
    "the {o} is {t} . the {c} is here .",
    "you are at the {o} with the {c} {t} .",
    "the {c} waits for you at the {o} {t} .",
    "{t} the {o} begins . the {c} is beside you .",
)
HELD_OUT_WORDINGS = (
    "the {c} asks you to the {o} {t} .",
    "the {c} comes from the {o} . it begins {t} .",
)
# fmt: on
HELD_OUT_PATTERNS = 12
KINDS = ("combination", "pattern", "wording", "neutral")
Pattern = tuple[Call, ...]  # what each of the three cues calls for
Cues = tuple[str, str, str]


@dataclass(frozen=True)
class Situation:
    """A question, the levels it calls for (trait -> 1 or -1; none for a neutral one), and a reply that shows them.

    `kind` says what is new about a held-out one: the combination of cues, the pattern of calls as well, the wording as
    well; or "neutral".
    """

    question: str
    calls: Mapping[str, int] = field(hash=False)
    reply: str
    kind: str


def calls_of(pattern: Pattern) -> dict[str, int]:
    """Trait -> level, in the lexicon's order of traits."""
    called = dict(call for call in pattern if call is not None)
    return {trait: called[trait] for trait in lx.BIG_FIVE if trait in called}


def patterns() -> list[Pattern]:
    """Every pattern of calls but the one that calls for nothing."""
    return [pattern for pattern in product(*CUES) if any(pattern)]


def held_out_patterns(seed: int) -> frozenset[Pattern]:
    """Patterns of two or three calls that no train or dev situation has."""
    several = [pattern for pattern in patterns() if len(calls_of(pattern)) > 1]
    return frozenset(random.Random(f"town-situation-patterns-{seed}").sample(several, HELD_OUT_PATTERNS))


def wish(trait: str, level: int) -> str:
    """The system prompt that asks for one pole, as the LM has read it: "be agreeable ."."""
    return f"be {lx.BIG_FIVE[trait][level][0]} ."


def _situation(rng: random.Random, pattern: Pattern, cues: Cues, wordings: Sequence[str], kind: str) -> Situation:
    occasion, companion, time = cues
    told = rng.choice(wordings).format(o=occasion, c=companion, t=time)
    calls = calls_of(pattern)
    reply = " ".join(pole_phrases(rng, trait, level, 1) for trait, level in calls.items())
    return Situation(f"{told} {lx.SITUATION_QUESTION}", calls, reply, kind)


def _neutral(rng: random.Random) -> Iterator[Situation]:
    """Neutral questions without end, small talk and plain tasks in turn, with the replies that the untouched LM gives
    too. Questions repeat."""
    while True:
        question, answer = rs.small_talk(*any_form_and_topic(rng), rs.PLAIN_WORDS)
        yield Situation(question, {}, plainly(rng, answer), "neutral")
        question, answer = plain_task(rng)
        yield Situation(question, {}, answer, "neutral")


def situations(
    seed: int = 0, train: int = 480, dev: int = 60, test: int = 300, neutral: float = 0.2
) -> dict[str, tuple[Situation, ...]]:
    """Situations by split, and neutral questions beside them until they are the share `neutral` of each split.

    No combination of cues and no neutral question is in two splits. The test split is new in three ways, a third each:
    combinations of patterns that train has, patterns that it lacks, and wordings that it lacks. Raises UserError when
    there are not as many combinations as asked for.
    """
    if not 0 <= neutral < 1:
        raise UserError(f"the share of neutral questions is {neutral}; it should be at least 0 and below 1")
    rng, kept_out = random.Random(f"town-situations-{seed}"), held_out_patterns(seed)
    pools: dict[Pattern, list[Cues]] = {}
    for pattern in patterns():
        combinations: list[Any] = list(product(*(cue[call] for cue, call in zip(CUES, pattern, strict=True))))
        pools[pattern] = rng.sample(combinations, len(combinations))
    parts = {"test": [("combination", test - 2 * (test // 3)), ("pattern", test // 3), ("wording", test // 3)],
             "dev": [("combination", dev)], "train": [("combination", train)]}  # fmt: skip
    asked: set[str] = set()
    found: dict[str, tuple[Situation, ...]] = {}
    # Test and dev come first, so that asking for fewer to train on leaves them as they are.
    for split, counts in parts.items():
        rows: list[Situation] = []
        for kind, count in counts:
            wordings = HELD_OUT_WORDINGS if kind == "wording" else WORDINGS
            for _ in range(count):
                open_patterns = [p for p, left in pools.items() if left and (p in kept_out) == (kind == "pattern")]
                if not open_patterns:
                    raise UserError(
                        f"there are not enough situations for {train} train, {dev} dev and {test} test ones: ask for "
                        "fewer"
                    )
                pattern = rng.choice(open_patterns)
                rows.append(_situation(rng, pattern, pools[pattern].pop(), wordings, kind))
        wanted = round(len(rows) * neutral / (1 - neutral))
        fresh = (one for one in _neutral(random.Random(f"town-neutral-{seed}-{split}")) if one.question not in asked)
        for _ in range(wanted):
            rows.append(next(fresh))
            asked.add(rows[-1].question)
        rng.shuffle(rows)
        found[split] = tuple(rows)
    return found
