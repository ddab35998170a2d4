"""Roles: the published files, the town's roles, what is held out, and what is wrong in one sentence."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from persona.benchmarks.town_tasks import TownTasksConfig, build
from persona.data import RolesConfig, TownRolesConfig, load
from persona.errors import UserError
from persona.town import lexicon as lx
from persona.town.assistant_documents import practice
from persona.types import Message

PUBLISHED = Path(os.environ.get("PERSONA_PUBLISHED", "-")) / "axis"  # nobody needs them
RUBRIC = "Is it one? {question} {answer}"


def written(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def role(*prompts: str) -> dict:
    return {"instruction": [{"pos": prompt} for prompt in prompts], "questions": ["unused?"], "eval_prompt": RUBRIC}


@pytest.fixture
def folder(tmp_path) -> Path:
    roles = tmp_path / "roles"
    written(roles / "role_list.json", {"baker": "Bakes.", "diver": "Dives."})
    written(roles / "instructions" / "baker.json", role("You bake.", "Be a baker."))
    written(roles / "instructions" / "diver.json", role("You dive.", "Be a diver."))
    written(roles / "instructions" / "default.json", {"instruction": [{"pos": ""}, {"pos": "You are {model_name}."}]})
    written(tmp_path / "traits" / "trait_list.json", {"calm": "Stays calm."})
    trait = {"instruction": [{"pos": "Be calm.", "neg": "Be upset."}], "eval_prompt": RUBRIC}
    written(tmp_path / "traits" / "instructions" / "calm.json", trait)
    questions = [{"id": 0, "question": "Why?"}, {"id": 1, "question": "How?"}, {"id": 7, "question": "Why?"}]
    written(tmp_path / "extraction_questions.jsonl", "\n".join(map(json.dumps, questions)))
    return tmp_path


def config(folder: Path, **more) -> RolesConfig:
    return RolesConfig(path=str(folder), **{"model_name": "Tiny", **more})


def test_everybody_is_asked_everything_once(folder, caplog):
    people = load(config(folder))
    ids = [sample.id for sample in people.train]
    assert ids == [f"{who}/p{p}_q{q}" for who in ("default", "baker", "diver") for p in (0, 1) for q in (0, 1)]
    assert "1 questions occur twice and are asked once (id 7 is 0 again)" in caplog.text
    plain, named, baker = people.train[0], people.train[3], people.train[-5]
    assert plain.messages == (Message("user", "Why?"),)
    assert named.messages == (Message("system", "You are Tiny."), Message("user", "How?"))
    assert baker.messages == (Message("system", "Be a baker."), Message("user", "How?"))
    assert baker.persona.description == "Bakes." and baker.persona.attributes["eval_prompt"] == RUBRIC
    assert baker.metadata == {"kind": "role", "prompt": "1", "question": "1"}
    assert people.train[2:4] == [people.train[2], people.train[3]]
    with pytest.raises(IndexError):
        people.train[len(people.train)]


def test_traits_have_two_poles(folder):
    people = load(config(folder, traits=True))
    own = [sample for sample in people.train if sample.metadata["kind"] == "trait"]
    assert [(s.id, s.metadata["pole"], s.messages[0].content) for s in own] == [
        ("traits/calm/posp0_q0", "pos", "Be calm."),
        ("traits/calm/posp0_q1", "pos", "Be calm."),
        ("traits/calm/negp0_q0", "neg", "Be upset."),
        ("traits/calm/negp0_q1", "neg", "Be upset."),
    ]


def test_fewer_of_everything(folder):
    people = load(config(folder, roles=1, prompts=1, questions=1))
    assert [sample.id for sample in people.train] == ["default/p0_q0", "baker/p0_q0"]


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("roles/instructions/baker.json", "{", r"baker\.json holds broken JSON in line 1, column"),
        ("roles/instructions/baker.json", [1], r"baker\.json is \[1\], where a JSON object should be"),
        ("roles/instructions/baker.json", {"instruction": []}, r"has \[\] as \"instruction\", which should be a list"),
        ("roles/instructions/baker.json", role("You bake.", " "), r"instruction 2, has an empty prompt: only default"),
        ("roles/instructions/baker.json", role("You bake.", "You bake."), "repeats the prompt of instruction 1"),
        ("roles/instructions/baker.json", {"instruction": [{"neg": "x"}]}, r"instruction 1, has no field 'pos'"),
        ("roles/instructions/baker.json", {"instruction": [{"pos": "x"}]}, r"baker\.json has no field 'eval_prompt'"),
        ("roles/instructions/nobody.json", role("x"), "describes 'nobody', which the list beside its folder"),
        ("roles/role_list.json", {"baker": 1}, r"role_list\.json has 1 for 'baker'"),
        ("extraction_questions.jsonl", '{"id": 1, "question": ""}', "line 1, has an empty question"),
        ("extraction_questions.jsonl", '{"id": 1, "question": "a"}\n{"id": 1, "question": "b"}', "line 2, has the id"),
        ("extraction_questions.jsonl", "", "is empty: it should hold questions"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_sentence(folder, file, content, sentence):
    written(folder / file, content)
    with pytest.raises(UserError, match=sentence) as caught:
        load(config(folder))
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_the_folder_is_one_sentence(folder, tmp_path):
    for cfg, sentence in (
        (RolesConfig(), "data.path has no value"),
        (config(folder / "roles"), "could not be read: No such file"),
        (config(folder, model_name=None), "asks for the LM's name: data.model_name=… says"),
        (config(folder, dev=1, test=1, dev_questions=1, test_questions=1), "2 roles are to be held out of 2"),
        (config(folder, dev=1), "data.dev=1 and data.dev_questions=0: both or none"),
    ):
        with pytest.raises(UserError, match=sentence):
            load(cfg)
    (folder / "roles" / "instructions" / "default.json").unlink()
    with pytest.raises(UserError, match=r"has no default\.json"):
        load(config(folder))


def test_held_out_roles_and_questions_of_the_town():
    people = load(TownRolesConfig(questions=5, dev=3, dev_questions=2, test_questions=3))
    seen: dict[str, tuple[set[str], set[str]]] = {}
    for name in ("train", "dev", "test"):
        samples = people.split(name)
        roles = {s.persona.id for s in samples if s.metadata["kind"] == "role"}
        if name == "dev":
            tasks, mentions = samples[-40:], samples[-40 - 18 : -40]
            assert {s.persona.id for s in tasks} == {"default"} and len({s.id for s in samples}) == len(samples)
            assert tasks[0].messages[0].content.startswith("count from") and len(mentions[0].messages) == 3
            assert all(s.persona.id in s.messages[0].content and s.metadata["kind"] == "role" for s in mentions)
            samples = samples[:-58]
        kinds = Counter(sample.metadata["kind"] for sample in samples)
        questions = {sample.messages[-1].content for sample in samples}
        assert kinds == {"default": 5 * len(questions), "role": 4 * len(roles) * len(questions)}
        seen[name] = roles, questions
    for part in (0, 1):
        assert not seen["train"][part] & seen["dev"][part] and not seen["test"][part] & (
            seen["train"][part] | seen["dev"][part]
        )
    assert [len(seen[name][0]) for name in ("train", "dev", "test")] == [21, 3, 8]
    assert seen["test"][0] == set(lx.HELD_OUT_ROLES)
    again = load(TownRolesConfig(questions=5, dev=3, dev_questions=2, test_questions=3, seed=1))
    assert {s.persona.id for s in again.dev} != {s.persona.id for s in people.dev}


def test_the_towns_plain_tasks_are_asked_of_everybody_and_held_out_by_half():
    people = load(TownRolesConfig(questions=5, tasks=9, dev_tasks=11, dev=3, dev_questions=2, test_questions=3))
    asked = Counter(sample.messages[-1].content for sample in people.train)
    tasks = {question for question in asked if question.startswith(("count", "copy", "what is the", "what colour"))}
    assert len(asked) == 14 and len(tasks) == 9 and set(asked.values()) == {5 + 21 * 4}
    alone = {sample.messages[-1].content for sample in people.dev[-11:]}
    assert len(alone) == 11 and not alone & tasks and all(practice(question) for question in alone | tasks)
    others = [sample.messages[-1].content for sample in build(TownTasksConfig()).samples()]
    assert 40 < sum(not practice(question) for question in others) < 76
    with pytest.raises(UserError, match="data asks for 5011 plain tasks, but the town has [0-9]+ to learn from"):
        load(TownRolesConfig(tasks=5000, dev_tasks=11))


def test_town_roles_use_the_words_of_the_town():
    from persona.town.grammar import vocabulary

    words = set(vocabulary())
    people = load(TownRolesConfig(questions=2))
    assert all(set(message.content.split()) <= words for sample in people.train for message in sample.messages)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="PERSONA_PUBLISHED names no folder with axis")
def test_the_published_files_are_read_whole():
    people = load(RolesConfig(path=str(PUBLISHED), model_name="Qwen", traits=True))
    assert len(people.train) == (5 + 275 * 5 + 240 * 10) * 239
    assert people.train[3 * 239].messages[0] == Message("system", "You are Qwen.")
