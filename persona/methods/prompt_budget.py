"""LaMP's token budget: how much of each history item fits into a prompt (reference/lamp.md §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from persona.data.base import Task
from persona.types import HistoryItem


class Tokens(Protocol):
    """What the budget needs of a tokenizer. `special`: tokens it adds to every text (BOS, EOS)."""

    special: int

    def count(self, text: str) -> int:
        """Tokens of `text` without special ones."""

    def cut(self, text: str, length: int) -> str:
        """The first `length` tokens of `text` (without special ones) as text; all of it when it is shorter."""


class TokenizerTokens:
    """`Tokens` of a Hugging Face tokenizer.

    By default the text is cut at a token's border and otherwise stays as written; `decoded` decodes its ids instead,
    as the reference does, which loses line breaks and characters that T5's vocabulary lacks.
    """

    def __init__(self, tokenizer: Any, decoded: bool = False) -> None:
        self.tokenizer, self.decoded = tokenizer, decoded
        self.special = int(tokenizer.num_special_tokens_to_add())

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def cut(self, text: str, length: int) -> str:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=not self.decoded)
        if self.decoded:
            return self.tokenizer.decode(encoded["input_ids"][:length], skip_special_tokens=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        return text if len(ends) <= length else text[: ends[length - 1] if length else 0]


def _texts(task: Task, items: Sequence[HistoryItem], room: int, tokens: Tokens) -> list[str] | None:
    """Each item's text, cut so that together they take `room` tokens; what one item leaves, the next may use."""
    if room < 0:
        return None
    share, saved, texts = room // len(items), 0, []
    for item in items:
        text = tokens.cut(task.snippet_text(item), share + saved)
        saved += share - tokens.count(text)
        texts.append(text)
    return texts


def _reference_texts(
    task: Task, items: Sequence[HistoryItem], room: int, tokens: Tokens, trailing: int
) -> list[str] | None:
    """The published reckoning: 2 tokens per separator, 1 before the prompt, special tokens in every single count."""
    between = 2 * (len(items) - 1)
    fixed = between if task.inline else 1 + between + trailing
    share, saved, texts = (room - fixed) // len(items), 0, []
    for item in items:
        frame = tokens.count(task.snippet(item, "")) + tokens.special
        length = share + saved - frame - tokens.special
        if length < 0:
            return None
        text = tokens.cut(task.snippet_text(item), length)
        saved += share - frame - tokens.count(text) - tokens.special
        texts.append(text)
    return texts


def augment(
    task: Task,
    prompt: str,
    items: Sequence[HistoryItem],
    tokens: Tokens,
    max_length: int,
    compat: str | None = None,
) -> str:
    """`prompt` with `items` written into it by the task's rules, in the order given, within `max_length` tokens.

    Of the prompt itself min(its tokens, factor * max_length) count, the rest is for the items: after the fixed words
    around them, equal shares for their texts, what one leaves going to the next. The factor starts at .6 and goes
    down by .1 while there is no room; when there is none at all, or no item, the bare prompt is returned. The prompt
    is never cut, so a prompt above factor * max_length gives a result above max_length, as in the reference.

    Source: reference/lamp.md §3.2. There, and with compat="reference", fixed words are reckoned per item and special
    tokens in every count; here they are counted once, in the prompt as it will be.
    """
    if not items:
        return prompt
    length = tokens.count(prompt)
    for tenths in range(6, -1, -1):
        if compat == "reference":
            trailing = tokens.count(task.trailing) + tokens.special if task.trailing else 0
            room = max_length - min(length + tokens.special, tenths * max_length // 10)
            texts = _reference_texts(task, items, room, tokens, trailing)
        else:
            bare = task.join([task.snippet(item, "") for item in items], prompt)
            around = tokens.count(bare) + tokens.special - length
            texts = _texts(task, items, max_length - min(length, tenths * max_length // 10) - around, tokens)
        if texts is not None:
            return task.join([task.snippet(item, text) for item, text in zip(items, texts, strict=True)], prompt)
    return prompt
