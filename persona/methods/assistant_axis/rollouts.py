"""First stage: everybody is asked everything. One file of replies for each role, and the plain assistant's.

rollouts/roles/<role>.jsonl    {"id": "pirate/p0_q17", "kind", "prompt", "question", "messages": […], "reply": …}
rollouts/traits/<trait>.jsonl  the same, with "pole"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from persona.errors import UserError
from persona.evaluation.generation import seed_of
from persona.evaluation.roles import Roles
from persona.lm import BaseLM
from persona.methods.assistant_axis.config import AssistantAxisConfig
from persona.types import Conversation, Message, Request, Sample, Sampling

DEFAULT, ROLE, TRAIT = "default", "role", "trait"


def by_role(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Where each role's samples lie, by the name of its file ("roles/pirate"), the plain assistant first.

    Raises UserError for samples that are not of roles, and where the plain assistant or every role is missing.
    """
    found: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        kind = sample.metadata.get("kind")
        if sample.persona is None or kind not in (DEFAULT, ROLE, TRAIT):
            raise UserError("the axis is made of roles: choose data=roles data.path=… or data=town_roles")
        found.setdefault(f"{'traits' if kind == TRAIT else 'roles'}/{sample.persona.id}", []).append(place)
    if f"roles/{DEFAULT}" not in found or not any(
        name.startswith("roles/") for name in found if name != f"roles/{DEFAULT}"
    ):
        raise UserError(
            "the axis needs rollouts of the plain assistant and of at least one role, but the data lack them"
        )
    return found


def share(names: Sequence[str], part: str | None) -> list[str]:
    """Every n-th name from the k-th on, for the part "k/n"; all of them without one. Raises UserError."""
    if part is None:
        return list(names)
    number, slash, of = part.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise UserError(f'method.part={part} is no part: it should read "3/16", the third of sixteen')
    return list(names[int(number) - 1 :: int(of)])


async def roll_out(sample: Sample, roles: Roles, config: AssistantAxisConfig, seed: int) -> Mapping[str, Any]:
    """One rollout of the role `model`, sampled with a seed of its own."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, seed=seed_of(seed, sample.id))
    reply = await roles.model.respond(Request(sample.messages, sampling=sampling))
    messages = [{"role": message.role, "content": message.content} for message in sample.messages]
    return {**sample.metadata, "messages": messages, "reply": reply.text}


def conversation(row: Mapping[str, Any]) -> Conversation:
    """A rollout as it is read again: what was asked, and the reply."""
    return (*(Message(**message) for message in row["messages"]), Message("assistant", row["reply"]))


def check_template(base: BaseLM, samples: Sequence[Sample]) -> None:
    """Raise UserError where the chat template leaves a system message out, so that roles would be the assistant."""
    told = next((sample for sample in samples if sample.messages[0].role == "system"), None)
    if told is not None and told.messages[0].content not in base.text(told.messages):
        raise UserError(
            f"the chat template of {base.name} drops the system message, so no role would be told who it is: "
            f"{told.messages[0].content[:60]!r} is not in the prompt"
        )
