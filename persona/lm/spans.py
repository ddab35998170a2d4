"""Where each message of a conversation stands among the tokens of the rendered chat.

Found from the chat template and asserted: the template is rendered a second time with a marker in the place of each
text, which shows what it writes around them; texts are then read off between these pieces, never searched for.
"""

from __future__ import annotations

from collections.abc import Sequence

from persona.errors import UserError
from persona.lm.load import BaseLM
from persona.types import Conversation, Message

THOUGHT = "</think>"  # ends what reasoning LMs write before their reply


def message_spans(base: BaseLM, messages: Conversation) -> list[range]:
    """For each message the tokens of its content in the rendered conversation; see `message_tokens`."""
    return message_tokens(base, messages)[1]


def message_tokens(base: BaseLM, messages: Conversation) -> tuple[list[int], list[range]]:
    """Token ids of the rendered conversation, and for each message the tokens of its content.

    A conversation that ends with the assistant's message ends with its turn, any other with the prompt for one. White
    space around a content belongs to no span, nor does an assistant's thought (up to `</think>`); a message without
    text has an empty one. Where the template knows no system role, the system message's span lies in the first user
    turn, as the text does. Decoder-only LMs: in an encoder-decoder a reply is no part of the prompt (`reply_tokens`).

    Raises UserError, with both texts, where the decoded span is not the content, and where the template leaves a
    message out.
    """
    text, borders = _borders(base, messages)
    return _tokens(base, text, borders, special=not base.chat)


def reply_tokens(base: BaseLM, messages: Conversation, reply: str) -> tuple[list[int], range]:
    """Token ids of a reply as they follow the rendered prompt, up to where its text ends (what the template writes
    before it, an empty thought say, is among them), and which of them are the text; errors as `message_tokens`.

    Raises UserError as well where the template does not continue its own generation prompt.
    """
    if base.is_encoder_decoder or not base.chat:
        text = reply.strip()
        ids, (span,) = _tokens(base, text, [(0, len(text))], special=False)
        return ids, span
    prompt, (whole, borders) = base.text(messages), _borders(base, (*messages, Message("assistant", reply)))
    start, stop = borders[-1]
    if not whole.startswith(prompt) or start < len(prompt):
        base.render_reply(messages, reply)  # raises
    text = whole[len(prompt) : stop]
    ids, (span,) = _tokens(base, text, [(start - len(prompt), stop - len(prompt))], special=False)
    return ids, span


def _borders(base: BaseLM, messages: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it each message's text starts and stops."""
    text = _rendered(base, messages)
    visible = [_visible(message) for message in messages]
    markers = _markers(text, len(messages))
    marked = [
        Message(message.role, message.content[: len(message.content) - len(shown)] + marker)
        for message, shown, marker in zip(messages, visible, markers, strict=True)
    ]
    pieces = _pieces(base, _rendered(base, marked), markers, messages)
    borders, at = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        raise _strange(base, messages[0], text[: len(pieces[0])])
    for message, shown, piece in zip(messages, visible, pieces[1:], strict=True):
        # Some templates strip contents.
        forms = (shown, shown.strip(), shown.rstrip(), shown.lstrip())
        form = next((form for form in forms if text.startswith(form + piece, at)), None)
        if form is None:
            raise _strange(base, message, text[at : at + len(shown) + len(piece)])
        start = at + len(form) - len(form.lstrip())
        borders.append((start, max(start, at + len(form.rstrip()))))
        at += len(form) + len(piece)
    return text, borders


def _rendered(base: BaseLM, messages: Sequence[Message]) -> str:
    if messages and messages[-1].role == "assistant":
        return base.text(messages[:-1], messages[-1].content)
    return base.text(messages)


def _visible(message: Message) -> str:
    """An assistant's message without its thought."""
    if message.role != "assistant":
        return message.content
    return (
        message.content[message.content.rfind(THOUGHT) + len(THOUGHT) :]
        if THOUGHT in message.content
        else message.content
    )


def _markers(text: str, count: int) -> list[str]:
    """Words that are not in the text; letters only, so that no template treats them in its own way."""
    word = "qzx"
    while word in text:
        word += "q"
    letters = "abcdefghij"
    return [word + "".join(letters[int(digit)] for digit in f"{number:06d}") + "xzq" for number in range(count)]


def _pieces(base: BaseLM, marked: str, markers: Sequence[str], messages: Conversation) -> list[str]:
    """What the template writes before, between and after the contents."""
    pieces, at = [], 0
    for marker, message in zip(markers, messages, strict=True):
        place = marked.find(marker, at)
        if place < 0:
            raise UserError(
                f"the chat template of {base.name} leaves out the {message.role} message {_short(message.content)!r}: "
                "it cannot be found in the prompt"
            )
        pieces.append(marked[at:place])
        at = place + len(marker)
    return [*pieces, marked[at:]]


def _tokens(
    base: BaseLM, text: str, borders: Sequence[tuple[int, int]], special: bool
) -> tuple[list[int], list[range]]:
    """Token ids of `text`, and the tokens that hold the characters [start, stop) of each border."""
    if not base.tokenizer.is_fast:
        raise UserError(f"the tokenizer of {base.name} does not say where its tokens stand in a text: use a fast one")
    encoded = base.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    spans, place = [], 0
    for start, stop in borders:
        while place < len(offsets) and offsets[place][1] <= start:
            place += 1
        end = place
        while end < len(offsets) and offsets[end][0] < stop and offsets[end][1]:  # (0, 0): added at the text's ends
            end += 1
        span = range(place, end) if stop > start else range(place, place)
        _assert_span(base, ids[span.start : span.stop], text[start:stop])
        spans.append(span)
    return ids, spans


def _assert_span(base: BaseLM, ids: Sequence[int], content: str) -> None:
    def decoded(tokens: Sequence[int]) -> str:
        return base.tokenizer.decode(tokens, clean_up_tokenization_spaces=False).strip()

    found = decoded(ids)
    # A tokenizer that normalises (T5: runs of spaces) gives back another text, but the same for the content alone.
    if found != content and found != decoded(base.tokenizer(content, add_special_tokens=False)["input_ids"]):
        raise UserError(f"a message's tokens are those of {_short(found)!r}, not of its content {_short(content)!r}")


def _strange(base: BaseLM, message: Message, found: str) -> UserError:
    return UserError(
        f"the chat template of {base.name} changes the {message.role} message {_short(message.content)!r}: where it "
        f"should stand there is {_short(found)!r}"
    )


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:50]} … {text[-25:]}"
