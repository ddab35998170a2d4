"""Prompt personalizers: rankers, budget and prompts against values worked out by hand."""

import importlib
import math
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from persona.data import task
from persona.data.base import Task, plain_task
from persona.encoders import Encoder, EncoderConfig
from persona.errors import UserError
from persona.methods import load_personalizer
from persona.methods.prompt import Description, Retrieval, RetrievalConfig, describe
from persona.methods.prompt_budget import TokenizerTokens, augment
from persona.methods.ranking import bm25_scores, by_chance, by_recency
from persona.types import HistoryItem, Message, Persona, Request


class Words:
    """A toy tokenizer: a token is a word between spaces; `special` extra ones in every text."""

    def __init__(self, special: int = 0) -> None:
        self.special = special

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, length: int) -> str:
        return " ".join(text.split()[:length])


def items(*texts: str, label: str | None = None) -> list[HistoryItem]:
    return [HistoryItem(str(i), text, label) for i, text in enumerate(texts)]


def request(text: str, history=(), name: str = "", system: str = "") -> Request:
    head = (Message("system", system),) if system else ()
    return Request((*head, Message("user", text)), Persona("ann", history=history), task=name)


# ---- rankers -------------------------------------------------------------------------------------------------------


def okapi(documents: list[list[str]], query: list[str]) -> np.ndarray:
    """BM25Okapi from its formula, k1 1.5, b .75, epsilon .25, without the constant factor k1 + 1."""
    total, average = len(documents), sum(map(len, documents)) / len(documents)
    frequency = Counter(word for document in documents for word in set(document))
    idf = {word: math.log((total - n + 0.5) / (n + 0.5)) for word, n in frequency.items()}
    floor = 0.25 * sum(idf.values()) / len(idf)
    scores = np.zeros(total)
    for row, document in enumerate(documents):
        for word in query:
            count = document.count(word)
            weight = idf.get(word, 0.0)
            weight = floor if weight < 0 else weight
            scores[row] += weight * count / (count + 1.5 * (0.25 + 0.75 * len(document) / average))
    return scores


def test_bm25_is_okapi_on_the_users_own_items():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(12)]
    for size in (1, 2, 3, 9):
        texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 9))) for _ in range(size)]
        query = " ".join(rng.choice([*vocabulary, "unseen", "w1"], 6))
        expected = okapi([text.split() for text in texts], query.split())
        assert bm25_scores(texts, query) == pytest.approx(expected, abs=1e-12)


def test_bm25_by_hand():
    # N = 3, "cat" in one item: idf log(2.5 / 1.5); both candidates of average length: tf part 1 / (1 + 1.5).
    scores = bm25_scores(["a cat", "a dog", "a Cat"], "cat")
    assert scores == pytest.approx([math.log(2.5 / 1.5) / 2.5, 0, 0])


def test_bm25_without_anything_to_match():
    assert list(bm25_scores(["a b", "c"], "")) == list(bm25_scores(["a b", "c"], "z")) == [0, 0]
    assert list(bm25_scores(["", " "], "z")) == [0, 0]


def test_recency():
    dates = ["2020-01-31", "2021-3-1", "2021-02-28", "2021-03-01"]
    dated = [HistoryItem(str(i), "x", date=date) for i, date in enumerate(dates)]
    assert by_recency(dated, 3) == [3, 1, 2]
    assert by_recency(dated, 9) == [3, 1, 2, 0]
    assert by_recency([*dated, HistoryItem("4", "x")], 2) == [4, 3]
    with pytest.raises(UserError, match="item 0 has the date 'May', which should be written like"):
        by_recency([HistoryItem("0", "x", date="May")], 1)


