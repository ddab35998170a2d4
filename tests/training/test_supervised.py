"""Supervised training: which tokens are learned, exactly; what moves; and that stopping loses nothing."""

from __future__ import annotations

import json
import logging
import math
import shutil

import pytest
import torch
from preference_toys import TALK, TALKS, supervise, user
from safetensors.torch import load_file
from test_lora import assert_same, below, state  # noqa: F401
from training_toys import curve, in_two

import persona
from persona import lm
from persona.errors import UserError
from persona.personalizer import LanguageModel
from persona.training.lora import LoRA, LoraSettings
from persona.training.supervised import encode
from persona.types import Message, Request

# Words are tokens here, so that a row can be read: specials, template words, then the words of the conversations.
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "[sys]", "[usr]", "[bot]", "be", "kind", "hi", "hello", "how", "are", "you",
         "fine", "<think>", "</think>"]  # fmt: skip
SYS, USR, BOT, END = 4, 5, 6, 2
TEMPLATES = {
    # A system role; every turn ends with </s>.
    "plain": "{% for m in messages %}{{ {'system': '[sys] ', 'user': '[usr] ', 'assistant': '[bot] '}[m.role] }}"
    "{{ m.content + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}{{ '[bot] ' }}{% endif %}",
    # As Gemma: no system role, and content is stripped.
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ {'user': '[usr] ', 'assistant': '[bot] '}[m.role] + m.content.strip() + ' </s> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[bot] ' }}{% endif %}",
    # As Qwen3: the last reply carries (empty) thoughts, earlier ones have lost theirs.
    "thoughts": "{% for m in messages %}{{ {'system': '[sys] ', 'user': '[usr] ', 'assistant': '[bot] '}[m.role] }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think> </think> ' }}{% endif %}{{ m.content + ' </s> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[bot] ' }}{% endif %}",
}
SHORT = (
    Message("system", "be kind"),
    Message("user", "hi"),
    Message("assistant", "hello you"),
    Message("user", "how are you"),
    Message("assistant", "fine"),
)


