"""Personalizers of the first door: a persona's description as system prompt, and retrieved history in the prompt.

`Retrieval` is LaMP's in-prompt augmentation (reference/lamp.md §3.1, §3.2): rank the items of the persona's history
against the query, write the best k into the prompt in the task's words, cut to a budget of tokens. `compat:
reference` brings back what differs in the published code (docs/errata.md).

Read on: rankers, the two personalizers; the token budget is in prompt_budget.py.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from persona.data.base import Task, plain_task
from persona.data.base import task as task_rules
from persona.encoders import Encoder, EncoderConfig
from persona.errors import UserError
from persona.lm import BaseLM
from persona.methods.prompt_budget import TokenizerTokens, augment
from persona.personalizer import Personalizer
from persona.types import HistoryItem, Message, Persona, Request

RANKERS = ("none", "random", "recency", "bm25", "dense")
PLAIN = plain_task("plain")  # the rules of requests that name no task
BM25_K1, BM25_B, BM25_EPSILON = 1.5, 0.75, 0.25  # rank_bm25's BM25Okapi
# bm25s sets its own logger to DEBUG and would write a line for every user's index.
logging.getLogger("bm25s").setLevel(logging.WARNING)
VECTORS_KEPT = 100_000  # encoded items remembered between calls: 150 MB at 384 dimensions

# ---- rankers: positions of the best k items, best first ------------------------------------------------------------


def _best(scores: np.ndarray, k: int, ties_reversed: bool = False) -> list[int]:
    """Positions of the k highest scores; equal ones in order, or last first as in the reference's reversed argsort."""
    order = np.argsort(scores, kind="stable")[::-1] if ties_reversed else np.argsort(-scores, kind="stable")
    return [int(position) for position in order[:k]]


def bm25_scores(texts: Sequence[str], query: str) -> np.ndarray:
    """BM25Okapi scores of `texts` for `query`, [N] float64; statistics are those of `texts` alone.

    Words are split at white space, case counts, repeated query words count repeatedly. Equal to rank_bm25's BM25Okapi
    up to its constant factor k1 + 1: bm25s scores with Lucene's idf, which is replaced column by column by Okapi's,
    log((N - n + .5) / (n + .5)) with negative values raised to epsilon times the mean idf of the vocabulary.
    """
    documents = [text.split() for text in texts]
    frequency = Counter(word for document in documents for word in set(document))
    known = [word for word in query.split() if word in frequency]
    if not known:
        return np.zeros(len(texts))
    index = bm25s.BM25(method="lucene", k1=BM25_K1, b=BM25_B, dtype="float64")
    index.index(documents, show_progress=False)
    total = len(documents)
    okapi = {word: math.log((total - n + 0.5) / (n + 0.5)) for word, n in frequency.items()}
    floor = BM25_EPSILON * sum(okapi.values()) / len(okapi)
    starts = index.scores["indptr"]
    for word, n in frequency.items():
        column = slice(starts[index.vocab_dict[word]], starts[index.vocab_dict[word] + 1])
        idf = okapi[word] if okapi[word] >= 0 else floor
        index.scores["data"][column] *= idf / math.log(1 + (total - n + 0.5) / (n + 0.5))
    return index.get_scores(known)


def by_recency(items: Sequence[HistoryItem], k: int) -> list[int]:
    """Newest date first, of equal dates the later item first; where any item lacks a date, the last items come first.

    Dates are numbers joined by "-", year first. Raises UserError for another date.
    """
    latest_first = range(len(items) - 1, -1, -1)
    if any(item.date is None for item in items):
        return list(latest_first)[:k]

    def date(position: int) -> tuple[int, ...]:
        text = items[position].date or ""
        try:
            return tuple(int(part) for part in text.split("-"))
        except ValueError as error:
            raise UserError(
                f"history item {items[position].id} has the date {text!r}, which should be written like 2024-05-31"
            ) from error

    return sorted(latest_first, key=date, reverse=True)[:k]


