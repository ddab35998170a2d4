"""Queries with their traits: the file as it is written, and what is wrong in one sentence."""

import json

import pytest

from persona.data import SituationsConfig, load
from persona.data.situations import POLES, annotated, expert_vector, expert_vector_of, traits_of
from persona.errors import UserError
from persona.types import Message, Sample

TRAITS = {"O": 0, "C": 1, "E": 0, "A": -1, "N": 0}
VECTOR = [0, 0, 1, 0, 0, 0, 0, 0.5, 0, 0]
ROW = {
    "id": "q1", "messages": [{"role": "user", "content": "The boss lies to me."}], "response": "Write it all down.",
    "cot": "A boss, high stakes.", "traits": TRAITS, "expert_vector": VECTOR, "source": "ours", "split": "train",
}  # fmt: skip
NEUTRAL = {
    **ROW, "id": "q2", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    "response": "4", "cot": None, "traits": dict.fromkeys("OCEAN", 0), "expert_vector": [0] * 10, "split": "dev",
}  # fmt: skip
QUERY = {"id": "q4", "messages": [{"role": "user", "content": "My boat is gone."}], "source": "ours"}


@pytest.fixture
def read(tmp_path):
    def read(*rows, **settings):
        (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load(SituationsConfig(path=str(tmp_path / "sft.jsonl"), **settings))

    return read


def test_rows_are_read_as_written(read):
    people = read(ROW, NEUTRAL)
    (first,), (second,) = people.train, people.dev
    assert (first.id, first.target, first.persona, first.task) == ("q1", "Write it all down.", None, "situation")
    assert first.messages == (Message("user", "The boss lies to me."),) and len(second.messages) == 2
    assert traits_of(first) == TRAITS and expert_vector_of(first) == tuple(VECTOR)
    assert not any(expert_vector_of(second)) and people.test == () and set(people.tasks) == {"situation"}
    assert "high stakes" not in json.dumps([first.target, dict(first.metadata)]), "the reasoning is not learned from"


def test_bare_queries_are_a_pool(read):
    people = read(QUERY, {key: value for key, value in QUERY.items() if key != "source"} | {
        "id": "q5", "messages": [{"role": "user", "content": "Where is it?"}]})  # fmt: skip
    assert [(s.id, s.target, dict(s.metadata)) for s in people.train] == [
        ("q4", "", {"source": "ours"}),
        ("q5", "", {}),
    ]
    assert not any(annotated(sample) for sample in people.train) and people.dev == people.test == ()


def test_limit_is_per_split(read):
    more = {**ROW, "id": "q3", "response": "Another."}
    assert [len(split) for split in (read(ROW, more, NEUTRAL, limit=1).train, read(ROW, more).train)] == [1, 2]


def test_expert_vector_by_hand():
    assert POLES == ("O+", "O-", "C+", "C-", "E+", "E-", "A+", "A-", "N+", "N-")
    assert expert_vector({"O": 1, "A": -1}) == (1, 0, 0, 0, 0, 0, 0, 1, 0, 0)
    assert expert_vector({"C": -0.5, "N": 0.25}) == (0, 0, 0, 0.5, 0, 0, 0, 0, 0.25, 0)
    assert expert_vector({}) == (0,) * 10


@pytest.mark.parametrize(
    ("rows", "sentence"),
    (
        ([{**ROW, "expert_vector": VECTOR[:9]}], r"line 1 \(id q1\) has 9 entries as 'expert_vector', .* 10 numbers"),
        ([{**ROW, "expert_vector": "O+"}], "has 'O\\+' as 'expert_vector', which should be 10 numbers"),
        ([{**ROW, "expert_vector": [1.5, *VECTOR[1:]]}], r"has 1.5 for O\+ in 'expert_vector', which should be 0 t"),
        ([{**ROW, "expert_vector": [True, *VECTOR[1:]]}], r"has True for O\+ in 'expert_vector'"),
        ([{**ROW, "expert_vector": [1, *VECTOR[1:]]}], r"has weight 1 for O\+ in 'expert_vector', but O is 0"),
        ([{**ROW, "expert_vector": [0] * 10}], r"has weight 0 for C\+ in 'expert_vector', but C is 1"),
        ([{**ROW, "traits": {**TRAITS, "A": 2}}], "has 2 for trait A, which should be -1, 0 or 1"),
        ([{**ROW, "traits": {**TRAITS, "A": 0.5}}], "has 0.5 for trait A, which should be -1, 0 or 1"),
        ([{**ROW, "traits": {"O": 1}}], "as 'traits', which should have exactly O, C, E, A, N"),
        ([{**ROW, "traits": None}], "has None as 'traits'"),
        ([{**ROW, "split": "training"}], "is of split 'training', which should be one of train, dev, test"),
        ([{**ROW, "cot": 3}], "has 3 as 'cot', which should be a string or null"),
        ([{**ROW, "response": " "}], "has an empty response"),
        ([{**ROW, "reply": ""}], "has unknown keys reply; known are id, messages"),
        ([{k: v for k, v in ROW.items() if k != "source"}], "has no field 'source'"),
        ([{**ROW, "messages": []}], "has \\[\\] as 'messages'"),
        ([{**ROW, "messages": [{"role": "bot", "content": ""}]}], "of role 'bot', which should be one of system"),
        ([{**ROW, "messages": [{"role": "assistant", "content": "a"}]}], "ends in a message of role 'assistant'"),
        ([ROW, ROW], "line 2 repeats the id 'q1' of line 1"),
        ([ROW, {**ROW, "id": "q3"}], "line 2 repeats query and response of line 1"),
        ([ROW, {**ROW, "id": "q3", "split": "dev", "response": "b"}], "has the query of line 1 in split 'dev', there"),
        ([ROW, QUERY], r"holds annotated rows \(id q1\) and bare queries \(id q4\): put them into two files"),
        ([NEUTRAL], "sft.jsonl has no row of split 'train'"),
        ([], "sft.jsonl has no row of split 'train'"),
    ),
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(read, rows, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        read(*rows)
    assert "\n" not in str(caught.value)


def test_files_and_samples_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="data.path has no value"):
        load(SituationsConfig())
    with pytest.raises(UserError, match="nothing.jsonl could not be read: No such file"):
        load(SituationsConfig(path=str(tmp_path / "nothing.jsonl")))
    plain = Sample("s", (Message("user", "hi"),))
    assert not annotated(plain)
    with pytest.raises(UserError, match="sample s does not say which traits it calls for: choose data=situations"):
        traits_of(plain)