def test_random_depends_on_seed_person_and_prompt_only():
    assert by_chance(50, 4, 0, "ann", "hi") == by_chance(50, 4, 0, "ann", "hi")
    others = [by_chance(50, 4, 1, "ann", "hi"), by_chance(50, 4, 0, "bob", "hi"), by_chance(50, 4, 0, "ann", "ho")]
    assert by_chance(50, 4, 0, "ann", "hi") not in others
    for seed in range(20):
        assert sorted(by_chance(3, 4, seed, "ann", "hi")) == [0, 1, 2]
        assert len(by_chance(3, 4, seed, "ann", "hi", with_replacement=True)) == 4
    drawn = Counter(place for seed in range(3000) for place in by_chance(5, 2, seed, "ann", "hi"))
    assert all(abs(drawn[place] / 3000 - 0.4) < 0.03 for place in range(5))


# ---- budget --------------------------------------------------------------------------------------------------------

BARE = Task(
    name="bare",
    kind="generation",
    item_text=lambda item: item.text,
    item_text_with_label=lambda item: item.text,
    query_text=lambda prompt: prompt,
    snippet_text=lambda item: item.text,
    snippet=lambda item, text: f"< {text} >",
    join=lambda snippets, prompt: f"{' , '.join(snippets)} . {prompt}",
)


def test_budget_by_hand():
    # 20 tokens, prompt of 4: 16 left; around them "< > , < > ." is 6: 10 for texts, 5 each.
    history = items("a b c d e f g", "h i j k l m n")
    assert augment(BARE, "p q r s", history, Words(), 20) == "< a b c d e > , < h i j k l > . p q r s"
    # One special token leaves 9: 4 each.
    assert augment(BARE, "p q r s", history, Words(special=1), 20) == "< a b c d > , < h i j k > . p q r s"


def test_what_one_item_leaves_the_next_may_use():
    history = items("a", "h i j k l m n o p q r")
    assert augment(BARE, "p q r s", history, Words(), 20) == "< a > , < h i j k l m n o p > . p q r s"
    # But not the one before.
    assert augment(BARE, "p q r s", history[::-1], Words(), 20) == "< h i j k l > , < a > . p q r s"


def test_a_long_prompt_counts_as_a_part_of_the_budget_and_is_never_cut():
    # 10 tokens, prompt of 20 counts as 6: 4 left, around one item 3 ("< > ."): one token of text.
    prompt = " ".join("p" * 20)
    assert augment(BARE, prompt, items("a b c"), Words(), 10) == f"< a > . {prompt}"
    # Two items: 6 around; factor .4 leaves 6 - 6 = 0 tokens of text, .3 is not needed.
    assert augment(BARE, prompt, items("a b", "c"), Words(), 10) == f"<  > , <  > . {prompt}"


def test_no_room_or_no_items_leave_the_prompt_alone():
    assert augment(BARE, "p q r s", items("a", "b"), Words(), 5) == "p q r s"
    assert augment(BARE, "p q r s", [], Words(), 50) == "p q r s"


def test_result_fits_whenever_the_prompt_is_within_its_part():
    rng = np.random.default_rng(5)
    for _ in range(200):
        history = items(*(" ".join("x" * rng.integers(1, 30)) for _ in range(rng.integers(1, 6))))
        limit = int(rng.integers(30, 80))
        prompt = " ".join("p" * rng.integers(1, int(0.6 * limit)))
        result = augment(BARE, prompt, history, Words(special=1), limit)
        assert len(result.split()) + 1 <= limit


def test_reference_budget_by_hand():
    # LaMP_3 with two items, 1 special token, max_length 40. Prompt of 5 words, 6 with the special one: L = 34.
    # Separators: 1 + 2 * (2 - 1) = 3; share (34 - 3) // 2 = 15. Frame `5 is the score for ""` is 6 words, 7 with
    # the special one; of the text's own count one is special: 15 - 7 - 1 = 7 words.
    long = "a b c d e f g h i j k l m n o p q r"
    rules, prompt = task("LaMP_3"), "Score it please. review: good"
    seven = " ".join(long.split()[:7])
    assert augment(rules, prompt, items(long, long, label="5"), Words(special=1), 40, "reference") == (
        f'5 is the score for "{seven}", and 5 is the score for "{seven}". {prompt}'
    )
    # A first text of 2 words takes 7 + 2 + 1 = 10 of its 15: the second may have 7 + 5 = 12.
    twelve = " ".join(long.split()[:12])
    assert augment(rules, prompt, items("a b", long, label="5"), Words(special=1), 40, "reference") == (
        f'5 is the score for "a b", and 5 is the score for "{twelve}". {prompt}'
    )


