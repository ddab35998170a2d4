"""Overlap, diversity and similarity of replies, against values worked out by hand."""

import math
import struct

import nltk
import numpy as np
import pytest
from nltk.corpus import wordnet

from persona.errors import UserError
from persona.metrics.diversity import distinct
from persona.metrics.overlap import bleu, has_wordnet, meteor, rouge_f
from persona.metrics.similarity import STOP_WORDS, WordVectors, tfidf_overlap, vector_similarity


def test_distinct_counts_n_grams_of_one_text():
    assert distinct("a b a b", 1) == 2 / 4
    assert distinct("a b a b", 2) == 2 / 3
    assert distinct("a B b.", 1) == 1, "no lower-casing, punctuation stays on"
    assert distinct("alone", 2) == distinct("", 1) == 0


def test_bleu_with_smoothing_method_1():
    # 1- to 4-grams found: 4 of 5, 3 of 4, 2 of 3, 1 of 2; as long as the reference, so no brevity penalty.
    assert bleu("a b c d x", "a b c d y") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # Nothing found counts as 0.1 (method 1); the reference is twice as long: exp(1 - 4/2).
    assert bleu("a x", "a b c d") == pytest.approx(math.exp(-1) * (1 / 2 * 0.1 / 1 * 0.1 / 1 * 0.1 / 1) ** 0.25)
    assert bleu("A b", "a b") < bleu("a b", "a b"), "no lower-casing"
    assert bleu("", "a b") == 0


def test_rouge_of_the_package_rouge_counts_different_words():
    # Reply words {a, b}, reference words {a, c}: precision 1/2, recall 1/2. rouge-score would count each "a".
    assert rouge_f("a a a b", "a c c") == pytest.approx({"rouge1": 1 / 2, "rouge2": 0, "rougeL": 1 / 2}, abs=1e-6)
    # It cuts at full stops and does not lower-case: "b." meets "b", "A" does not meet "a".
    assert rouge_f("b. c", "b c")["rouge1"] == pytest.approx(1, abs=1e-6)
    assert rouge_f("A", "a")["rouge1"] == 0


def test_rouge_takes_texts_that_stop_the_package():
    for reply in ("...", " . ", ""):
        assert rouge_f(reply, "a b") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    words = " ".join(f"w{number}" for number in range(700))
    assert rouge_f(words, words)["rougeL"] == pytest.approx(1, abs=1e-6), "deeper than Python's recursion limit"


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """A WordNet of one entry, boat = ship, as NLTK's data folder holds it."""
    folder = tmp_path / "nltk_data" / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in ("adj", "adv", "noun", "verb"):
        for kind in ("data", "index"):
            (folder / f"{kind}.{name}").write_text("")
        (folder / f"{name}.exc").write_text("")
    (folder / "data.noun").write_text("00000000 06 n 02 boat 0 ship 0 000 | it floats\n")
    (folder / "index.noun").write_text("boat n 1 0 1 0 00000000  \nship n 1 0 1 0 00000000  \n")
    (folder / "lexnames").write_text("".join(f"{n:02}\tnoun.{n}\t1\n" for n in range(45)))
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    return tmp_path


def test_meteor_by_hand(nltk_data):
    assert has_wordnet()
    wordnet.ensure_loaded()
    # All 4 words match in one run: F 1, less a penalty of .5 * (1 run / 4 matches)^3. Lower case, stems: runs -> run.
    assert meteor("We run to town", "we runs to town") == pytest.approx(1 - 0.5 / 64)
    # "boat" meets "ship" as a synonym: again all 3 match in one run.
    assert meteor("my old boat", "my old ship") == pytest.approx(1 - 0.5 / 27)
    assert meteor("my old boat", "my old house") < 0.7
    assert meteor("nothing", "else here") == 0


def test_without_wordnet_there_is_no_meteor(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert not has_wordnet()


def test_tfidf_overlap_by_hand():
    # What is left is "like soup", "want soup": idf of soup 1, of a word in one text 1 + ln(3/2).
    idf = 1 + math.log(3 / 2)
    assert tfidf_overlap("I LIKE the soup!", "you want soup.") == pytest.approx(1 / (1 + idf**2))
    assert tfidf_overlap("I like soup", "soup, like!") == pytest.approx(1)
    assert tfidf_overlap("I am", "you are") == 0, "nothing but stop words"
    assert tfidf_overlap("I am", "you like soup") == 0


def test_statements_run_together_lose_the_words_at_their_borders():
    """Published personas have no space between statements, and punctuation goes before words are cut."""
    assert tfidf_overlap("i have a cat.dogs scare me", "my cat") == 0
    assert tfidf_overlap("i have a cat. dogs scare me", "my cat") > 0


def test_stop_words_are_nltks():
    assert len(STOP_WORDS) == 179 and {"i", "wouldn't", "ve"} <= STOP_WORDS and "would" not in STOP_WORDS


WORDS = {"cat": [1, 0], "dog": [1, 1], "sea": [0, 2]}


def binary(path, words=WORDS, announced=None, newline=b""):
    rows = [word.encode() + b" " + struct.pack("<2f", *vector) + newline for word, vector in words.items()]
    path.write_bytes(f"{announced or len(words)} 2\n".encode() + b"".join(rows))
    return path


@pytest.fixture(params=["binary", "binary with newlines", "text", "glove"])
def vectors(request, tmp_path):
    lines = "".join(f"{word} {a} {b}\n" for word, (a, b) in WORDS.items())
    if request.param.startswith("binary"):
        return WordVectors(binary(tmp_path / "v.bin", newline=b"\n" if "newlines" in request.param else b""))
    path = tmp_path / "v.txt"
    path.write_text(lines.rstrip("\n") if request.param == "glove" else f"3 2\n{lines}")
    return WordVectors(path)


def test_word_vectors_are_read_from_disk(vectors):
    assert {word: vectors[word].tolist() for word in vectors} == WORDS and "ship" not in vectors


def test_vector_similarity_by_hand(vectors):
    # Means (1, 0) and (1/2, 3/2): cosine (1/2) / sqrt(10/4).
    assert vector_similarity("My cat", "the DOG sea", vectors) == pytest.approx(0.5 / math.sqrt(2.5))
    assert vector_similarity("cat.", "dog", vectors) == 0, "punctuation stays on, so the word has no vector"
    assert vector_similarity("", "dog", vectors) == 0
    assert vector_similarity("cat", "sea", {"cat": np.array([0.0, 0]), "sea": np.array([0.0, 2])}) == 0


def test_word_vectors_in_another_format_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        WordVectors(tmp_path / "none.bin")
    with pytest.raises(UserError, match="ends at word 4 of the 9 it announces"):
        WordVectors(binary(tmp_path / "short.bin", announced=9))
    (tmp_path / "v.txt").write_text("2 2\ncat 1 0\nsea 1\n")
    with pytest.raises(UserError, match="1 numbers in row 2, where 2 belong"):
        WordVectors(tmp_path / "v.txt")
    (tmp_path / "few.txt").write_text("5 2\ncat 1 0\n")
    with pytest.raises(UserError, match="announces 5 words and holds 1"):
        WordVectors(tmp_path / "few.txt")
    (tmp_path / "v.bin").write_text("cat 1 0\n")
    with pytest.raises(UserError, match="should begin with the line"):
        WordVectors(tmp_path / "v.bin")
