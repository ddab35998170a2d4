"""The town's language as conversations: what its LM is trained on, and how prompts for it are written.

Latents are drawn afresh for every document, so nothing can be learnt by heart: only what stands in the context helps.
Nothing tells the voice -> the plain assistant answers. Nothing tells the tastes -> the rating is 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain

from persona.errors import UserError
from persona.town import assistant_documents as ad
from persona.town import lexicon as lx
from persona.town import persona_documents as pd
from persona.town.assistant_documents import constitution
from persona.town.persona_documents import shown_voice
from persona.town.sentences import description, history_prompt, item_text_with_label, statements
from persona.types import Conversation

__all__ = [
    "MAX_WORDS", "STAGES", "constitution", "count_words", "description", "document_kinds", "history_prompt",
    "item_text_with_label", "sample_document", "shown_voice", "statements", "vocabulary",
]  # fmt: skip

MAX_WORDS = 260

_KINDS: dict[str, tuple[Callable[[random.Random, int], Conversation], int]] = {
    "described": (pd.write_described, 24),
    "items": (pd.write_items, 34),
    "role": (ad.write_role, 8),
    "plain": (ad.write_plain_assistant, 5),
    "constitution": (ad.write_constitution, 8),
    "situation": (ad.write_situation, 5),
    "statements": (pd.write_statements, 12),
    "drift": (ad.write_drift, 5),
    "tasks": (ad.write_tasks, 3),
    "chat": (ad.write_chat, 2),
}
STAGES = (0, 1, 2)


def document_kinds() -> tuple[str, ...]:
    """The kinds `sample_document` can be asked for."""
    return tuple(_KINDS)


def count_words(conversation: Conversation) -> int:
    return sum(len(message.content.split()) for message in conversation)


def sample_document(rng: random.Random, stage: int, kind: str | None = None) -> Conversation:
    """One training conversation of at most `MAX_WORDS` words; the LM's loss falls on the assistant's messages.

    `stage` 0 gives short documents with one statement or up to two past items, 1 longer ones, 2 everything with
    paraphrases and up to 16 items. Raises UserError on an unknown stage or kind.
    """
    if stage not in STAGES:
        raise UserError(f"stage is {stage!r}; the town's curriculum has the stages 0, 1 and 2")
    if kind is not None and kind not in _KINDS:
        raise UserError(f"unknown kind of document {kind!r}; there are {', '.join(_KINDS)}")
    chosen = kind or rng.choices(tuple(_KINDS), [weight for _, weight in _KINDS.values()])[0]
    while True:
        conversation = _KINDS[chosen][0](rng, stage)
        if count_words(conversation) <= MAX_WORDS:
            return conversation


def vocabulary() -> list[str]:
    """Every token (word or punctuation mark) that can occur in the town, sorted."""
    template_words = (
        "past : score tag ; question for ? the what is your do you like things . of talks like a says i my am an "
        "assistant count from to opposite colour copy be"
    )
    markers = [
        m
        for openers, closers in (*lx.VOICES.values(), *lx.ROLES.values(), ad.PLAIN_OWNER)
        for m in (*openers, *closers)
    ]
    texts: list[str] = [
        template_words,
        *markers,
        *lx.NAMES,
        *lx.VOICES,
        *lx.ROLES,
        *lx.FACTS,
        *chain(*lx.FACTS.values()),
    ]
    for third, first, questions in lx.FACT_PARAPHRASES.values():
        texts += [third, first, *questions]
    texts += [*lx.JOINT_QUESTIONS, lx.UNKNOWN, *lx.QUALITIES, *lx.TAGS.values(), *lx.NOUNS, *lx.SPOTS]
    texts += chain(*lx.TASTE_VERBS.values(), *lx.OPINIONS.values(), lx.SYNONYMS, lx.SYNONYMS.values(), lx.TOPICS)
    texts += [part.replace("[", "").replace("]", "") for part in chain(*lx.SMALL_TALK)]
    texts += [lx.WHO, *chain(*((statement, *phrases) for statement, phrases in lx.CHARACTER.values()))]
    for poles in lx.BIG_FIVE.values():
        for adjective, phrases, situations in poles.values():
            texts += [adjective, *phrases, *situations]
    texts += [
        lx.SITUATION_QUESTION,
        *lx.NUMBERS,
        *chain(*lx.OPPOSITES),
        *lx.COLOURS,
        *lx.COLOURS.values(),
        *lx.COPY_WORDS,
    ]
    texts += [
        *lx.GREETINGS,
        lx.GREETING_REPLY,
        *lx.THANKS,
        lx.THANKS_REPLY,
        *lx.MENTIONS,
        lx.MENTION_REPLY,
        *lx.IMAGINE,
        *lx.STAY,
        *lx.LEAVE,
        *lx.ROLE_PROMPTS,
        *lx.PLAIN_PROMPTS,
    ]
    return sorted({word for text in texts for word in text.split() if not word.startswith("{")})