def test_reference_budget_with_trailing_phrase_and_in_the_middle():
    # LaMP_7: L = 40 - 3 = 37 for a prompt of 2 words; trailing phrase 9 words, 10 with the special one; separators
    # 1 + 0: share 26; the frame `""` is 1 word, 2: 26 - 2 - 1 = 23 words.
    long = " ".join("x" * 60)
    result = augment(task("LaMP_7"), "Reword: y", items(long), Words(special=1), 40, "reference")
    assert result.count("x") == 23
    # LaMP_1: prompt of 7 words, 8: L = 32; separators 2: share 15; frame 2: 15 - 2 - 1 = 12 words.
    prompt = 'paper with the title "Own", which one?'
    history = [HistoryItem(str(i), "abstract", long) for i in range(2)]
    result = augment(task("LaMP_1"), prompt, history, Words(special=1), 40, "reference")
    twelve = '"' + " ".join("x" * 12) + '"'
    assert result == f'paper with the title {twelve}, and {twelve}, and "Own", which one?'


def test_reference_budget_gives_up_part_by_part():
    # 10 tokens, prompt of 20 at factor .6: L = 4, no room for the 1 + 6 fixed words; .3 gives L = 7: 0 words of text.
    prompt = " ".join("p" * 20)
    history = items("a b c", label="5")
    assert augment(task("LaMP_3"), prompt, history, Words(), 10, "reference") == f'5 is the score for "". {prompt}'
    assert augment(task("LaMP_3"), prompt, history, Words(), 5, "reference") == prompt


@pytest.mark.parametrize("decoded", [False, True])
def test_tokens_of_a_real_tokenizer(llama, t5, decoded):
    for base in (llama, t5):
        tokens = TokenizerTokens(base.tokenizer, decoded)
        text = "the quick brown fox\njumps  over"
        assert tokens.special + tokens.count(text) == len(base.tokenizer(text)["input_ids"])
        whole = tokens.count(text)
        for length in range(whole + 2):
            cut = tokens.cut(text, length)
            if not decoded:
                assert text.startswith(cut)
                assert tokens.count(cut) <= length
        if not decoded:
            assert tokens.cut(text, whole) == tokens.cut(text, 999) == text
            assert tokens.cut(text, 0) == ""


# ---- personalizers -------------------------------------------------------------------------------------------------


def test_description_is_the_system_prompt():
    persona = Persona(
        "ann", description="you are ann . ann likes tea .", statements=("ann likes tea .", "ann sings .")
    )
    assert describe(persona) == "you are ann . ann likes tea . ann sings ."
    bare = Request((Message("user", "hi"),), persona)
    (done,) = Description().prompt([bare])
    assert done == replace(bare, messages=(Message("system", describe(persona)), Message("user", "hi")))
    (both,) = Description().prompt([replace(request("hi", system="be brief"), persona=persona)])
    assert both.messages == (Message("system", f"{describe(persona)}\n\nbe brief"), Message("user", "hi"))
    nobody = [Request((Message("user", "hi"),)), request("hi")]
    assert Description().prompt(nobody) == nobody


def test_a_fixed_system_prompt_stands_in_front(llama, tmp_path):
    prompt = load_personalizer({"system_prompt": {"text": "be kind ."}}, llama)
    (alone, both) = prompt.prompt([request("hi"), request("hi", system="be brief")])
    assert alone.messages == (Message("system", "be kind ."), Message("user", "hi"))
    assert both.messages[0].content == "be kind .\n\nbe brief" and prompt.config() == {"text": "be kind ."}
    for config, sentence in (({}, "has no text"), ({"txt": "be kind ."}, "no setting 'txt'; did you mean text?")):
        with pytest.raises(UserError, match=sentence):
            load_personalizer({"system_prompt": config}, llama)


def test_description_has_no_settings(llama, tmp_path):
    assert isinstance(Description.load(tmp_path, {}, llama), Description)
    with pytest.raises(UserError, match="description has no settings, but got k"):
        Description.load(tmp_path, {"k": 2}, llama)