def by_chance(count: int, k: int, seed: int, persona: str, prompt: str, with_replacement: bool = False) -> list[int]:
    """k positions among `count`, a draw that depends on (seed, persona, prompt) only: the same in any batch.

    With replacement an item may come twice, and k items come even from fewer (the reference's draw, there unseeded).
    """
    digest = hashlib.sha256(f"{seed}\n{persona}\n{prompt}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    size = k if with_replacement else min(k, count)
    return [int(position) for position in rng.choice(count, size=size, replace=with_replacement)]


# ---- personalizers -------------------------------------------------------------------------------------------------


def _settings(kind: type, method: str, config: dict[str, Any]) -> Any:
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
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Request:
        text = describe(request.persona)
        if not text:
            return request
        head, *rest = request.messages
        if head.role == "system":
            messages = (Message("system", f"{text}\n\n{head.content}"), *rest)
        else:
            messages = (Message("system", text), *request.messages)
        return replace(request, messages=messages)

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Description:
        if config:
            raise UserError(f"personalizer description has no settings, but got {', '.join(config)}")
        return cls()


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
        self.encoder = Encoder(config.encoder, device=base.device) if config.ranker == "dense" else None
        self._vectors: OrderedDict[str, np.ndarray] = OrderedDict()

    def prompt(self, requests: Sequence[Request]) -> list[Request]:
        if self.settings.ranker == "none":
            return list(requests)
        pairs = [(request, self.retrieve_task(request)) for request in requests]
        chosen = self._retrieve(pairs)
        return [self._write(request, task, items) for (request, task), items in zip(pairs, chosen, strict=True)]

    def retrieve(self, requests: Sequence[Request]) -> list[list[HistoryItem]]:
        """The items that `prompt` writes into each request, best first; none for a persona without history."""
        return self._retrieve([(request, self.retrieve_task(request)) for request in requests])

    @staticmethod
    def retrieve_task(request: Request) -> Task:
        """The rules of a request's task; plain ones when it names none."""
        return task_rules(request.task) if request.task else PLAIN

    def _write(self, request: Request, task: Task, items: Sequence[HistoryItem]) -> Request:
        place = _last_user(request)
        text = augment(
            task, request.messages[place].content, items, self.tokens, self.settings.max_length, self.settings.compat
        )
        messages = (*request.messages[:place], Message("user", text), *request.messages[place + 1 :])
        return replace(request, messages=messages)

    def _retrieve(self, pairs: Sequence[tuple[Request, Task]]) -> list[list[HistoryItem]]:
        histories = [list(request.persona.history) if request.persona else [] for request, _ in pairs]
        queries = [task.query_text(request.messages[_last_user(request)].content) for request, task in pairs]
        texts = [[task.item_text(item) for item in items] for (_, task), items in zip(pairs, histories, strict=True)]
        if self.settings.ranker == "dense":
            ranked = self._dense(texts, queries)
        else:
            ranked = [
                self._rank(request, items, lines, query) if items else []
                for (request, _), items, lines, query in zip(pairs, histories, texts, queries, strict=True)
            ]
        return [[items[position] for position in order] for items, order in zip(histories, ranked, strict=True)]

    def _rank(self, request: Request, items: Sequence[HistoryItem], texts: Sequence[str], query: str) -> list[int]:
        k = self.settings.k
        if self.settings.ranker == "bm25":
            return _best(bm25_scores(texts, query), k, ties_reversed=self.reference)
        if self.settings.ranker == "recency":
            return by_recency(items, k)
        persona = request.persona.id if request.persona else ""
        prompt = request.messages[_last_user(request)].content
        return by_chance(len(items), k, self.settings.seed, persona, prompt, with_replacement=self.reference)

    def _dense(self, texts: Sequence[Sequence[str]], queries: Sequence[str]) -> list[list[int]]:
        """Positions of the k items with the largest dot product of their vectors with the query's."""
        assert self.encoder is not None
        faiss = _faiss()
        vectors = self._encode([text for lines in texts for text in lines])
        asked = self.encoder.encode(list(queries), query=True)
        ranked: list[list[int]] = []
        start = 0
        for lines, query in zip(texts, asked, strict=True):
            rows = vectors[start : start + len(lines)]
            start += len(lines)
            if not lines:
                ranked.append([])
                continue
            k = min(self.settings.k, len(lines))
            scores, found = faiss.knn(query[None], rows, k, metric=faiss.METRIC_INNER_PRODUCT)
            # faiss leaves the order of equal scores open; here the earlier item comes first.
            ranked.append([int(place) for _, place in sorted(zip(-scores[0], found[0], strict=True))])
        return ranked

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        """[n, d] vectors of items; the most recently used texts are remembered."""
        assert self.encoder is not None
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        fresh = dict(zip(new, self.encoder.encode(new), strict=True))
        out = np.empty((len(texts), self.encoder.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            vector = fresh.get(text)
            out[row] = self._vectors[text] if vector is None else vector
        for text in dict.fromkeys(texts):
            self._vectors[text] = fresh[text] if text in fresh else self._vectors[text]
            self._vectors.move_to_end(text)
        while len(self._vectors) > VECTORS_KEPT:
            self._vectors.popitem(last=False)
        return out

    def config(self) -> dict[str, Any]:
        return asdict(self.settings)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Retrieval:
        encoder = _settings(EncoderConfig, "retrieval, encoder,", dict(config.get("encoder", {})))
        return cls(_settings(RetrievalConfig, cls.method, {**config, "encoder": encoder}), base)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("ranker dense needs faiss: install persona[faiss-cpu], or persona[faiss-gpu]") from error
    return faiss


def _last_user(request: Request) -> int:
    """Position of the last user message; raises UserError when there is none."""
    places: list[int] = [place for place, message in enumerate(request.messages) if message.role == "user"]
    if not places:
        raise UserError("retrieval writes into the last user message, but the request has none")
    return places[-1]
