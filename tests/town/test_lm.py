"""The town's tokenizer, its LM's training command, and the shipped weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from persona.errors import UserError
from persona.town import MODEL_PATH, grammar, measure_lm, oracle
from persona.town import lexicon as lx
from persona.town.drills import DRILLS, MAX_WORDS
from persona.town.tokenizer import BOS, END, ROLES, VOCABULARY_MULTIPLE, build_tokenizer, encode
from persona.town.train_lm import KIND_WEIGHTS, TrainConfig, learning_rate, stage_shares, train
from persona.types import Message


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(grammar.vocabulary())


@pytest.fixture(scope="module")
def documents():
    rng = random.Random("test-lm")
    return [grammar.sample_document(rng, stage) for stage in grammar.STAGES for _ in range(340)]


def chat(document):
    return [{"role": message.role, "content": message.content} for message in document]


# --- tokenizer ---------------------------------------------------------------------------------------------------
def test_every_document_survives_a_round_trip(tokenizer, documents):
    assert len(documents) >= 1000
    for document in documents:
        for message in document:
            ids = tokenizer(message.content).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == message.content


def test_ordinary_writing_gives_the_canonical_ids(tokenizer):
    canonical = tokenizer("hello , how can i help you ?").input_ids
    assert tokenizer("Hello, how can I help   you?").input_ids == canonical
    assert tokenizer.decode(canonical) == "hello , how can i help you ?"


def test_vocabulary_is_padded_and_one_id_per_word(tokenizer):
    assert len(tokenizer) % VOCABULARY_MULTIPLE == 0
    words = grammar.vocabulary()
    assert len({tokenizer.convert_tokens_to_ids(word) for word in words}) == len(words)
    assert tokenizer("zyzzyva").input_ids == [tokenizer.unk_token_id]


def test_new_words_take_reserved_ids_and_old_ones_keep_theirs():
    before = build_tokenizer(["cat", "dog"])
    after = build_tokenizer(["ant", "cat", "dog"], before)
    assert len(after) == len(before)
    for word in ("cat", "dog", END):
        assert after.convert_tokens_to_ids(word) == before.convert_tokens_to_ids(word)
    assert before.convert_ids_to_tokens(after.convert_tokens_to_ids("ant")).startswith("<|reserved_")
    with pytest.raises(UserError, match="reserved ids"):
        build_tokenizer([f"word{index}" for index in range(len(before))], before)


@pytest.mark.parametrize("word", ["two words", "Upper", "end."])
def test_a_word_that_would_be_split_is_refused(word):
    with pytest.raises(UserError, match="would be split"):
        build_tokenizer([word])


def test_encode_names_the_unknown_word(tokenizer):
    with pytest.raises(UserError, match="'zyzzyva'"):
        encode(tokenizer, [Message("user", "hello zyzzyva !")])


def test_template_marks_exactly_the_assistants_words(tokenizer, documents):
    for document in documents[::7]:
        rendered = tokenizer.apply_chat_template(chat(document), return_dict=True, return_assistant_tokens_mask=True)
        ids, own = encode(tokenizer, document)
        assert rendered["input_ids"] == ids
        assert [bool(mark) for mark in rendered["assistant_masks"]] == own
        marked = tokenizer.decode([i for i, mark in zip(ids, own, strict=True) if mark])
        replies = [message.content for message in document if message.role == "assistant"]
        assert marked == " ".join(f"{reply} {END}" for reply in replies)


def test_generation_prompt_is_the_start_of_the_whole(tokenizer, documents):
    document = documents[-1]
    start = tokenizer.apply_chat_template(chat(document[:-1]), add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat(document), tokenize=False)
    assert start.startswith(BOS) and start.endswith(ROLES["assistant"])
    assert whole == start + document[-1].content + END


def test_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="role 'tool' is unknown"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "hello !"}])


@pytest.mark.parametrize("kind", DRILLS)
def test_drills_speak_the_grammars_language(tokenizer, kind):
    rng = random.Random(kind)
    turns = 0
    for stage in grammar.STAGES:
        for _ in range(60):
            document = DRILLS[kind](rng, stage)
            encode(tokenizer, document)  # raises on an unknown word
            assert grammar.count_words(document) <= MAX_WORDS
            replies = [message.content for message in document if message.role == "assistant"]
            assert all(oracle.readable(reply) for reply in replies), replies
            turns += len(replies)
    assert turns > 2 * 180


# --- training ----------------------------------------------------------------------------------------------------
def test_schedules():
    assert stage_shares(0.0) == (0.8, 0.2, 0.0)
    assert stage_shares(1.0) == (0.08, 0.12, 0.80)
    for progress in (0.04, 0.08, 0.2, 0.3, 0.7):
        assert sum(stage_shares(progress)) == pytest.approx(1.0)
    assert set(KIND_WEIGHTS) == {*grammar.document_kinds(), *DRILLS}
    config = TrainConfig(out=Path("unused"), steps=1000, learning_rate=1.0)
    assert learning_rate(config, 0) == pytest.approx(1 / 200)
    assert learning_rate(config, 500) == 1.0
    assert learning_rate(config, 775) == pytest.approx(0.5)  # the last 45 % fall to zero: half way, half


def tiny(out: Path, steps: int = 6) -> TrainConfig:
    return TrainConfig(out=out, steps=steps, documents=4, groups=2, hidden=16, layers=1, heads=2, intermediate=16,
                       checkpoint_every=2, log_every=1, threads=1)  # fmt: skip


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(tiny(out))
    return out


def test_a_killed_run_goes_on_with_the_same_losses_and_weights(uninterrupted, tmp_path):
    train(tiny(tmp_path), stop_after=3)  # logged step 3, but the last checkpoint is that of step 2
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]
    train(tiny(tmp_path))
    assert losses(tmp_path) == losses(uninterrupted)
    for name in ("checkpoint/model.safetensors", "checkpoint/optimizer.safetensors", "model/model.safetensors"):
        resumed, whole = load_file(tmp_path / name), load_file(uninterrupted / name)
        assert resumed.keys() == whole.keys() and len(whole) > 5
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_training_is_recorded_beside_the_weights(uninterrupted):
    training = json.loads((uninterrupted / "model" / "training.json").read_text())
    assert training["step"] == 6
    assert training["runs"][0]["config"]["seed"] == 0
    assert {str(t.dtype) for t in load_file(uninterrupted / "model" / "model.safetensors").values()} == {
        "torch.bfloat16"
    }


def test_a_checkpoint_of_another_shape_is_refused(uninterrupted):
    config = TrainConfig(**{**vars(tiny(uninterrupted)), "hidden": 32})
    with pytest.raises(UserError, match="hidden=16, not 32"):
        train(config)


# --- the shipped weights -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shipped():
    return measure_lm.load(MODEL_PATH)


def test_shipped_files_are_small_and_know_every_word():
    assert (MODEL_PATH / "model.safetensors").stat().st_size <= 12e6
    words = AutoTokenizer.from_pretrained(MODEL_PATH).get_vocab()
    assert [word for word in grammar.vocabulary() if word not in words] == []


def test_wilson_interval():
    # Wilson's formula by hand for 8 of 10: (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10), z = 1.96
    assert measure_lm.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_every_probe_accepts_what_the_grammar_would_say():
    """The measurement is not vacuous: a reply about somebody else fails every probe that asks for one latent."""
    names = [probe.name for probe in measure_lm.probes(3)]
    assert len(names) == len(set(names)) == 30
    for probe in measure_lm.probes(3):
        assert not any(question.right("zyzzyva") for question in probe.questions), probe.name


# Far below what is measured (docs/town_lm.md): these catch broken files and renderings, not a change of a percent.
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("role named in the system prompt", 0.85),
        ("constitution of 3 to 5 traits", 0.75),
        ("plain tasks", 0.7),
        ("fact from 4 statements", 0.7),
        ("voice named in the system prompt", 0.85),
        ("voice from 16 past items", 0.85),
    ],
)
def test_shipped_model_follows_its_context(shipped, name, least):
    probe = next(probe for probe in measure_lm.probes(40) if probe.name == name)
    replies = measure_lm.answer(*shipped, [question.messages for question in probe.questions])
    right = [question.right(reply) for question, reply in zip(probe.questions, replies, strict=True)]
    assert sum(right) / len(right) >= least, replies[:3]


def test_shipped_replies_do_not_depend_on_batch_company(shipped):
    prompts = [(Message("system", f"you are the {role} ."), Message("user", "where is the garden ?"))
               for role in list(lx.ROLES)[:4]]  # fmt: skip
    long = (Message("user", " ; ".join(["past : the boat is big today ."] * 6) + " ; question : is the boat ready ?"),)
    together = measure_lm.answer(*shipped, [*prompts, long])
    assert together[:4] == [measure_lm.answer(*shipped, [prompt])[0] for prompt in prompts]
    assert all(oracle.readable(reply) for reply in together)
