"""Fourth stage: the distilled model speaks about itself and with itself (notes 3.5), and learns from what it said.

*Self-reflection* answers ten prompts many times. *Self-interaction* lets two instances talk for K turns, in two sets:
free, and led towards themselves by their guidance and by how they are greeted. The model reads the constitution while
it speaks; what is kept for training has no system prompt (reflection) or a short one (interaction).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona.evaluation.roles import Roles
from persona.lm import BaseLM
from persona.methods.character.prompts import PromptSet
from persona.methods.character.sampling import SamplingConfig
from persona.types import Conversation, Message, Request

SETS = ("free", "leading")
FILES = (
    *("reflection.md", "reflection_prompts.txt", "interaction.md", "interaction_training.md"),
    *("guidance_free.txt", "guidance_leading.txt", "greetings.txt", "greetings_leading.txt"),
)


@dataclass
class IntrospectConfig:
    """`reflections`: for each of the reflection prompts. `interactions`: in each of the two sets, of `turns` turns."""

    reflections: int = 1000
    interactions: int = 1000
    turns: int = 10
    reflection_tokens: int = 2048
    interaction_tokens: int = 1024


# ---- speaking ------------------------------------------------------------------------------------------------------


def items(prompts: PromptSet, config: IntrospectConfig, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Everything that is to be said, as (id, what): reflections by prompt, then both sets of interactions.

    The first speaker's greeting is drawn from all greetings in the leading set; the second one's is a plain one.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for number, prompt in enumerate(prompts.lines("reflection_prompts"), start=1):
        found += [(f"reflection-{number}-{n}", {"prompt": prompt}) for n in range(config.reflections)]
    plain, more = prompts.lines("greetings"), prompts.lines("greetings_leading")
    for which in SETS:
        for n in range(config.interactions):
            draw = random.Random(f"{seed}/{which}/{n}")
            first = draw.choice(plain if which == "free" else (*plain, *more))
            found.append((f"{which}-{n}", {"set": which, "greetings": [first, draw.choice(plain)]}))
    return found


async def speak(
    item: Mapping[str, Any],
    roles: Roles,
    prompts: PromptSet,
    traits: Sequence[str],
    config: IntrospectConfig,
    sampling: SamplingConfig,
    seed: int,
    compat: str | None = None,
) -> dict[str, Any]:
    """A reflection (prompt, reply, unfinished) or an interaction (set, greetings, turns, unfinished). `item` is one of
    `items` with its `name`. A turn that is cut off or empty ends an interaction."""
    said = {key: value for key, value in item.items() if key != "name"}
    if "prompt" in item:
        messages = prompts.fill("reflection", traits=traits, prompt=item["prompt"])
        drawn = sampling.of(config.reflection_tokens, seed, item["name"])
        reply = await roles.model.respond(Request(messages, sampling=drawn))
        return {**said, "reply": reply.text.strip(), "unfinished": reply.finish_reason == "length"}
    # As published the sentence never reaches the model, and the two sets differ by their greetings only.
    guidance = "" if compat == "reference" else prompts.lines(f"guidance_{item['set']}")[0]
    system = prompts.fill("interaction", traits=traits, guidance=guidance)
    turns: list[str] = []
    unfinished = False
    while len(turns) < config.turns and not unfinished:
        drawn = sampling.of(config.interaction_tokens, seed, f"{item['name']}/{len(turns)}")
        view = (*system, *seen_by_next(item["greetings"], turns))
        reply = await roles.model.respond(Request(view, sampling=drawn))
        unfinished = compat != "reference" and (reply.finish_reason == "length" or not reply.text.strip())
        turns.append(reply.text.strip())
    return {**said, "turns": turns, "unfinished": unfinished}


def seen_by_next(greetings: Sequence[str], turns: Sequence[str]) -> Conversation:
    """The conversation as whoever speaks next sees it: the other's words as the user's, its own as the assistant's.

    Even turns are the first speaker's, who was greeted by greetings[0]; odd ones the second's, who was greeted by
    greetings[1], said greetings[0], and hears turn 0 first.
    """
    if len(turns) % 2 == 0:
        return _alternating([greetings[0], *turns])
    return _alternating([greetings[1], greetings[0], *turns])


def _alternating(texts: Sequence[str]) -> Conversation:
    return tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))


# ---- what is trained on --------------------------------------------------------------------------------------------


def transcript(row: Mapping[str, Any], prompts: PromptSet, base: BaseLM, compat: str | None = None) -> Conversation:
    """What is trained on of a row of `speak`; empty where nothing can be.

    A reflection has no system prompt. An interaction has the short one, and all turns as the last speaker saw them, so
    that the last one is the assistant's. A reply that was cut off or is empty goes. As published ("reference") see
    `published_transcript`.
    """
    if "reason" in row:
        return ()
    if "prompt" in row:
        if not row["reply"] or (row["unfinished"] and compat != "reference"):
            return ()
        return (Message("user", row["prompt"]), Message("assistant", row["reply"]))
    if compat == "reference":
        return published_transcript(row, prompts, base)
    turns = row["turns"][:-1] if row["unfinished"] else row["turns"]
    if not turns:
        return ()
    view = seen_by_next(row["greetings"], turns[:-1])
    return (*prompts.fill("interaction_training"), *view, Message("assistant", turns[-1]))


def published_transcript(row: Mapping[str, Any], prompts: PromptSet, base: BaseLM) -> Conversation:
    """An interaction as published (notes 3.5, bugs 2 to 4), of which only the last message is a target.

    The last turn is lost, and the name in the system prompt stays a slot. The whole then ends with a user's turn, and
    its template is cut at the length of a prompt that ends in an assistant's header: the target is that user's turn
    without as many of its first characters as the header is longer ("assistant" against "user": 5).
    """
    nameless = PromptSet(prompts.folder, "{NAME}")
    seen = seen_by_next(row["greetings"], row["turns"][:-1])
    messages = [*nameless.fill("interaction_training"), *seen]
    *before, last = messages
    lost = 0
    if base.chat:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        whole = str(base.tokenizer.apply_chat_template(turns, tokenize=False))
        lost = max(0, len(base.text(before)) - whole.rindex(last.content))
    return (*before, Message("assistant", last.content[lost:]))
