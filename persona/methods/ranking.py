"""Rankers: the best k of some texts for a query, best first. Of past items (`retrieval`) and of statements."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np

from persona.encoders import Encoder, EncoderConfig
from persona.errors import UserError
from persona.types import HistoryItem

BM25_K1, BM25_B, BM25_EPSILON = 1.5, 0.75, 0.25  # rank_bm25's BM25Okapi
VECTORS_KEPT = 100_000  # encoded texts remembered between calls: 150 MB at 384 dimensions


def best(scores: np.ndarray, k: int, ties_reversed: bool = False) -> list[int]:
    """Positions of the k highest scores; equal ones in order, or last first as in the reference's reversed argsort."""
    order = np.argsort(scores, kind="stable")[::-1] if ties_reversed else np.argsort(-scores, kind="stable")
    return [int(position) for position in order[:k]]


def bm25_scores(texts: Sequence[str], query: str) -> np.ndarray:
    """BM25Okapi scores of `texts` for `query`, [N] float64; statistics are those of `texts` alone.

    Words are split at white space, case counts, repeated query words count repeatedly. Equal to rank_bm25's BM25Okapi
    up to its constant factor k1 + 1: bm25s scores with Lucene's idf, which is replaced column by column by Okapi's,
    log((N - n + .5) / (n + .5)) with negative values raised to epsilon times the mean idf of the vocabulary.
    """
    bm25s = _bm25s()
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


class Dense:
    """By the dot product of a text encoder's vectors; vectors of the most recently used texts are remembered."""

    def __init__(self, encoder: EncoderConfig, device: Any) -> None:
        self.encoder = Encoder(encoder, device=device)
        self._vectors: OrderedDict[str, np.ndarray] = OrderedDict()

    def rank(self, texts: Sequence[Sequence[str]], queries: Sequence[str], k: int) -> list[list[int]]:
        """Per query the positions, among its own `texts`, of the k with the largest dot product; of equal ones the
        earlier first. Raises UserError without faiss."""
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
            scores, found = faiss.knn(query[None], rows, min(k, len(lines)), metric=faiss.METRIC_INNER_PRODUCT)
            # faiss leaves the order of equal scores open; here the earlier text comes first.
            ranked.append([int(place) for _, place in sorted(zip(-scores[0], found[0], strict=True))])
        return ranked

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        """[n, d] vectors."""
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


@cache
def _bm25s() -> Any:
    """Imported once it is needed, as every command would wait for it."""
    # Where there is JAX, bm25s starts it as it is imported, and JAX takes three quarters of a GPU's memory for good.
    with patch.dict(sys.modules, {"jax": None}):
        import bm25s
    # It sets its own logger to DEBUG and would write a line for every user's index.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("ranker dense needs faiss: install persona[faiss-cpu], or persona[faiss-gpu]") from error
    return faiss
