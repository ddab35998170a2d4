"""The residents as samples: who lives in the town, their histories, and what is asked of each.

Residents are fixed by a seed and split by person. Methods see the history; the latents stay with the oracle, unless
`with_truth` asks for them (the full-knowledge upper bound).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import islice

from persona.errors import UserError
from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town.residents import Latents, Thing
from persona.town.sentences import (
    description,
    fact_answer,
    fact_question,
    rating_question,
    statements,
    tag_question,
    taste_answer,
    taste_question,
)
from persona.types import HistoryItem, Message, Persona, Sample

TASKS = ("town_reply", "town_rating", "town_tag", "town_interview")
RATINGS = tuple(str(rating) for rating in sorted(lx.OPINIONS))
TAGS = tuple(lx.TAGS.values())
# Pairs of qualities that a resident is asked about and that never occur in the history: the answer has to be put
# together from other combinations.
ASKED_PAIRS = 4
MIN_REVIEWS = 8


@dataclass(frozen=True)
class Resident:
    """A named person: latents, the past items, and the pairs of qualities kept out of them."""

    id: str
    latents: Latents
    history: tuple[HistoryItem, ...]
    asked_pairs: tuple[tuple[str, str], ...]
    talked: frozenset[tuple[int, str]]  # (form, topic) of the past replies

    def persona(self, with_truth: bool = False, characters: bool = False) -> Persona:
        """The persona as methods get it: id and history; with everything told when `with_truth`. A character is given
        by name and statements instead, as in role play."""
        who = self.latents
        if characters:
            return Persona(self.id, statements=statements(who), attributes={"name": who.name})
        if not with_truth:
            return Persona(self.id, history=self.history)
        attributes = {"voice": who.voice, **{f"taste:{q}": str(level) for q, level in who.tastes.items()},
                      **{f"trait:{t}": str(level) for t, level in who.traits.items()}, **who.facts}  # fmt: skip
        return Persona(self.id, description(who), statements(who), attributes, self.history)


@dataclass(frozen=True)
class Town:
    """Samples by split; `residents` maps a persona's id to who it is (for the oracle, not for methods)."""

    train: tuple[Sample, ...]
    dev: tuple[Sample, ...]
    test: tuple[Sample, ...]
    residents: Mapping[str, Resident] = field(repr=False)


