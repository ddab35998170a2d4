from __future__ import annotations

import copy
import json
import shutil
import socket
import sys
import time

import pytest
import torch
from lm_toys import PROMPTS

from persona import lm
from persona.errors import UserError
from persona.lm import BaseLM, ModelConfig
from persona.lm.scratch import CHAT_TEMPLATE
from persona.types import Message

ADA = (Message("system", "you are ada"), Message("user", "how was your day at the market ?"))


def with_template(base: BaseLM, template: str | None) -> BaseLM:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template
    return BaseLM(base.model, tokenizer, "llama with another template")


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ("no/such/folder/anywhere", "./missing", "/missing", "~/missing", "missing"))
def test_a_path_that_does_not_exist(path):
    with pytest.raises(UserError, match="neither a shipped model, a directory, nor a hub id") as caught:
        lm.load(ModelConfig(path=path))
    assert path in str(caught.value)


def test_a_mistyped_folder_is_no_hub_id(tmp_path, monkeypatch):
    """ "outputs/base" has the shape of a hub id; with a folder outputs here, nothing may be asked of a hub."""
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="model.path='outputs/bse' is neither a shipped model, a directory"):
        lm.load(ModelConfig(path="outputs/bse"))


def test_a_hub_id_that_cannot_be_reached():
    with pytest.raises(UserError, match="no base LM could be loaded from model.path='nobody/nothing'"):
        lm.load(ModelConfig(path="nobody/nothing"))


