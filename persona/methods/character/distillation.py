"""Second stage: what the teacher in the role says against what the student says of itself (notes 3.3).

Both answer the same prompts. The teacher reads the constitution, the student does not, and neither the system prompt
nor the teacher's thoughts are kept: what is learned is to be that character when nobody asks for it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from persona.evaluation.roles import Roles
from persona.lm import BaseLM
from persona.methods.character.prompts import PromptSet
from persona.methods.character.sampling import SamplingConfig
from persona.types import Conversation, Message, Request, Response

THINKING_ENDS = "</think>"


@dataclass
class DistillConfig:
    """`repeats`: how often every prompt is answered. `second_turns`: how often it is answered once more as a second
    turn, behind another prompt and the student's plain answer to it; none as published. `thinking`: begin the
    teacher's reply with the thoughts of thinking.md, for a teacher that reasons. `max_length`: tokens of prompt and
    answer; longer pairs are left out."""

    repeats: int = 5
    second_turns: int = 0
    thinking: bool = False
    max_new_tokens: int = 4096
    max_length: int = 1024


async def distill(
    prompt: str,
    roles: Roles,
    prompts: PromptSet,
    traits: Sequence[str],
    config: DistillConfig,
    sampling: SamplingConfig,
    seed: int,
    name: str,
    first: str | None = None,
) -> dict[str, Any]:
    """One prompt, answered by both; the teacher is the role `reference`. `first`: a prompt that the student answers
    before, in both of their conversations.

    Returns prompt, chosen (the teacher's answer), rejected (the student's), unfinished (which of them were cut off),
    and with a first prompt `before`, the messages in front of the prompt.
    """
    *system, asked = prompts.fill("teacher", traits=traits, prompt=prompt)
    opening = prompts.fill("thinking", traits=traits)[0].content + "\n" if config.thinking else ""
    assert roles.reference is not None
    before: Conversation = ()
    if first is not None:
        before = (Message("user", first),)
        draw = sampling.of(config.max_new_tokens, seed, f"first/{name}")
        before += (Message("assistant", (await roles.model.respond(Request(before, sampling=draw))).text.strip()),)
    messages, plain = (*system, *before, asked), (*before, Message("user", prompt))
    own = await roles.model.respond(
        Request(plain, sampling=sampling.of(config.max_new_tokens, seed, f"student/{name}"))
    )
    # Last, so that an answer of the teacher, which may be paid for, is a whole row at once.
    taught = await roles.reference.respond(
        Request(messages, sampling=sampling.of(config.max_new_tokens, seed, f"teacher/{name}"), prefill=opening)
    )
    answers = {"chosen": _spoken(taught, bool(opening)), "rejected": _spoken(own, False)}
    cut = [side for side, reply in (("chosen", taught), ("rejected", own)) if reply.finish_reason == "length"]
    row = {"prompt": prompt, **answers, "unfinished": cut}
    return {**row, "before": [asdict(message) for message in before]} if before else row


def conversation(row: Mapping[str, Any]) -> Conversation:
    """What a row's answers are answers to."""
    return (*(Message(**message) for message in row.get("before", ())), Message("user", row["prompt"]))


def _spoken(reply: Response, thinking: bool) -> str:
    return after_thinking(reply.text, thinking) or ""


def after_thinking(text: str, thinking: bool = False) -> str | None:
    """What follows the thoughts of a reply; None where they never end. `thinking`: they were begun in the prompt."""
    thoughts, ended, answer = text.partition(THINKING_ENDS)
    if ended:
        return answer.strip()
    return None if thinking or text.lstrip().startswith("<think>") else text.strip()


def complete(text: str, compat: str | None = None) -> bool:
    """Whether an answer ends like one that was finished: in punctuation (Unicode category P), or in a symbol (S), as
    code fences and emoji are. As published ("reference") only P counts, so that every answer that ends in code goes.
    """
    text = text.rstrip()
    return bool(text) and unicodedata.category(text[-1])[0] in ("P" if compat == "reference" else "PS")


def refusal(row: Mapping[str, Any], base: BaseLM, max_length: int, compat: str | None = None) -> str:
    """Why a row of `distill` is no training pair; "" where it is one."""
    for side, who in (("chosen", "teacher"), ("rejected", "student")):
        if not row[side]:
            return f"the {who}'s answer is empty"
        if compat != "reference" and side in row["unfinished"]:
            return f"the {who}'s answer was cut off"
        if not complete(row[side], compat):
            return f"the {who}'s answer does not end in punctuation"
        if length(base, conversation(row), row[side], compat) > max_length:
            return f"the {who}'s answer is too long"
    return ""


def length(base: BaseLM, messages: Conversation, answer: str, compat: str | None = None) -> int:
    """Tokens of messages and answer in the chat template. As published ("reference") with the header of one more
    reply, which is never trained on."""
    if compat == "reference":
        return len(base.render((*messages, Message("assistant", answer))))
    return len(base.render(messages)) + len(base.render_reply(messages, answer))