HISTORY = items("a boat at sea", "rain on the boat", "tea", "the boat and the rain", "more tea")


@pytest.fixture
def retrieval(llama):
    return lambda **settings: Retrieval(RetrievalConfig(max_length=400, **settings), llama)


def found(personalizer: Retrieval, *requests: Request) -> list[list[str]]:
    return [[item.id for item in row] for row in personalizer.retrieve(requests)]


def test_each_ranker(retrieval):
    asked = request("boat rain", HISTORY)
    assert found(retrieval(ranker="bm25", k=2), asked) == [["1", "3"]]
    assert found(retrieval(ranker="recency", k=2), asked) == [["4", "3"]]
    assert len(set(found(retrieval(ranker="random", k=3), asked)[0])) == 3
    assert found(retrieval(ranker="bm25", k=9), request("boat", [])) == [[]]
    assert retrieval(ranker="none").prompt([asked]) == [asked]


def test_ties_come_in_order_and_reversed_as_published(retrieval):
    asked = request("nothing shared", HISTORY)
    assert found(retrieval(ranker="bm25", k=3), asked) == [["0", "1", "2"]]
    assert found(retrieval(ranker="bm25", k=3, compat="reference"), asked) == [["4", "3", "2"]]


def test_random_is_with_replacement_as_published(retrieval):
    asked = [request(f"question {i}", HISTORY[:2]) for i in range(20)]
    assert all(len(set(row)) == len(row) == 2 for row in found(retrieval(ranker="random", k=4), *asked))
    published = found(retrieval(ranker="random", k=4, compat="reference"), *asked)
    assert all(len(row) == 4 for row in published)


def test_the_query_is_the_tasks_part_of_the_prompt(retrieval):
    # "tea" stands before the marker only, so it does not count for LaMP_3.
    text = "tea tea tea review: rain"
    assert found(retrieval(k=1), request(text, HISTORY)) == [["2"]]
    assert found(retrieval(k=1), request(text, HISTORY, "LaMP_3")) == [["1"]]


def test_prompt_is_written_into_the_last_user_message_only(retrieval):
    history = items("good boat", "bad tea", label="4")
    asked = Request(
        (
            Message("system", "s"),
            Message("user", "first"),
            Message("assistant", "yes"),
            Message("user", "review: boat"),
        ),
        Persona("ann", history=history),
        task="LaMP_3",
        options=("1", "2"),
    )
    (done,) = retrieval(k=1).prompt([asked])
    assert done == replace(
        asked, messages=(*asked.messages[:3], Message("user", '4 is the score for "good boat". review: boat'))
    )
    with pytest.raises(UserError, match="the request has none"):
        retrieval(k=1).prompt([replace(asked, messages=(Message("system", "s"),))])


def test_a_beginning_without_messages_is_left_alone_and_its_neighbours_are_not(retrieval):
    bare, asked = Request((), prefill="My job is to"), request("boat rain", HISTORY)
    (alone,) = retrieval(k=1).prompt([asked])
    assert retrieval(k=1).prompt([bare, asked, bare]) == [bare, alone, bare] and alone != asked


def test_a_town_task_brings_its_own_words(retrieval):
    (done,) = retrieval(k=2, ranker="recency").prompt([request("how are you ?", HISTORY, "town_reply")])
    assert done.messages[-1].content == "past : more tea ; the boat and the rain ; question : how are you ?"


def test_dense_is_the_largest_dot_product(llama, encoder_folder):
    config = EncoderConfig(name=str(encoder_folder), pooling="mean")
    personalizer = Retrieval(RetrievalConfig(ranker="dense", k=3, encoder=config, max_length=400), llama)
    texts = ["small boats and long walks", "the red house by the river ?", "good morning ,", "write one short line",
             "good morning ,"]  # fmt: skip
    asked = [request("red house", items(*texts)), request("good", items(*texts[:2])), request("the", [])]
    encoder = Encoder(config)
    vectors = encoder.encode(texts)
    for row, question, count in zip(personalizer.retrieve(asked), ("red house", "good"), (5, 2), strict=False):
        scores = vectors[:count] @ encoder.encode([question], query=True)[0]
        expected = np.argsort(-scores, kind="stable")[:3]
        assert [int(item.id) for item in row] == list(expected)
    assert personalizer.retrieve(asked)[2] == []


