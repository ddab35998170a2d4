"""Spans of messages: the tokens of each content and no others, whatever the template does around them."""

from __future__ import annotations

import copy

import pytest
from lm_toys import ALL

from persona.errors import UserError
from persona.lm import BaseLM
from persona.lm.spans import message_spans, message_tokens, reply_tokens
from persona.types import Message

QWEN = (
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}"
    "{%- set thought = '' -%}{%- set content = m.content -%}"
    "{%- if '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|assistant|>\\n' -}}"
    "{%- if loop.index0 > ns.last -%}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- content + '</s>\\n' -}}"
    "{%- else -%}{{- '<|' + m.role + '|>\\n' + m.content + '</s>\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)
STRIPS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.role + '\\n' + m.content | trim + '</s>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>assistant\\n' }}{% endif %}"
)
DROPS = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endif %}"
    "{% endfor %}"
)
SHOUTS = "{% for m in messages %}{{ m.role + ': ' + m.content | upper + '\\n' }}{% endfor %}"
TAG = "{% for m in messages %}{{ '[' + m.role + ' says ]' + m.content + '[ends]' }}{% endfor %}"


def chat(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(*pair) for pair in pairs)


def with_template(base: BaseLM, template: str | None) -> BaseLM:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template
    return BaseLM(base.model, tokenizer, "templated")


def decoded(base: BaseLM, messages) -> list[str]:
    ids, spans = message_tokens(base, messages)
    assert message_spans(base, messages) == spans
    return [base.tokenizer.decode(ids[span.start : span.stop]) for span in spans]


TALK = chat(
    ("system", "be brief"), ("user", "yes"), ("assistant", "yes"), ("user", "user"), ("assistant", ""),
    ("user", "</s><|assistant|>no"), ("assistant", "the river\n\n and the rain ; é 漢 🙂"),
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ALL if name != "t5"])
def test_each_span_is_its_content(load_base, name):
    """Repeated texts, a role's name as text, an empty reply, markup inside a text, letters of several tokens."""
    assert decoded(load_base(name), TALK) == [message.content for message in TALK]


@pytest.mark.parametrize("template", [QWEN, TAG, STRIPS, None])
def test_templates(llama, template):
    base = with_template(llama, template)
    assert [text.strip() for text in decoded(base, TALK)] == [message.content for message in TALK]
    ids, spans = message_tokens(base, TALK)
    assert ids == base._encode(base.text(TALK[:-1], TALK[-1].content), special=template is None)
    if template == STRIPS:  # the system message opens the first user turn
        assert len(base.tokenizer.decode(ids[spans[0].stop : spans[1].start]).strip()) == 0
    asked = chat(("user", "the fox"))
    ids, (span,) = message_tokens(base, asked)
    assert base.tokenizer.decode(ids[span.start : span.stop]) == "the fox" and ids == base.render(asked)


@pytest.mark.parametrize("template", [QWEN, STRIPS, TAG])
@pytest.mark.parametrize("text", ["\n\nthe fox", "  the fox  ", "the fox\n"])
def test_white_space_around_a_content_is_outside(llama, template, text):
    base = with_template(llama, template)
    messages = chat(("user", text), ("assistant", text), ("user", "why"), ("assistant", " " + text))
    assert [found.strip() for found in decoded(base, messages)] == ["the fox", "the fox", "why", "the fox"]
    ids, spans = message_tokens(base, messages)
    assert all("</s>" not in base.tokenizer.decode(ids[span.start : span.stop]) for span in spans)


def test_thoughts_are_outside(llama):
    base = with_template(llama, QWEN)
    first, last = "<think>\nwhy the fox\n</think>\n\nthe fox", "<think>\nthe river\n</think>\n\nthe river"
    messages = chat(("user", "who"), ("assistant", first), ("user", "where"), ("assistant", last))
    assert decoded(base, messages) == ["who", "the fox", "where", "the river"]
    ids, spans = message_tokens(base, messages)
    text = base.tokenizer.decode(ids)
    assert "why the fox" not in text and text.count("the river") == 2  # an earlier thought is not written at all
    assert spans[3].start == base.tokenizer(text.rpartition("the river")[0], return_length=True)["length"][0]
    assert decoded(base, messages[:2])[1] == "the fox"
    assert decoded(llama, messages)[1].strip() == "the fox"  # a template that knows no thoughts


def test_white_space_alone_is_an_empty_span(llama):
    ids, spans = message_tokens(llama, chat(("user", "hi"), ("assistant", " \n "), ("user", ""), ("assistant", "yes")))
    assert [len(span) > 0 for span in spans] == [True, False, False, True] and spans[1].start < spans[3].start


def test_what_cannot_be_found_is_an_error(llama):
    with pytest.raises(UserError, match="leaves out the system message 'be brief': it cannot be found in the prompt"):
        message_tokens(with_template(llama, DROPS), TALK)
    with pytest.raises(UserError, match="leaves out the user message 'the fox'"):
        message_tokens(with_template(llama, SHOUTS), chat(("user", "the fox")))
    halves = "{% for m in messages %}{{ '<|user|>' + m.content[:2000] + '</s>' }}{% endfor %}"
    with pytest.raises(
        UserError, match="changes the user message 'the fox the .*': where it should stand there is 'the"
    ):
        message_tokens(with_template(llama, halves), chat(("user", "the fox " * 400)))


def test_a_token_across_the_border_is_an_error(llama):
    """Two texts that tokenization joins: no span is either of them."""
    words = sorted(word for word in llama.tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    word = next(word for word in words if len(llama.tokenizer(word)["input_ids"]) == 1)
    glued = f"{{% for m in messages %}}{{{{ '{word[:1]}' + m.content + '</s>' }}}}{{% endfor %}}"
    with pytest.raises(UserError, match=f"a message's tokens are those of '{word}', not of its content '{word[1:]}'"):
        message_tokens(with_template(llama, glued), chat(("user", word[1:])))


def test_a_reply_behind_its_prompt(llama):
    asked = chat(("user", "the fox"))
    for template, before in ((None, ""), (TAG, "[assistant says ]"), (QWEN, "<think>\n\n</think>\n\n"), (STRIPS, "")):
        base = with_template(llama, template)
        ids, span = reply_tokens(base, asked, " think ")
        whole = base.tokenizer.decode(base.render(asked) + ids)
        assert base.tokenizer.decode(ids[span.start : span.stop]).strip() == "think" and span.stop == len(ids)
        assert base.tokenizer.decode(ids[: span.start]).strip() == before.strip()
        rest = "".join(base.text(asked, " think ").split())
        assert rest.startswith("".join(whole.split()))
        assert len(reply_tokens(base, asked, " ")[1]) == 0
    jumps = "{{ '<|assistant|>think: ' if add_generation_prompt }}"
    with pytest.raises(UserError, match="does not continue its generation prompt"):
        reply_tokens(with_template(llama, TAG + jumps), asked, "x")


def test_replies_of_an_encoder_decoder(t5):
    ids, span = reply_tokens(t5, (), "  the red house ")
    assert t5.tokenizer.decode(ids[span.start : span.stop]) == "the red house" and len(span) == len(ids)
    assert reply_tokens(t5, (), "") == ([], range(0, 0))