def test_unknown_dtype(model_folder):
    with pytest.raises(UserError, match="dtype='float8' is unknown: use one of float32, bfloat16, float16"):
        lm.load(ModelConfig(path=str(model_folder("llama")), dtype="float8"))


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "tokenizer.json"))
@pytest.mark.parametrize("how", ("missing", "cut"))
def test_a_damaged_folder_is_one_sentence(model_folder, tmp_path, name, how):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    if how == "missing":
        (folder / name).unlink()
    else:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="no base LM could be loaded from model.path=") as caught:
        lm.load(ModelConfig(path=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)


def test_a_loaded_model_is_frozen_and_in_eval_mode(llama, t5):
    for base in (llama, t5):
        assert not base.model.training
        assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_dtype_is_honoured_and_does_not_change_the_fingerprint(model_folder, llama):
    half = lm.load(ModelConfig(path=str(model_folder("llama")), dtype="bfloat16", device="cpu"))
    assert half.dtype == torch.bfloat16 and llama.dtype == torch.float32
    assert half.identity["fingerprint"] == llama.identity["fingerprint"]


def test_fingerprint_sees_other_shapes_and_other_weights(model_folder, load_base, llama, tmp_path):
    fingerprints = {load_base(name).identity["fingerprint"] for name in ("llama", "qwen3", "gpt_neox", "t5")}
    assert len(fingerprints) == 4
    for key in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        other = copy.deepcopy(llama.model)
        other.get_parameter(key).data.mul_(1.1)
        assert BaseLM(other, llama.tokenizer, "x").identity["fingerprint"] != llama.identity["fingerprint"], key


def test_home_is_expanded(model_folder, monkeypatch):
    folder = model_folder("llama")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert lm.load(ModelConfig(path="~/llama", device="cpu")).hidden_size == 32


def test_loading_opens_no_connection(model_folder, encoder_folder, tmp_path, monkeypatch):
    """With the hub allowed but every socket refused, local models and encoders load: nothing looks for the network."""
    import huggingface_hub.constants

    from persona.encoders import Encoder, EncoderConfig

    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    lm.load(ModelConfig(path=str(model_folder("llama")), device="cpu"))
    lm.load(ModelConfig(path=str(model_folder("t5")), device="cpu"))
    lm.load(ModelConfig(device="cpu"))  # the shipped town LM
    Encoder(EncoderConfig(name=str(encoder_folder), pooling="mean"), device="cpu")
    Encoder(EncoderConfig(), device="cpu")
    assert not asked
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub client's retries
    with pytest.raises(UserError):
        lm.load(ModelConfig(path="nobody/nothing"))
    assert asked, "not even a hub id asked for the network: the guard above sees nothing"


# ---- messages to tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", (200, 40, 30, 25, 22, 20, 19))
def test_a_cut_prompt_keeps_its_template(llama, length):
    long = (Message("system", "you are ada"), Message("user", " ".join(PROMPTS)))
    ids, lost = llama.fit(long, length)
    text = llama.tokenizer.decode(ids)
    assert len(ids) <= length
    assert text.startswith("<|system|>you") and text.endswith("</s><|assistant|>") and text.count("</s>") == 2
    kept = text.removesuffix("</s><|assistant|>").partition("<|user|>")[2]
    assert long[1].content.startswith(kept)
    whole = llama.render(long)
    assert (ids == whole) == (lost == 0) == (len(whole) <= length) and lost == len(whole) - len(ids)
    if len(whole) > length:
        assert len(ids) == length, "more was cut than had to be"


@pytest.mark.parametrize("system", (True, False))
def test_of_a_conversation_the_earliest_turns_go_first(llama, system):
    opening = [Message("system", "you are ada")] if system else []
    turns = [[Message("user", text), Message("assistant", text[::-1])] for text in PROMPTS]
    last = Message("user", "good morning")

    def talk(first):
        return [*opening, *(message for turn in turns[first:] for message in turn), last]

    lengths = [len(llama.render(talk(first))) for first in range(len(turns) + 1)]
    assert lengths == sorted(set(lengths), reverse=True)
    for first, length in enumerate(lengths):
        assert llama.fit(talk(0), length) == (llama.render(talk(first)), lengths[0] - length)
        assert llama.fit(talk(0), length + 1) == (llama.render(talk(first)), lengths[0] - length)
    ids, lost = llama.fit(talk(0), lengths[-1] - 2)
    assert len(ids) == lengths[-1] - 2 and lost == lengths[0] - len(ids)
    assert llama.tokenizer.decode(ids).count("<|assistant|>") == 1


def test_a_cut_prompt_of_many_bytes_per_character(llama):
    ids, _ = llama.fit((Message("user", "日本語のとても長い文章です" * 4),), 30)
    assert len(ids) <= 30 and "�" not in llama.tokenizer.decode(ids)


def test_a_prompt_that_cannot_fit(llama):
    with pytest.raises(UserError, match="does not fit into 3 even without its texts"):
        llama.fit(ADA, 3)


def test_an_empty_prompt(llama, t5):
    assert llama.tokenizer.decode(llama.render((Message("user", ""),))) == "<|user|></s><|assistant|>"
    bare = BaseLM(t5.model, t5.tokenizer, "t5")
    assert lm.respond(bare, [lm.Row(bare.render((Message("user", ""),)), torch.ones(1, 32), _request())], _free)


def _request():
    from persona.types import Request, Sampling

    return Request((), sampling=Sampling(max_new_tokens=2))


def _free(indices):
    from contextlib import nullcontext

    return nullcontext()


REPLIES = ("a good day", " spaces around ", "no\nnewline\n\nlost", "", "née 日本 🙂", "</s> inside")


@pytest.mark.parametrize("reply", REPLIES)
def test_reply_with_a_template_is_what_follows_the_prompt(llama, reply):
    ids = llama.render_reply(ADA, reply)
    assert llama.tokenizer.decode(ids) == f"{reply}</s>"
    assert ids[-1] in llama.eos_ids
    text = llama.text(ADA) + llama.tokenizer.decode(ids)
    assert text == llama.text(ADA, reply)


@pytest.mark.parametrize("reply", ("a good day", "née 日本", ""))
def test_reply_without_a_template_and_of_an_encoder_decoder(llama, t5, reply):
    for base in (with_template(llama, None), t5):
        ids = base.render_reply(ADA, reply)
        assert base.tokenizer.decode(ids[:-1]) == reply and ids[-1] == base.tokenizer.eos_token_id


def test_prompt_without_a_template_and_of_an_encoder_decoder(llama, t5):
    assert with_template(llama, None).text(ADA) == "you are ada\nhow was your day at the market ?\n"
    assert t5.text(ADA) == "you are ada\nhow was your day at the market ?"


def test_what_follows_the_end_of_the_turn_is_not_part_of_the_reply(llama):
    base = with_template(llama, CHAT_TEMPLATE.replace("'</s>'", r"'</s>\n'"))
    assert base.text(ADA).count("</s>\n") == 2
    assert base.tokenizer.decode(base.render_reply(ADA, "a good day")) == "a good day</s>"


def test_a_template_that_strips_the_reply(llama):
    base = with_template(llama, CHAT_TEMPLATE.replace("message.content", "message.content | trim"))
    assert base.tokenizer.decode(base.render_reply(ADA, " a good day ")) == "a good day</s>"


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def test_a_template_without_a_system_role_gets_it_in_the_first_turn(llama):
    base = with_template(llama, NO_SYSTEM + CHAT_TEMPLATE)
    assert base.text(ADA) == "<|user|>you are ada\n\nhow was your day at the market ?</s><|assistant|>"
    assert base.tokenizer.decode(base.render_reply(ADA, "a good day")) == "a good day</s>"
    assert base.text(ADA[1:]) == "<|user|>how was your day at the market ?</s><|assistant|>"


def test_a_template_that_refuses_is_a_user_error(llama):
    base = with_template(llama, "{{ raise_exception('turns have to alternate') }}")
    with pytest.raises(UserError, match="refused the conversation: turns have to alternate"):
        base.text(ADA)


def test_a_template_that_does_not_continue_its_prompt(llama):
    base = with_template(llama, CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|>think: '"))
    with pytest.raises(UserError, match="does not continue its generation prompt"):
        base.render_reply(ADA, "a good day")


def test_a_template_that_drops_the_reply(llama):
    base = with_template(llama, "<|user|>{% if add_generation_prompt %}{% else %}</s>{% endif %}")
    with pytest.raises(UserError, match="a good day"):
        base.render_reply(ADA, "a good day")


def test_a_tokenizer_without_padding_gets_one(llama):
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.pad_token = None
    assert BaseLM(llama.model, tokenizer, "x").tokenizer.pad_token_id == tokenizer.eos_token_id


def test_end_tokens_of_tokenizer_and_generation_config(llama):
    before = llama.model.generation_config.eos_token_id
    try:
        llama.model.generation_config.eos_token_id = [2, 17]
        assert llama.eos_ids == {2, 17}
    finally:
        llama.model.generation_config.eos_token_id = before


# ---- models from scratch -------------------------------------------------------------------------------------------


def test_scratch_is_decided_by_its_seed(llama, tmp_path):
    from safetensors.torch import load_file

    from persona.lm.scratch import make

    folders = [make(tmp_path / str(i), llama.tokenizer, hidden=16, seed=seed) for i, seed in enumerate((1, 1, 2))]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_scratch_command(tmp_path, capsys, monkeypatch):
    from persona.lm import scratch

    (tmp_path / "a.json").write_text(json.dumps({"x": ["good morning", {"y": "the red house"}]}))
    (tmp_path / "b.txt").write_text("small boats\nlong walks\n")
    sizes = ["--hidden", "16", "--layers", "1", "--heads", "2", "--vocab", "300"]
    arguments = [str(tmp_path / "base"), *sizes, "--texts"]
    monkeypatch.setattr(sys, "argv", ["scratch", *arguments, str(tmp_path / "a.json"), str(tmp_path / "b.txt")])
    scratch.main()
    assert "llama, 2" in capsys.readouterr().out or "llama, 300" in capsys.readouterr().out
    base = lm.load(ModelConfig(path=str(tmp_path / "base"), device="cpu"))
    assert base.chat and base.hidden_size == 16
    monkeypatch.setattr(sys, "argv", ["scratch", *arguments, str(tmp_path / "absent.json")])
    with pytest.raises(SystemExit) as caught:
        scratch.main()
    assert caught.value.code == 2 and "absent.json, which is not a file" in capsys.readouterr().err


def test_scratch_of_an_unknown_architecture(llama, tmp_path):
    from persona.lm.scratch import make

    with pytest.raises(UserError, match="architecture 'rnn' is not known here"):
        make(tmp_path / "x", llama.tokenizer, "rnn")
