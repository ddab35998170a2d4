"""Personalizers of the first door for characters: statements about a persona, or its constitution, as system prompt.

    evaluate.py data=town_characters benchmark=apc baselines=role_play

`statements` gives the role-play baselines of APC (reference/apc.md 3.5): the k statements that bear most on the last
user message (RAG), or all of them (long context); "direct" is the untouched LM, for the role ("you are ada") is in the
question. `constitution` is the baseline of Open Character Training (reference/open_character_training.md 3.8). Both
read `prompts`, a folder of prompt files, or "english" or "town", which come with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from persona.encoders import EncoderConfig
from persona.errors import UserError
from persona.evaluation.prompts import Prompt
from persona.lm import BaseLM
from persona.methods.prompt import last_user, settings, with_system
from persona.methods.ranking import Dense, best, bm25_scores
from persona.metrics.apc import RELEVANCE_TEMPLATE, YES, Classifier, relevance_order
from persona.personalizer import Personalizer
from persona.types import Message, Persona, Request

RANKERS = ("all", "relevance", "bm25", "dense")
SHIPPED = {name: Path(__file__).parent / "prompts" / name for name in ("english", "town")}


def prompt_file(prompts: str, name: str, /, **slots: object) -> Prompt:
    """The prompt file `name` of the folder `prompts`, or of the shipped "english" or "town".

    Raises UserError when it is missing or is not one message with exactly these slots.
    """
    path = SHIPPED.get(prompts, Path(prompts)) / f"{name}.md"
    file = Prompt.load(path)
    if len(file.messages(**slots)) != 1:
        raise UserError(f"the prompt file {path} should hold one message, the system prompt, without dividers")
    return file


@dataclass
class StatementsConfig:
    """`ranker`: all (every statement, in order), or relevance, bm25 or dense: the `k` that bear most on the last user
    message, best first. `prompts`: a folder with statements.md (slots statements, and role, the system prompt that is
    there already). `relevance_model`, a folder or hub id, is APC's discriminator for ranker relevance, `encoder` the
    text encoder of ranker dense."""

    ranker: str = "bm25"
    k: int = 5
    prompts: str = "english"
    relevance_model: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


class Statements(Personalizer):
    """Statements of the persona in the system prompt; a request without any stays as it is.

    Raises UserError for settings outside their range and for a prompt file without the slots.
    """

    method = "statements"

    def __init__(self, config: StatementsConfig, base: BaseLM) -> None:
        if config.ranker not in RANKERS:
            near = get_close_matches(config.ranker, RANKERS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"there is no ranker {config.ranker!r} of statements; did you mean {near}? "
                f"(known: {', '.join(RANKERS)})"
            )
        if config.k < 1:
            raise UserError(f"personalizer statements needs k of at least 1, not {config.k}")
        if config.ranker == "relevance" and not config.relevance_model:
            raise UserError("statements by relevance need a discriminator: relevance_model has no value")
        self.settings = config
        self.file = prompt_file(config.prompts, "statements", role="", statements=[])
        self.fingerprint = self.file.hash
        self.dense = Dense(config.encoder, base.device) if config.ranker == "dense" else None
        self.relevance: Classifier | None = None
        if config.ranker == "relevance":
            self.relevance = Classifier(
                str(config.relevance_model), "relevance_model", relevance_order, RELEVANCE_TEMPLATE
            )

    def prompt(self, requests: Sequence[Request]) -> list[Request]:
        return [
            self._write(request, chosen) if chosen else request
            for request, chosen in zip(requests, self.choose(requests), strict=True)
        ]

    def _write(self, request: Request, statements: Sequence[str]) -> Request:
        head, *rest = request.messages
        system = head.role == "system"
        (message,) = self.file.messages(role=head.content if system else "", statements=list(statements))
        return replace(request, messages=(Message("system", message.content), *(rest if system else request.messages)))

    def choose(self, requests: Sequence[Request]) -> list[list[str]]:
        """The statements that `prompt` writes into each request, best first; none for a persona without any."""
        pools = [list(request.persona.statements) if request.persona else [] for request in requests]
        if self.settings.ranker == "all":
            return pools
        queries = [request.messages[last_user(request)].content for request in requests]
        k = self.settings.k
        if self.dense is not None:
            ranked = self.dense.rank(pools, queries, k)
        elif self.relevance is not None:
            personas = [request.persona for request in requests]
            names = ["" if who is None else who.attributes.get("name", who.id) for who in personas]
            ranked = [best(row, k) for row in self._relevance(self.relevance, names, pools, queries)]
        else:
            ranked = [
                best(bm25_scores(pool, query), k) if pool else [] for pool, query in zip(pools, queries, strict=True)
            ]
        return [[pool[place] for place in order] for pool, order in zip(pools, ranked, strict=True)]

    @staticmethod
    def _relevance(
        classifier: Classifier, names: Sequence[str], pools: Sequence[Sequence[str]], queries: Sequence[str]
    ) -> list[np.ndarray]:
        """Per request P(yes) of its statements, [S]; one pass over all of them."""
        rows = zip(names, pools, queries, strict=True)
        asked = [{"character": n, "statement": s, "query": q} for n, pool, q in rows for s in pool]
        ends = np.cumsum([len(pool) for pool in pools])[:-1]
        return np.split(classifier(asked)[YES], ends)[: len(pools)]

    def config(self) -> dict[str, Any]:
        return asdict(self.settings)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Statements:
        encoder = settings(EncoderConfig, "statements, encoder,", dict(config.get("encoder", {})))
        return cls(settings(StatementsConfig, cls.method, {**config, "encoder": encoder}), base)


@dataclass
class ConstitutionConfig:
    """`prompts`: a folder with constitution.md (slot traits)."""

    prompts: str = "english"


class Constitution(Personalizer):
    """The persona's statements, its traits, as system prompt; a request without any stays as it is.

    Raises UserError for a prompt file without the slot.
    """

    method = "constitution"

    def __init__(self, config: ConstitutionConfig) -> None:
        self.settings = config
        self.file = prompt_file(config.prompts, "constitution", traits=[])
        self.fingerprint = self.file.hash

    def prompt(self, requests: Sequence[Request]) -> list[Request]:
        return [with_system(request, self.text(request.persona)) for request in requests]

    def text(self, persona: Persona | None) -> str:
        """The system prompt; "" where there are no traits."""
        if persona is None or not persona.statements:
            return ""
        (message,) = self.file.messages(traits=list(persona.statements))
        return message.content

    def config(self) -> dict[str, Any]:
        return asdict(self.settings)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Constitution:
        return cls(settings(ConstitutionConfig, cls.method, config))
