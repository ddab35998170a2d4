"""Personalizers of the first door: a system prompt, fixed or a persona's description, and retrieved history.

`Retrieval` is LaMP's in-prompt augmentation (reference/lamp.md §3.1, §3.2): rank the items of the persona's history
against the query, write the best k into the prompt in the task's words, cut to a budget of tokens. `compat:
reference` brings back what differs in the published code (docs/errata.md).

The rankers are in ranking.py, the token budget is in prompt_budget.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from persona.data.base import Task, plain_task
from persona.data.base import task as task_rules
from persona.encoders import EncoderConfig
from persona.errors import UserError
from persona.lm import BaseLM
from persona.methods.prompt_budget import TokenizerTokens, augment
from persona.methods.ranking import Dense, best, bm25_scores, by_chance, by_recency
from persona.personalizer import Personalizer
from persona.types import HistoryItem, Message, Persona, Request

RANKERS = ("none", "random", "recency", "bm25", "dense")
PLAIN = plain_task("plain")  # the rules of requests that name no task


def settings(kind: type, method: str, config: dict[str, Any]) -> Any:
    """A dataclass from plain values; raises UserError, with the nearest name, for a setting it does not have."""
    known = [entry.name for entry in fields(kind)]
    for name in config:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ": it has none"
            raise UserError(f"personalizer {method} has no setting {name!r}{hint}")
    return kind(**config)


class Description(Personalizer):
    """The persona's description, then its statements, as system prompt, in front of one that is there already.

    Statements that stand in the description word for word are not repeated. A request without a persona, or with
    one that has neither, stays as it is.
    """

    method = "description"

    def prompt(self, requests: Sequence[Request]) -> list[Request]:
        return [with_system(request, describe(request.persona)) for request in requests]

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Description:
        if config:
            raise UserError(f"personalizer description has no settings, but got {', '.join(config)}")
        return cls()


@dataclass
class SystemPromptConfig:
    """`text`: what every request is told."""

    text: str = ""


class SystemPrompt(Personalizer):
    """One system prompt for all requests, in front of one that is there already. Raises UserError for an empty one."""

    method = "system_prompt"

    def __init__(self, config: SystemPromptConfig) -> None:
        if not config.text.strip():
            raise UserError("personalizer system_prompt has no text: {system_prompt: {text: …}} sets it")
        self.settings = config

    def prompt(self, requests: Sequence[Request]) -> list[Request]:
        return [with_system(request, self.settings.text) for request in requests]

    def config(self) -> dict[str, Any]:
        return asdict(self.settings)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> SystemPrompt:
        return cls(settings(SystemPromptConfig, cls.method, config))


def with_system(request: Request, text: str) -> Request:
    """The request with `text` as system prompt, in front of one that is there already; as it is where `text` is ""."""
    if not text:
        return request
    head, *rest = request.messages
    if head.role == "system":
        return replace(request, messages=(Message("system", f"{text}\n\n{head.content}"), *rest))
    return replace(request, messages=(Message("system", text), *request.messages))


def describe(persona: Persona | None) -> str:
    """Description and statements of a persona in one paragraph; "" where there is nothing to say."""
    if persona is None:
        return ""
    parts = [persona.description, *(text for text in persona.statements if text not in persona.description)]
    return " ".join(part.strip() for part in parts if part.strip())


@dataclass
class RetrievalConfig:
    """`ranker`: none (leave the prompt alone), random, recency, bm25 or dense; `k` items; `max_length`: tokens of
    the base LM for the whole message, see `augment`; `seed` of ranker random; `encoder` of ranker dense;
    `compat` "reference": the published draw, ties, reckoning and decoding (docs/errata.md)."""

    ranker: str = "bm25"
    k: int = 4
    max_length: int = 256
    seed: int = 0
    compat: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


class Retrieval(Personalizer):
    """The k best items of the persona's history, written into the last user message by the rules of its task.

    Raises UserError for settings outside their range.
    """

    method = "retrieval"

    def __init__(self, config: RetrievalConfig, base: BaseLM) -> None:
        if config.ranker not in RANKERS:
            near = get_close_matches(config.ranker, RANKERS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"there is no ranker {config.ranker!r}; did you mean {near}? (known: {', '.join(RANKERS)})"
            )
        if config.compat not in (None, "reference"):
            raise UserError(f"compat {config.compat!r} is not known for retrieval; it should be null or reference")
        if config.k < 1 or config.max_length < 1:
            raise UserError(f"retrieval needs k and max_length of at least 1, not {config.k} and {config.max_length}")
        self.settings = config
        self.reference = config.compat == "reference"
        self.tokens = TokenizerTokens(base.tokenizer, decoded=self.reference)
        self.dense = Dense(config.encoder, base.device) if config.ranker == "dense" else None

    def prompt(self, requests: Sequence[Request]) -> list[Request]:
        if self.settings.ranker == "none":
            return list(requests)
        # Without messages a base LM is to go on with a beginning: nothing is asked that items could answer.
        pairs = [(request, self.retrieve_task(request)) for request in requests if request.messages]
        chosen = self._retrieve(pairs)
        written = (self._write(request, task, items) for (request, task), items in zip(pairs, chosen, strict=True))
        return [next(written) if request.messages else request for request in requests]

    def retrieve(self, requests: Sequence[Request]) -> list[list[HistoryItem]]:
        """The items that `prompt` writes into each request, best first; none for a persona without history."""
        return self._retrieve([(request, self.retrieve_task(request)) for request in requests])

    @staticmethod
    def retrieve_task(request: Request) -> Task:
        """The rules of a request's task; plain ones when it names none."""
        return task_rules(request.task) if request.task else PLAIN

    def _write(self, request: Request, task: Task, items: Sequence[HistoryItem]) -> Request:
        place = last_user(request)
        text = augment(
            task, request.messages[place].content, items, self.tokens, self.settings.max_length, self.settings.compat
        )
        messages = (*request.messages[:place], Message("user", text), *request.messages[place + 1 :])
        return replace(request, messages=messages)

    def _retrieve(self, pairs: Sequence[tuple[Request, Task]]) -> list[list[HistoryItem]]:
        histories = [list(request.persona.history) if request.persona else [] for request, _ in pairs]
        queries = [task.query_text(request.messages[last_user(request)].content) for request, task in pairs]
        texts = [[task.item_text(item) for item in items] for (_, task), items in zip(pairs, histories, strict=True)]
        if self.dense is not None:
            ranked = self.dense.rank(texts, queries, self.settings.k)
        else:
            ranked = [
                self._rank(request, items, lines, query) if items else []
                for (request, _), items, lines, query in zip(pairs, histories, texts, queries, strict=True)
            ]
        return [[items[position] for position in order] for items, order in zip(histories, ranked, strict=True)]

    def _rank(self, request: Request, items: Sequence[HistoryItem], texts: Sequence[str], query: str) -> list[int]:
        k = self.settings.k
        if self.settings.ranker == "bm25":
            return best(bm25_scores(texts, query), k, ties_reversed=self.reference)
        if self.settings.ranker == "recency":
            return by_recency(items, k)
        persona = request.persona.id if request.persona else ""
        prompt = request.messages[last_user(request)].content
        return by_chance(len(items), k, self.settings.seed, persona, prompt, with_replacement=self.reference)

    def config(self) -> dict[str, Any]:
        return asdict(self.settings)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Retrieval:
        encoder = settings(EncoderConfig, "retrieval, encoder,", dict(config.get("encoder", {})))
        return cls(settings(RetrievalConfig, cls.method, {**config, "encoder": encoder}), base)


def last_user(request: Request) -> int:
    """Position of the last user message; raises UserError when there is none."""
    places: list[int] = [place for place, message in enumerate(request.messages) if message.role == "user"]
    if not places:
        raise UserError("the last user message is what is asked, but the request has none")
    return places[-1]
