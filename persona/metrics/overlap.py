"""Word overlap of one reply with one reference, as dialogue papers count it: BLEU, ROUGE (package `rouge`), METEOR.

Texts are split at white space, without lower-casing (persobench note 5). LaMP's ROUGE is another one: `metrics.rouge`.
NLTK is imported when it is asked for: configs import the benchmark, and every command would wait for it.
"""

from __future__ import annotations

import sys

from rouge import Rouge

_ROUGE = Rouge()
_RECURSION = sys.getrecursionlimit()


def bleu(reply: str, reference: str) -> float:
    """NLTK's sentence BLEU in 0 .. 1: 1- to 4-grams with equal weights, smoothing method 1; 0 for an empty reply."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1
    return float(sentence_bleu([reference.split()], reply.split(), smoothing_function=smoothing))


def rouge_f(reply: str, reference: str) -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}: F-measures in 0 .. 1 of the package `rouge` (not rouge-score).

    It counts different n-grams, each once, and splits at every full stop. 0 where either text holds nothing else.
    """
    if not reply.replace(".", "").strip() or not reference.replace(".", "").strip():
        return {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    # Its longest common subsequence is found by a recursion as deep as both sentences are long.
    depth = len(reply.split()) + len(reference.split()) + _RECURSION
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, depth))
    try:
        scores = _ROUGE.get_scores(reply.replace("\n", " "), reference.replace("\n", " "))[0]
    finally:
        sys.setrecursionlimit(before)
    return {"rouge1": scores["rouge-1"]["f"], "rouge2": scores["rouge-2"]["f"], "rougeL": scores["rouge-l"]["f"]}


def has_wordnet() -> bool:
    """Whether NLTK finds the WordNet data that METEOR needs (`python -m nltk.downloader wordnet` installs it)."""
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        return True
    return False


def meteor(reply: str, reference: str) -> float:
    """NLTK's METEOR in 0 .. 1: words match exactly, by stem, or as synonyms in WordNet, all in lower case.

    Raises LookupError without the WordNet data: there is no METEOR that leaves synonyms out.
    """
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score([reference.split()], reply.split(), wordnet=wordnet))
