"""People of one's own as plain JSONL."""

import json

import pytest

from persona.data import DataConfig, load, task
from persona.errors import UserError
from persona.types import HistoryItem, Message

PEOPLE = [
    {
        "id": "ann",
        "description": "a gardener",
        "statements": ["Ann likes rain."],
        "attributes": {"age": 41},
        "history": [{"id": "a1", "text": "wet again"}, {"id": "a2", "text": "sun", "label": 2, "date": "2024-05-01"}],
    },
    {"id": "bob"},
]
TRAIN = [
    {"id": "q1", "person": "ann", "input": "how is it?", "target": "wet again", "history": ["a2"]},
    {"id": "q2", "person": "ann", "input": "rate: snow", "target": "1", "task": "stars", "options": ["1", "2"]},
]
DEV = [{"id": "q3", "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "target": "yo"}]  # fmt: skip
TASKS = [{"name": "stars", "kind": "rating", "labels": ["1", "2", "3"]}]


@pytest.fixture
def read(tmp_path):
    """Write the four files, with changes, and read them."""

    def read(people=PEOPLE, train=TRAIN, dev=DEV, tasks=TASKS, **settings):
        for name, rows in (("people", people), ("train", train), ("dev", dev), ("tasks", tasks)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load(DataConfig(name="jsonl", path=str(tmp_path), cache=str(tmp_path / "cache"), **settings))

    return read


def test_people_and_samples_are_read_as_written(read):
    people = read()
    first, second = people.train
    ann = first.persona
    assert (ann.description, ann.statements, ann.attributes) == ("a gardener", ("Ann likes rain.",), {"age": "41"})
    assert list(ann.history) == [HistoryItem("a2", "sun", "2", "2024-05-01")]
    assert (first.messages, first.target, first.task) == ((Message("user", "how is it?"),), "wet again", "plain")
    assert list(second.persona.history) == [HistoryItem("a1", "wet again"), ann.history[0]]
    assert (second.task, second.options) == ("stars", ("1", "2"))
    assert people.dev[0].persona is None
    assert people.dev[0].messages == (Message("system", "be brief"), Message("user", "hi"))
    assert set(people.tasks) == {"plain", "stars"}
    assert task("stars").labels == ("1", "2", "3") and task("stars").kind == "rating"
    assert people.test == ()


def test_default_task_of_the_config(read):
    people = read(train=[{"id": "q", "person": "ann", "input": "review: fine", "target": "4"}], task="LaMP_3")
    assert people.train[0].task == people.dev[0].task == "LaMP_3"
    assert people.tasks["LaMP_3"].query_text("review: fine") == "fine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"people": PEOPLE + [{"id": "ann"}]}, r"people.jsonl, line 3 \(id ann\) repeats an id"),
        ({"people": [{"id": "ann", "histroy": []}]}, "has unknown keys histroy; known are attributes, description"),
        ({"people": [{"id": "ann", "history": [{"id": "a1"}]}]}, r"line 1 \(id ann\), item 1 has no field 'text'"),
        ({"train": [{"id": "q", "person": "eve", "input": "", "target": ""}]}, "person 'eve', who is not in people"),
        ({"train": TRAIN + TRAIN[:1]}, r"train.jsonl, line 3 \(id q1\) repeats an id"),
        ({"train": [{**TRAIN[0], "history": ["a1", "a9"]}]}, "names history items its person does not have: a9"),
        ({"train": [{**TRAIN[0], "messages": []}]}, "should have either 'input' or 'messages'"),
        ({"train": [{**TRAIN[0], "task": "star"}]}, "no task 'star'; did you mean stars"),
        ({"train": [{"id": "q", "person": "ann", "input": "hi"}]}, r"line 1 \(id q\) has no field 'target'"),
        ({"train": []}, "train.jsonl holds no rows"),
        ({"train": [{"id": "q", "person": "bob", "input": "a", "target": "b"}]}, "1 samples have an empty profile"),
        ({"tasks": [{"name": "stars", "kind": "ratings"}]}, "kind 'ratings', which should be one of generation"),
        ({"tasks": [{"name": "stars", "kind": "rating"}]}, "has 0 labels: a classification or rating task lists"),
        ({"dev": [{"id": "q", "messages": [{"role": "bot", "content": ""}], "target": ""}]}, "of role 'bot', which"),
    ],
)  # fmt: skip
def test_bad_rows(read, changes, message):
    with pytest.raises(UserError, match=message):
        read(**changes)


def test_missing_file(read, tmp_path):
    read()
    (tmp_path / "people.jsonl").unlink()
    with pytest.raises(UserError, match="people.jsonl is missing; see persona/data/jsonl.py"):
        load(DataConfig(name="jsonl", path=str(tmp_path), cache=str(tmp_path / "cache")))