def _asked_pairs(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Pairs to keep for questions; disjoint, so that each quality is still met in six other pairs."""
    order = rng.sample(lx.QUALITIES, len(lx.QUALITIES))
    return tuple(Thing(order[i], order[i + 1], "").pair for i in range(0, 2 * ASKED_PAIRS, 2))


def draw_resident(rng: random.Random, name: str, surname: str) -> Resident:
    """A person with a history of 24 to 56 items in the order of their dates.

    Every quality is reviewed at least once, in a pair that is not asked about.
    """
    drawn = rs.draw_latents(rng)
    who = Latents(name, drawn.voice, drawn.tastes, drawn.facts, drawn.words, drawn.traits)
    asked = _asked_pairs(rng)
    open_pairs = [pair for pair in rs.PAIRS if pair not in asked]
    count = rng.randint(rs.MIN_ITEMS, rs.MAX_ITEMS)
    kinds = ["review"] * MIN_REVIEWS + rng.choices(rs.ITEM_KINDS, rs.ITEM_WEIGHTS, k=count - MIN_REVIEWS)
    covered = [rng.choice([pair for pair in open_pairs if quality in pair]) for quality in lx.QUALITIES]
    pairs = covered + rng.choices(open_pairs, k=count - len(covered))
    order = list(zip(kinds, pairs, strict=True))
    rng.shuffle(order)
    items, talked, day = [], set(), date(2024, 1, 1)
    for number, (kind, pair) in enumerate(order):
        key = f"{name}-{surname}-{number:02d}"
        if kind == "chat":
            form, topic = rng.randrange(len(lx.SMALL_TALK)), rng.choice(lx.TOPICS)
            talked.add((form, topic))
            item = rs.chat_item(rng, who, form, topic, rs.SHOWN, rs.BORROWED, key)
        elif kind == "review":
            item = rs.review_item(rng, who, rs.draw_thing(rng, pair), rs.SHOWN, rs.BORROWED, key)
        else:
            item = rs.tag_item(who, rs.draw_thing(rng, pair), key)
        day += timedelta(days=rng.randint(1, 9))
        items.append(HistoryItem(item.id, item.text, item.label, day.isoformat()))
    return Resident(f"{name}-{surname}", who, tuple(items), asked, frozenset(talked))


def samples_of(rng: random.Random, resident: Resident, counts: Mapping[str, int], persona: Persona) -> list[Sample]:
    """`counts[task]` different questions for each task, whose answers are in no item of the history.

    `metadata` holds what the oracle needs to score a reply (the resident's voice).
    """
    who = resident.latents
    metadata = {"resident": resident.id, "voice": who.voice}

    def sample(task: str, number: int, question: str, target: str, options: tuple[str, ...] | None) -> Sample:
        return Sample(f"{task}/{resident.id}/{number}", (Message("user", question),), target, persona, options, task,
                      metadata)  # fmt: skip

    fresh = [(form, topic) for form in range(len(lx.SMALL_TALK)) for topic in lx.TOPICS
             if (form, topic) not in resident.talked]  # fmt: skip
    found = []
    for number, (form, topic) in enumerate(rng.sample(fresh, counts["town_reply"])):
        question, answer = rs.small_talk(form, topic, who.words)
        found.append(sample("town_reply", number, question, rs.speak(rng, lx.VOICES[who.voice], answer), None))
    for task in ("town_rating", "town_tag"):
        asked: set[str] = set()
        while len(asked) < counts[task]:
            pair = resident.asked_pairs[len(asked) % len(resident.asked_pairs)]
            thing = rs.draw_thing(rng, pair)
            question = rating_question(thing) if task == "town_rating" else tag_question(thing)
            if question in asked:
                continue
            answer = str(rs.rate(who.tastes, thing)) if task == "town_rating" else rs.tag(who.tastes, thing)
            found.append(sample(task, len(asked), question, answer, RATINGS if task == "town_rating" else TAGS))
            asked.add(question)
    return found


# What an interview asks about, in turn: facts (three wordings of each), tastes, small talk.
INTERVIEW = ("fact", "taste", "fact", "talk")


def interview(rng: random.Random, who: Latents) -> Iterator[tuple[str, str]]:
    """All questions of an interview in random order, by turns of INTERVIEW, each with this person's answer."""
    facts = [(question, fact_answer(kind, who.facts[kind])) for kind in lx.FACTS
             for question in (fact_question(kind), *lx.FACT_PARAPHRASES[kind][2])]  # fmt: skip
    tastes = [(taste_question(quality), taste_answer(quality, level)) for quality, level in who.tastes.items()]
    talk = [rs.small_talk(form, topic, who.words) for form in range(len(lx.SMALL_TALK)) for topic in lx.TOPICS]
    pools = {"fact": facts, "taste": tastes, "talk": talk}
    for pool in pools.values():
        rng.shuffle(pool)
    while any(pools.values()):
        for kind in INTERVIEW:
            if pools[kind]:
                question, answer = pools[kind].pop()
                yield question, rs.speak(rng, lx.VOICES[who.voice], answer)


def interview_samples(resident: Resident, seed: int, counts: Sequence[int]) -> list[list[Sample]]:
    """Interviews of one resident, of `counts` questions each; no question is in two of them.

    The resident is named in the system prompt, and nothing else is told there.
    """
    who, persona = resident.latents, resident.persona(characters=True)
    asked = interview(random.Random(f"town-interview-{seed}-{resident.id}"), who)
    role = Message("system", f"you are {who.name} .")
    metadata = {"resident": resident.id, "voice": who.voice}
    found, number = [], 0
    for count in counts:
        samples = []
        for question, answer in islice(asked, count):
            samples.append(Sample(f"town_interview/{resident.id}/{number}", (role, Message("user", question)), answer,
                                  persona, None, "town_interview", metadata))  # fmt: skip
            number += 1
        found.append(samples)
    return found


TRAIN_COUNTS = {"town_reply": 4, "town_rating": 4, "town_tag": 2}
HELD_OUT_COUNTS = {"town_reply": 2, "town_rating": 3, "town_tag": 1}


def people(
    seed: int = 0,
    train: int = 320,
    dev: int = 40,
    test: int = 60,
    *,
    train_counts: Mapping[str, int] = TRAIN_COUNTS,
    held_out_counts: Mapping[str, int] = HELD_OUT_COUNTS,
    with_truth: bool = False,
) -> Town:
    """The town's people: `train`, `dev` and `test` residents with `*_counts[task]` samples each.

    Each resident is drawn from a generator of their own, so a resident is the same whatever the other numbers are.
    Raises UserError when more residents are asked for than there are full names.
    """
    names = [(name, surname) for name in lx.NAMES for surname in lx.SURNAMES]
    random.Random(f"town-names-{seed}").shuffle(names)
    if train + dev + test > len(names):
        raise UserError(f"the town has names for {len(names)} residents, not for {train + dev + test}")
    residents: dict[str, Resident] = {}
    splits: list[Sequence[Sample]] = []
    # Test and dev come first, so that asking for fewer training residents leaves them as they are.
    start = 0
    for size, counts in ((test, held_out_counts), (dev, held_out_counts), (train, train_counts)):
        found: list[Sample] = []
        for name, surname in names[start : start + size]:
            resident = draw_resident(random.Random(f"town-resident-{seed}-{name}-{surname}"), name, surname)
            residents[resident.id] = resident
            persona = resident.persona(with_truth)
            found += samples_of(random.Random(f"town-samples-{seed}-{resident.id}"), resident, counts, persona)
        splits.append(found)
        start += size
    return Town(train=tuple(splits[2]), dev=tuple(splits[1]), test=tuple(splits[0]), residents=residents)


def characters(seed: int = 0, train: int = 40, test: int = 20, *, questions: int = 16, held_out: int = 8) -> Town:
    """Residents as characters to be played, no two with one first name, interviewed.

    train: `questions` to each of `train` residents; dev: `held_out` other questions to the same residents; test:
    `held_out` questions to residents of their own. Raises UserError when there are not enough names.
    """
    if train + test > len(lx.NAMES):
        raise UserError(f"the town has {len(lx.NAMES)} first names, not enough for {train + test} characters")
    names = [(name, surname) for name in lx.NAMES for surname in lx.SURNAMES]
    random.Random(f"town-names-{seed}").shuffle(names)
    chosen = list({name: (name, surname) for name, surname in names}.values())[: test + train]
    drawn = [draw_resident(random.Random(f"town-resident-{seed}-{n}-{s}"), n, s) for n, s in chosen]
    known = [interview_samples(resident, seed, (questions, held_out)) for resident in drawn[test:]]
    others = [interview_samples(resident, seed, (held_out,)) for resident in drawn[:test]]
    return Town(
        train=tuple(sample for first, _ in known for sample in first),
        dev=tuple(sample for _, second in known for sample in second),
        test=tuple(sample for (only,) in others for sample in only),
        residents={resident.id: resident for resident in drawn},
    )