def worded(llama, template: str | None) -> lm.BaseLM:
    """The tiny llama's weights behind a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = None if template is None else TEMPLATES[template]
    return lm.BaseLM(llama.model, fast, "worded")


def test_every_assistant_turn_by_hand(llama):
    (row,), dropped = encode(worded(llama, "plain"), SHORT)
    # fmt: off
    assert row["input_ids"] == [SYS, 7, 8, END, USR, 9, END, BOT, 10, 13, END, USR, 11, 12, 13, END, BOT, 14, END]
    assert row["labels"] == [
        -100, -100, -100, -100,   # [sys] be kind </s>
        -100, -100, -100,         # [usr] hi </s>
        -100, 10, 13, END,        # [bot] hello you </s>: the words and the end of the turn are learned
        -100, -100, -100, -100, -100,  # [usr] how are you </s>
        -100, 14, END,            # [bot] fine </s>
    ]
    # fmt: on
    assert dropped == []


def test_a_template_without_system_role_by_hand(llama):
    (row,), _ = encode(worded(llama, "no system"), SHORT)
    # fmt: off
    assert row["input_ids"] == [USR, 7, 8, 9, END, BOT, 10, 13, END, USR, 11, 12, 13, END, BOT, 14, END]
    assert row["labels"] == [
        -100, -100, -100, -100, -100,  # [usr] be kind (blank line) hi </s>
        -100, 10, 13, END,
        -100, -100, -100, -100, -100,
        -100, 14, END,
    ]
    # fmt: on


def test_a_template_that_does_not_go_on_gives_a_row_per_turn(llama):
    """What stood before a reply when it was made is not what stands there later: each turn keeps its own prompt."""
    rows, _ = encode(worded(llama, "thoughts"), SHORT[1:])
    # fmt: off
    assert [row["input_ids"] for row in rows] == [
        [USR, 9, END, BOT, 15, 16, 10, 13, END],
        [USR, 9, END, BOT, 10, 13, END, USR, 11, 12, 13, END, BOT, 15, 16, 14, END],
    ]
    assert [row["labels"] for row in rows] == [
        [-100, -100, -100, -100, 15, 16, 10, 13, END],
        [-100] * 13 + [15, 16, 14, END],
    ]
    # fmt: on


def test_without_a_template_every_turn_ends_where_a_prompt_would(llama):
    rows, _ = encode(worded(llama, None), SHORT[1:])
    assert [row["input_ids"] for row in rows] == [[9, 10, 13, END], [9, 10, 13, 11, 12, 13, 14, END]]
    assert [row["labels"] for row in rows] == [[-100, 10, 13, END], [-100] * 6 + [14, END]]


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_neox"))
def test_what_is_learned_is_what_is_scored(load_base, name):
    """Each turn stands behind the prompt that evaluation renders, and is the reply that evaluation scores."""
    base = load_base(name)
    (row,), _ = encode(base, TALK)
    for number in (2, 4):
        prompt, reply = base.render(TALK[:number]), base.render_reply(TALK[:number], TALK[number].content)
        end = len(prompt) + len(reply)
        assert row["input_ids"][:end] == prompt + reply and row["labels"][len(prompt) : end] == reply
    learned = [token for token in row["labels"] if token != -100]
    assert base.tokenizer.decode(learned) == "how was your day ?</s>i like long walks</s>"


def test_a_reply_that_the_tokens_do_not_hold_is_refused_with_both(llama, tmp_path):
    base = worded(llama, "plain")
    base.tokenizer.chat_template = TEMPLATES["plain"].replace("m.content", "m.content | replace('fine', 'fine fine')")
    encode(base, SHORT)  # more than the content is the template's affair
    base.render_reply = lambda messages, reply: [14, END]
    said = (
        "conversation 1: an assistant turn does not come back out of its tokens: they hold 'fine', the turn is 'hello"
    )
    with pytest.raises(UserError, match=said):
        supervise(base, tmp_path, [SHORT[3:], SHORT])


def test_turns_that_do_not_fit_are_left_out_and_listed(llama, tmp_path, caplog):
    base = worded(llama, "plain")
    rows, dropped = encode(base, SHORT, 18)
    assert [len(row["input_ids"]) for row in rows] == [11] and dropped == [{"turn": 4, "tokens": 19}]
    assert encode(base, SHORT, 19) == encode(base, SHORT)
    with caplog.at_level(logging.WARNING):
        supervise(base, tmp_path, [SHORT[:3], SHORT], max_length=18, max_steps=1, lora=LoraSettings(r=2))
    assert "1 of 3 assistant turns have more than 18 tokens, the longest 19: they are left out" in caplog.text
    assert json.loads((tmp_path / "dropped.jsonl").read_text()) == {"conversation": 1, "turn": 4, "tokens": 19}


# ---- training ------------------------------------------------------------------------------------------------------


def turns(talks):
    return [(talk[:i], message.content) for talk in talks for i, message in enumerate(talk)
            if message.role == "assistant"]  # fmt: skip


def expected_loss(model: LanguageModel, talks) -> float:
    scored = model.loglikelihood([Request(before) for before, _ in turns(talks)], [text for _, text in turns(talks)])
    return -sum(logp for logp, _ in scored) / sum(count for _, count in scored)


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_the_first_loss_is_the_mean_over_all_learned_tokens(load_base, tmp_path, name):
    """Over all turns of the step, also when it is made of accumulated batches of different lengths."""
    base = load_base(name)
    expected = expected_loss(LanguageModel(base), TALKS)
    for size, batches in ((12, 1), (3, 4)):
        out = tmp_path / str(size)
        supervise(base, out, max_steps=1, batch_size=size, gradient_accumulation=batches, learning_rate=0.0)
        assert curve(out)[1] == pytest.approx(expected, rel=1e-4)


def test_it_learns_over_frozen_adapters_and_the_base_is_what_it_was(llama, below, tmp_path):  # noqa: F811
    before = state(llama)
    stack = [LoRA(llama, folder) for folder in below]
    folder = supervise(llama, tmp_path, below=below, max_steps=20)
    assert_same(before, state(llama))
    assert curve(tmp_path)[20] < curve(tmp_path)[1] / 2
    new = persona.load(llama, [*stack, LoRA(llama, folder)])
    assert expected_loss(new, TALKS) < expected_loss(persona.load(llama, stack), TALKS) / 2


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, supervise(llama, out, max_steps=8)


def test_resumed_is_uninterrupted(whole, llama, tmp_path):
    out, folder = whole
    supervise(llama, tmp_path, max_steps=8, save_every=3)
    for step in (8, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"checkpoint-{step}")
    again = supervise(llama, tmp_path, max_steps=8, save_every=3)
    assert curve(tmp_path) == curve(out) and sorted(curve(out)) == list(range(1, 9))
    one, other = (load_file(f / "adapter_model.safetensors") for f in (folder, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.multi_process
def test_two_processes_are_one(whole, llama, tmp_path):
    out, folder = whole
    assert in_two(lambda: supervise(llama, tmp_path, max_steps=8, batch_size=2)) == [0, 0]
    ours, theirs = curve(tmp_path), curve(out)
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=5e-4)
    one, other = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "adapter"))
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(llama, t5, tmp_path):
    before = state(llama)
    with pytest.raises(UserError, match="there is no conversation to train on"):
        supervise(llama, tmp_path, [])
    with pytest.raises(UserError, match="conversation 1 has no assistant turn to learn from"):
        supervise(llama, tmp_path, [TALK, user("the fox")])
    with pytest.raises(UserError, match="21 of 21 assistant turns have more than 3 tokens.* nothing left to train on"):
        supervise(llama, tmp_path, max_length=3)
    with pytest.raises(UserError, match="is an encoder-decoder LM"):
        supervise(t5, tmp_path)
    with pytest.raises(UserError, match="output head"):
        supervise(llama, tmp_path, lora=LoraSettings(r=2, target_modules=".*(lm_head|q_proj)"))
    with pytest.raises(UserError, match="the loss became nan in step 2"):
        supervise(llama, tmp_path, learning_rate=math.inf)
    assert_same(before, state(llama))
