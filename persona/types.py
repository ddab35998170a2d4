"""The nouns of the codebase: one frozen dataclass each, no behaviour beyond what they hold.

Everything else imports from here and this file imports nothing of ours (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One past action of one user.

    `text` is what the user was looking at or wrote (review, article, tweet); `label` is what the user made of it
    (score, tag, headline), where there is such a thing. Which of the two is encoded is the task's business.
    """

    id: str
    text: str
    label: str | None = None
    date: str | None = None


@dataclass(frozen=True, slots=True)
class Persona:
    """A person, a character or a demographic group: whatever a model is to be personalized to.

    `history` may be any sequence, so a reader can hand out a lazy view of items that stay on disk.
    """

    id: str
    description: str = ""
    statements: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    history: Sequence[HistoryItem] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is decoded. `temperature` 0 is greedy; `num_beams` > 1 is beam search without sampling.

    `seed` belongs to the request: the same request gives the same reply in any batch.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a model: free text (`options` None) or a choice among `options`. `task` names the rules (of
    `persona.data`) by which personalizers read prompt and history; none where there are no such rules.

    `prefill` is how the reply begins: the model goes on from there, and its response holds what it adds.
    """

    messages: Conversation
    persona: Persona | None = None
    sampling: Sampling = Sampling()
    options: tuple[str, ...] | None = None
    task: str = ""
    prefill: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """What comes back. `logprobs[i]` is log p(tokens[i] | everything before), natural logarithm, before any warping.

    `finish_reason` is "eos", "stop" (a stop string) or "length".
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = "eos"


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a data set or benchmark, with its truth in `target`. `task` names the rules that apply to it."""

    id: str
    messages: Conversation
    target: str = ""
    persona: Persona | None = None
    options: tuple[str, ...] | None = None
    task: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one judge said on one question. `value` is None where its reply could not be read, and `reason` says why.

    `prompt` is the hash of the rubric's file, so that verdicts under different wordings are never mixed up.
    `failed`: the judge could not be asked (an endpoint gave no reply).
    """

    judge: str
    rubric: str
    prompt: str
    value: float | str | None
    reason: str = ""
    raw: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """The values one episode earned, or *unscored* (`values` empty) with the reason. Unscored is not zero.

    `raw` is the reply that was scored; `transcript` the whole conversation where it has more turns than the sample.
    `failed`: unscored as a call to an endpoint got no reply, so that the next start runs the episode again.
    `cut` is for the runner: tokens that prompts of each role lost, as they did not fit a local model's positions.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    raw: str = ""
    verdicts: tuple[Verdict, ...] = ()
    transcript: Conversation = ()
    failed: bool = False
    cut: Mapping[str, int] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        return bool(self.values)
