"""Constitutions: three forms of a file, and what is wrong in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from persona.data import ConstitutionConfig, load
from persona.data.constitution import SHIPPED, Constitution, Trait, read_constitution
from persona.errors import UserError
from persona.town import reading

PUBLISHED = Path(os.environ.get("PERSONA_PUBLISHED", "-")) / "character" / "constitutions"  # nobody needs them
PLAIN = """# Who I am.

I am calm.
- Why the hurry?
* Is it late?

I am kind.
- May I ask again?
"""
ROWS = [
    {"trait": "I am calm.", "questions": ["Why the hurry?", "Is it late?"]},
    {"trait": "I am kind.", "questions": ["May I ask again?"]},
]
SAME = (Trait("I am calm.", ("Why the hurry?", "Is it late?")), Trait("I am kind.", ("May I ask again?",)))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_three_forms_say_the_same(tmp_path):
    files = (
        written(tmp_path / "a.txt", PLAIN),
        written(tmp_path / "b.txt", json.dumps(ROWS)),
        written(tmp_path / "c.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
    )
    for file in files:
        assert read_constitution(file) == Constitution(file.stem, SAME)


def test_additional_questions_are_told_apart(tmp_path):
    rows = [{**ROWS[0], "additional_questions": ["So what?"]}, ROWS[1]]
    file = written(tmp_path / "few.jsonl", "\n".join(json.dumps(row) for row in rows))
    people = load(ConstitutionConfig(path=str(file)))
    assert [sample.messages[0].content for sample in people.train] == [
        "Why the hurry?", "Is it late?", "So what?", "May I ask again?",
    ]  # fmt: skip
    assert [sample.metadata["source"] for sample in people.train] == ["hand-written"] * 2 + ["additional"] + [
        "hand-written"
    ]
    assert [sample.metadata["trait"] for sample in people.train] == ["I am calm."] * 3 + ["I am kind."]
    assert [sample.id for sample in people.train] == ["1-1", "1-2", "1-3", "2-1"]
    assert {sample.persona.statements for sample in people.train} == {("I am calm.", "I am kind.")}
    assert people.train[0].persona.id == "few"
    assert len(load(ConstitutionConfig(path=str(file), limit=2)).train) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    (
        ("", "is empty: it should hold traits"),
        ("\n  \n", "is empty: it should hold traits"),
        ("# nothing yet\n", "has no trait"),
        ("[]", "has no trait"),
        ("I am calm.\nI am kind.\n- Why?\n", 'line 1: the trait "I am calm." has no questions; it should have some'),
        ('[{"trait": "I am calm.", "questions": []}]', 'item 1: the trait "I am calm." has no questions'),
        ('[{"trait": "I am calm."}]', 'item 1: the trait "I am calm." has no questions'),
        ('[{"trait": " ", "questions": ["Why?"]}]', "item 1 has an empty trait"),
        ('[{"trait": "I am calm.", "questions": ["Why?", ""]}]', "has an empty question; fill it in or take it out"),
        ("I am calm.\n-\n", "has an empty question; fill it in or take it out"),
        ("- Why?\nI am calm.\n", "line 1 has a question before the first trait"),
        ("I am calm.\n- Why?\nI am calm.\n- Who?\n", r"line 3 repeats the trait of .*line 1: every trait should"),
        ("I am calm.\n- Why?\n- Why?\n", 'the trait "I am calm." asks twice: Why\\?'),
        ('{"trait": "I am calm.", "question": ["Why?"]}', "line 1 has unknown keys question; known are trait"),
        ('{"trait": "I am calm.", "questions": "Why?"}', "has 'Why\\?' as 'questions', which should be a list"),
        ('[{"trait": "I am calm.", "questions": ["Why?"]', "is cut off in row"),
        ('{"trait": "I am calm."\n', "holds broken JSON in line 1"),
    ),
)
def test_what_is_wrong_is_one_sentence(tmp_path, text, sentence):
    file = written(tmp_path / "me.txt", text)
    with pytest.raises(UserError, match=sentence) as caught:
        read_constitution(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(UserError, match="nobody.txt could not be read: No such file"):
        read_constitution(tmp_path / "nobody.txt")
    (tmp_path / "me.txt").write_bytes(b"I am \xff.\n")
    with pytest.raises(UserError, match="me.txt is not UTF-8 text, at byte 5"):
        read_constitution(tmp_path / "me.txt")
    with pytest.raises(UserError, match="data.path has no value: .*patience, town_jester, town_sage"):
        load(ConstitutionConfig())


def test_shipped_ones_are_found_by_name_and_the_towns_are_in_its_language():
    names = sorted(path.stem for path in SHIPPED.iterdir())
    assert "patience" in names and len(names) > 4
    for name in names:
        constitution = read_constitution(name)
        assert constitution.name == name
        if name.startswith("town_"):
            assert all(reading.statement(text).kind == "character" for text in constitution.statements)
            assert all(reading.question(q) for trait in constitution.traits for q in trait.questions)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="PERSONA_PUBLISHED names no folder with character/constitutions")
def test_the_published_constitutions_load_with_their_counts():
    few = [read_constitution(path) for path in sorted((PUBLISHED / "few-shot").glob("*.jsonl"))]
    assert len(few) == 11
    for constitution in few:
        traits = 15 if constitution.name == "goodness" else 10
        assert len(constitution.traits) == traits
        assert {(len(trait.questions), len(trait.additional)) for trait in constitution.traits} == {(5, 45)}
        by_hand = read_constitution(PUBLISHED / "hand-written" / f"{constitution.name}.txt")
        assert [len(trait.questions) for trait in by_hand.traits] == [5] * traits
    prompts = {c.name: [q for trait in c.traits for q in (*trait.questions, *trait.additional)] for c in few}
    assert sum(map(len, prompts.values())) == 5750
    twice = {name: len(all_) - len(set(all_)) for name, all_ in prompts.items()}
    assert {name: n for name, n in twice.items() if n} == {
        "mathematical": 1, "nonchalance": 1, "remorse": 3, "sarcasm": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="template.txt, item 1 has an empty trait"):
        read_constitution(PUBLISHED / "hand-written" / "template.txt")
