"""How much of one text is taken up by another: TF-IDF overlap, and the cosine of mean word vectors."""

from __future__ import annotations

import mmap
import string
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from persona.errors import UserError

# The English stop words of NLTK's corpus package, which pip does not install (persobench note 5).
STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
    himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
    that that'll these those am is are was were be been being have has had having do does did doing a an the and but
    if or because as until while of at by for with about against between into through during before after above below
    to from up down in out on off over under again further then once here there when where why how all any both each
    few more most other some such no nor not only own same so than too very s t can will just don don't should
    should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't
    haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't
    weren weren't won won't wouldn wouldn't
    """.split()
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _content(text: str) -> str:
    from nltk.tokenize.destructive import NLTKWordTokenizer  # here, as every command would wait for NLTK

    words = NLTKWordTokenizer().tokenize(text.lower().translate(_PUNCTUATION))
    return " ".join(word for word in words if word not in STOP_WORDS)


def tfidf_overlap(first: str, second: str) -> float:
    """Cosine in 0 .. 1 of the TF-IDF vectors of two texts, fitted on these two alone (persobench note 5).

    Lower case, without punctuation, stop words and one-letter words; 0 where nothing is left of either.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        vectors = TfidfVectorizer().fit_transform([_content(first), _content(second)])
    except ValueError:  # no word in both together
        return 0.0
    return float((vectors[0] @ vectors[1].T).toarray()[0, 0])  # rows have length 1 already


class WordVectors(Mapping[str, np.ndarray]):
    """Vectors of words in a file in word2vec's format, binary (.bin) or text; the file stays on disk.

    A text file may lack the first line "words dimensions" (GloVe's do). Only where each word's vector lies is held
    in memory. Raises UserError where the file is missing or in another format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as stream:
                self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"the word vectors {path} cannot be read: {error}") from error
        self._places: dict[str, int] = {}
        head = self._bytes.readline().split()
        self._binary = self.path.suffix == ".bin"
        if len(head) == 2 and head[0].isdigit() and head[1].isdigit():
            words, self.dim = int(head[0]), int(head[1])
        elif self._binary or len(head) < 3:
            raise UserError(f'the word vectors {path} should begin with the line "<words> <dimensions>"')
        else:
            words, self.dim = -1, len(head) - 1
            self._bytes.seek(0)
        (self._index_binary if self._binary else self._index_text)(words)

    def _index_binary(self, words: int) -> None:
        place, width = self._bytes.tell(), 4 * self.dim
        for number in range(words):
            end = self._bytes.find(b" ", place)
            if end < 0 or end + 1 + width > len(self._bytes):
                raise UserError(f"{self.path} ends at word {number + 1} of the {words} it announces")
            self._places[self._bytes[place:end].decode("utf-8", "replace").lstrip("\n")] = end + 1
            place = end + 1 + width

    def _index_text(self, words: int) -> None:
        lines = 0
        while line := self._bytes.readline():
            lines += 1
            word, *numbers = line.rstrip().rsplit(b" ", self.dim)  # a word may hold spaces, as some of GloVe's do
            if len(numbers) != self.dim:
                raise UserError(f"{self.path} has {len(numbers)} numbers in row {lines}, where {self.dim} belong")
            self._places[word.decode("utf-8", "replace")] = self._bytes.tell() - len(line) + len(word) + 1
        if words not in (-1, lines):
            raise UserError(f"{self.path} announces {words} words and holds {lines}")

    def __getitem__(self, word: str) -> np.ndarray:
        place = self._places[word]
        if self._binary:
            return np.frombuffer(self._bytes, dtype="<f4", count=self.dim, offset=place)
        end = self._bytes.find(b"\n", place)
        line = self._bytes[place : end if end >= 0 else len(self._bytes)]
        return np.array(line.split(), dtype=np.float32)

    def __iter__(self):
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def vector_similarity(first: str, second: str, vectors: Mapping[str, np.ndarray]) -> float:
    """Cosine in -1 .. 1 of the two texts' mean word vectors (PersoBench's "persona distance", which it is not).

    Words are split at white space in lower case, stop words left out, punctuation left on; 0 where either text has no
    word with a vector (persobench note 5).
    """
    means = []
    for text in (first, second):
        found = [vectors[word] for word in text.lower().split() if word not in STOP_WORDS and word in vectors]
        if not found:
            return 0.0
        means.append(np.mean(np.asarray(found, dtype=np.float64), axis=0))
    norms = [float(np.linalg.norm(mean)) for mean in means]
    return float(means[0] @ means[1]) / (norms[0] * norms[1]) if all(norms) else 0.0
