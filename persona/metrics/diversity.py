"""How varied the wording of a text is: Dist-n."""

from __future__ import annotations


def distinct(text: str, n: int) -> float:
    """Different n-grams per n-gram of one text, in 0 .. 1; words are split at white space (persobench note 5).

    0 for a text of fewer than n words. Dist-n of a whole corpus is another figure, and lower.
    """
    words = text.split()
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
