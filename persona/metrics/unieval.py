"""UniEval for dialogue: a T5 is asked yes-or-no questions about a reply, and the share of "Yes" is the score.

The questions are the input format the published model was trained on (UniEval, MIT licence): another wording would be
another metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from persona.errors import UserError
from persona.metrics.nli import load

DIMENSIONS = ("naturalness", "coherence", "engagingness", "groundedness", "understandability")
_MAX_TOKENS = 1024


def question(dimension: str, reply: str, history: str = "", fact: str = "") -> str:
    """The model's input. Coherence and engagingness read `history`, engagingness and groundedness `fact`."""
    asked, sources = {
        "naturalness": ("a natural response in the dialogue", ""),
        "coherence": ("a coherent response given the dialogue history", "h"),
        "engagingness": ("an engaging and informative response according to the dialogue history and fact", "hf"),
        "groundedness": ("response consistent with knowledge in the fact", "f"),
        "understandability": ("an understandable response in the dialogue", ""),
    }[dimension]
    parts = [f"question: Is this {asked}?", f"response: {reply}"]
    parts += [f"dialogue history: {history}"] if "h" in sources else []
    parts += [f"fact: {fact}"] if "f" in sources else []
    return " </s> ".join(parts)


def sentences(text: str) -> list[str]:
    """Sentences by NLTK's English Punkt model. Raises UserError where its data is not installed."""
    import nltk  # here, as every command would wait for it

    try:
        return nltk.sent_tokenize(text)
    except LookupError as error:
        raise UserError(
            "unieval_model needs NLTK's punkt_tab data to divide replies into sentences: "
            "python -m nltk.downloader punkt_tab"
        ) from error


def questions(reply: str, history: str, fact: str) -> list[tuple[str, str]]:
    """All (dimension, input) about one reply: engagingness once per sentence, the other dimensions once."""
    asked = [("engagingness", question("engagingness", part, history, fact)) for part in sentences(reply)]
    return asked + [(name, question(name, reply, history, fact)) for name in DIMENSIONS if name != "engagingness"]


def combine(asked: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The five dimensions and "overall", their mean, from (dimension, share of yes) pairs.

    Engagingness is the *sum* over sentences, as published: it grows with length and exceeds 1 (persobench note 5).
    """
    scores = {name: float(sum(value for asked_for, value in asked if asked_for == name)) for name in DIMENSIONS}
    return scores | {"overall": sum(scores.values()) / len(scores)}


class UniEval:
    """P(Yes) / (P(Yes) + P(No)) of the first word a T5 answers; by folder or hub id ("MingZhong/unieval-dialog").

    Raises UserError when it cannot be loaded, knows no "Yes" and "No" as different first tokens, or NLTK's sentence
    splitter lacks its data.
    """

    def __init__(self, name: str, key: str = "unieval_model") -> None:
        from transformers import AutoModelForSeq2SeqLM

        sentences("Is it there?")
        self._model, self._tokenizer = load(AutoModelForSeq2SeqLM, name, key)
        self._yes, self._no = (self._tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
        if self._yes == self._no:
            raise UserError(f'{key}={name}: its tokenizer gives "Yes" and "No" the same first token')

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[str]) -> list[float]:
        """The share of yes in 0 .. 1 for each input (`question`); all in one batch, cut at 1,024 tokens."""
        if not inputs:
            return []
        batch = self._tokenizer(
            list(inputs), truncation=True, max_length=_MAX_TOKENS, padding=True, return_tensors="pt"
        ).to(self._model.device)
        start = torch.full((len(inputs), 1), self._model.config.decoder_start_token_id, device=self._model.device)
        logits = self._model(**batch, decoder_input_ids=start).logits[:, 0].float()
        return torch.sigmoid(logits[:, self._yes] - logits[:, self._no]).tolist()


def published_places(n: int, window: int = 8) -> list[int]:
    """Whose score PersoBench published at each of `n` places (persobench note 5, flaw 2); the defect, for reference.

    Its copy of the scorer moves a window of 8 inputs on by one instead of by 8, joins what all windows gave, and takes
    the first n: place k holds the score of input k // 8 + k % 8, and inputs from about n / 8 + 8 on are never scored.
    """
    joined = [place for start in range(n) for place in range(start, min(start + window, n))]
    return joined[:n]


def published_rows(valid: Sequence[bool], batch: int = 200) -> list[int | None]:
    """Whose UniEval score PersoBench published in each row: a row's number, or None for the worst score (flaws 2, 3).

    In every batch of 200 rows the readable replies come first, moved as `published_places` says, and the zeros of
    unreadable ones stand at the end, whichever rows they belong to.
    """
    published: list[int | None] = []
    for start in range(0, len(valid), batch):
        rows = range(start, min(start + batch, len(valid)))
        readable = [row for row in rows if valid[row]]
        published += [readable[place] for place in published_places(len(readable))]
        published += [None] * (len(rows) - len(readable))
    return published
