"""The residents: fixed by a seed, split by person, and asked only what the history does not hold."""

import random
from collections import Counter

import pytest

from persona.errors import UserError
from persona.town import lexicon as lx
from persona.town import oracle, reading
from persona.town import residents as rs
from persona.town.people import HELD_OUT_COUNTS, TRAIN_COUNTS, characters, people


@pytest.fixture(scope="module")
def town():
    return people()


def things(history):
    return [unit.key for item in history for unit in reading.sentences(item.text) if unit.kind == "thing"]


def test_splits_are_by_resident_and_of_the_promised_size(town):
    ids = [{sample.persona.id for sample in split} for split in (town.train, town.dev, town.test)]
    assert [len(found) for found in ids] == [320, 40, 60] and len(set.union(*ids)) == 420 == len(town.residents)
    assert Counter(s.task for s in town.train) == {task: 320 * count for task, count in TRAIN_COUNTS.items()}
    assert Counter(s.task for s in town.test) == {task: 60 * count for task, count in HELD_OUT_COUNTS.items()}
    assert len({s.id for s in (*town.train, *town.dev, *town.test)}) == 3200 + 240 + 360


def test_the_same_seed_gives_the_same_town_and_fewer_training_residents_leave_the_test_as_it_is(town):
    again = people(train=3)
    assert again.test == town.test and again.dev == town.dev and again.train == town.train[:30]
    assert people(seed=1, train=3).test != town.test


def test_histories_are_ragged_readable_and_agree_with_the_latents(town):
    lengths = set()
    for resident in town.residents.values():
        lengths.add(len(resident.history))
        who, dates = resident.latents, [item.date for item in resident.history]
        assert dates == sorted(set(dates)) and len({item.id for item in resident.history}) == len(dates)
        for item in resident.history:
            units = reading.sentences(item.text)
            assert units is not None
            if item.label is None:
                assert set(oracle.word_choices(item.text).values()) <= set(who.words.values())
                assert oracle.trait_levels(item.text).items() <= who.traits.items()
                continue
            (thing,) = [unit.key for unit in units if unit.kind == "thing"]
            if item.label.isdigit():
                assert int(item.label) == rs.rate(who.tastes, thing) == oracle.rating(item.text)
            else:
                assert item.label == rs.tag(who.tastes, thing)
    assert min(lengths) == 24 and max(lengths) == 56 and len(lengths) == 33


def test_no_answer_stands_in_the_history(town):
    for sample in (*town.train, *town.dev, *town.test):
        texts = [item.text for item in sample.persona.history]
        if sample.task == "town_reply":
            asked = sample.messages[0].content
            core = next(unit for unit in reading.sentences(sample.target) if unit.kind == "talk")
            topic = next(t for t in lx.TOPICS if asked == lx.SMALL_TALK[core.key][0].format(t=t))
            who = town.residents[sample.persona.id].latents
            assert not any(rs.small_talk(core.key, topic, who.words)[1] in text for text in texts)
            continue
        wanted = reading.question(sample.messages[0].content).key.pair
        met = [thing.pair for thing in things(item for item in sample.persona.history)]
        assert wanted not in met
        reviewed = things(i for i in sample.persona.history if i.label and i.label.isdigit())
        assert all(any(quality in thing.pair for thing in reviewed) for quality in wanted)


def test_targets_are_the_truth(town):
    for sample in (*town.dev, *town.test):
        who = town.residents[sample.persona.id].latents
        if sample.task == "town_reply":
            assert oracle.voice(sample.target) == who.voice == sample.metadata["voice"] and sample.options is None
            assert oracle.markers(sample.target).total() == 2
            continue
        thing = reading.question(sample.messages[0].content).key
        truth = str(rs.rate(who.tastes, thing)) if sample.task == "town_rating" else rs.tag(who.tastes, thing)
        assert sample.target == truth and sample.target in sample.options
        assert sample.options == (
            ("1", "2", "3", "4", "5") if sample.task == "town_rating" else tuple(lx.TAGS.values())
        )


def test_methods_see_the_history_and_nothing_else_unless_the_truth_is_asked_for(town):
    for sample in town.test:
        assert not sample.persona.description and not sample.persona.statements and not sample.persona.attributes
    told = people(train=0, dev=0, with_truth=True)
    for sample, plain in zip(told.test, town.test, strict=True):
        who = town.residents[sample.persona.id].latents
        assert (sample.id, sample.messages, sample.target) == (plain.id, plain.messages, plain.target)
        assert sample.persona.history == plain.persona.history
        assert f"talks like a {who.voice} ." in sample.persona.description
        assert sample.persona.attributes["voice"] == who.voice
        levels = {unit.key: unit.value for unit in map(reading.statement, sample.persona.statements)
                  if unit.kind == "taste"}  # fmt: skip
        assert levels == {quality: level for quality, level in who.tastes.items() if level}


def majority_voice(items):
    counts = Counter(name for item in items for kind, name in oracle.markers(item.text).elements() if kind == "voice")
    return counts.most_common(1)[0][0] if counts else lx.PLAIN


def test_few_items_leave_the_voice_in_doubt_and_the_whole_history_settles_it(town):
    right = {}
    for count in (1, 4, None):
        found = []
        for resident in town.residents.values():
            rng = random.Random(resident.id)
            items = resident.history if count is None else rng.sample(resident.history, count)
            found.append(majority_voice(items) == resident.latents.voice)
        right[count] = sum(found) / len(found)
    assert right[1] < 0.5 and 0.65 < right[4] < 0.9 and right[None] > 0.985


def test_more_residents_than_names_is_refused():
    with pytest.raises(UserError, match="names for 1200 residents, not for 2100"):
        people(train=2000)


def test_characters_are_asked_what_they_were_not_trained_on():
    town = characters(0, 3, 2, questions=6, held_out=4)
    asked = {split: {(s.persona.id, s.messages[-1].content) for s in getattr(town, split)} for split in
             ("train", "dev", "test")}  # fmt: skip
    assert [len(asked[split]) for split in asked] == [18, 12, 8]
    assert not asked["train"] & asked["dev"]
    who = {split: {id for id, _ in pairs} for split, pairs in asked.items()}
    assert who["train"] == who["dev"] and not who["train"] & who["test"]
    assert len({town.residents[id].latents.name for id in who["train"] | who["test"]}) == 5
    for sample in (*town.train, *town.test):
        latents = town.residents[sample.persona.id].latents
        assert sample.messages[0].content == f"you are {latents.name} ." and not sample.persona.history
        assert oracle.voice(sample.target) == latents.voice and reading.question(sample.messages[1].content)
        # The true answer denies nothing, and follows what the question is about.
        found = [(oracle.relevant(s, sample.messages[1].content), oracle.nli(s, sample.target))
                 for s in sample.persona.statements]  # fmt: skip
        assert not [pair for pair in found if pair[1] == oracle.CONTRADICTED] and (True, oracle.ENTAILED) in found
    # Fewer residents and questions leave the others as they are.
    fewer = characters(0, 2, 2, questions=6, held_out=4)
    assert fewer.test == town.test and fewer.train == town.train[:12]
    with pytest.raises(UserError, match="the town has 60 first names, not enough for 61 characters"):
        characters(0, 60, 1)