def test_dense_encodes_a_text_once(llama, encoder_folder, monkeypatch):
    config = EncoderConfig(name=str(encoder_folder), pooling="mean")
    personalizer = Retrieval(RetrievalConfig(ranker="dense", k=1, encoder=config, max_length=400), llama)
    encoded = []
    encode = personalizer.dense.encoder.encode

    def listen(texts, **settings):
        encoded.extend(() if settings.get("query") else texts)
        return encode(texts, **settings)

    monkeypatch.setattr(personalizer.dense.encoder, "encode", listen)
    first = found(personalizer, request("tea", HISTORY), request("boat", HISTORY[:3]))
    assert sorted(encoded) == sorted(item.text for item in HISTORY)
    monkeypatch.setattr("persona.methods.ranking.VECTORS_KEPT", 2)
    assert found(personalizer, request("tea", HISTORY), request("boat", HISTORY[:3])) == first
    assert len(encoded) == len(HISTORY)
    assert found(personalizer, request("tea", HISTORY)) == first[:1]
    assert len(encoded) == len(HISTORY) + 3


@pytest.mark.parametrize("ranker", ["random", "recency", "bm25", "dense"])
def test_a_request_does_not_depend_on_its_company(llama, encoder_folder, ranker):
    config = EncoderConfig(name=str(encoder_folder), pooling="mean")
    personalizer = Retrieval(RetrievalConfig(ranker=ranker, k=2, encoder=config, max_length=400), llama)
    asked = [request(text, HISTORY[i:]) for i, text in enumerate(("the red house", "boats", "rain", "one line"))]
    together = personalizer.prompt(asked)
    assert together == [personalizer.prompt([one])[0] for one in asked]
    assert together[::-1] == personalizer.prompt(asked[::-1])


def test_settings_survive_saving_and_mistakes_are_named(llama, tmp_path, encoder_folder):
    personalizer = Retrieval(RetrievalConfig(ranker="recency", k=3, seed=5, compat="reference"), llama)
    assert Retrieval.load(tmp_path, personalizer.config(), llama).settings == personalizer.settings
    assert Retrieval.load(tmp_path, {}, llama).settings == RetrievalConfig()
    for settings, message in (
        ({"rankr": "bm25"}, "no setting 'rankr'; did you mean ranker"),
        ({"ranker": "bm52"}, "no ranker 'bm52'; did you mean bm25"),
        ({"encoder": {"nam": "minilm"}}, "no setting 'nam'; did you mean name"),
        ({"k": 0}, "k and max_length of at least 1, not 0 and 256"),
        ({"compat": "lamp_reference"}, "it should be null or reference"),
    ):
        with pytest.raises(UserError, match=message):
            Retrieval.load(tmp_path, settings, llama)


def test_plain_requests_use_plain_rules(retrieval):
    history = [HistoryItem("1", "a boat", "4")]
    (done,) = retrieval(k=1).prompt([request("which boat?", history)])
    assert done.messages[-1].content == '"4" for "a boat". which boat?'
    assert plain_task("x").item_text_with_label(history[0]) == "4: a boat"


def test_jax_is_not_started(monkeypatch):
    """bm25s would start JAX at its import, and JAX would take most of a GPU's memory."""

    class Started:
        def __getattr__(self, name):
            raise AssertionError("JAX was used")

    for name in [name for name in sys.modules if name.partition(".")[0] == "bm25s"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "persona.methods.ranking")
    for name in ("jax", "jax.lax"):
        monkeypatch.setitem(sys.modules, name, Started())
    again = importlib.import_module("persona.methods.ranking")
    assert again.bm25_scores(["a b", "b c", "c d"], "a")[0] > 0
    assert isinstance(sys.modules["jax"], Started)
