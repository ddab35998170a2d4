"""APC: the score by hand, its identities, and discriminators of real architectures whose batches change nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from scorer_toys import save_bert

from persona.errors import UserError
from persona.metrics import apc
from persona.metrics.apc import Discriminators, Question, apc_score, explain

# Four statements: clearly active, mostly active, mostly passive, passive.
RELEVANCE = [1.0, 0.8, 0.2, 0.0]
ENTAILMENT = [0.9, 0.5, 0.1, 0.3]
CONTRADICTION = [0.05, 0.4, 0.7, 0.2]


def test_four_statements_by_hand():
    """active .9 + .4 + .02 + 0; passive 0 + .08 + .56 + .2; an always neutral reply earns 0 + .2 + .8 + 1."""
    score = apc_score(RELEVANCE, ENTAILMENT, CONTRADICTION)
    assert score == pytest.approx((2.48, 0.48, 1.32, 0.84))
    assert (score.total, score.delta, score.active, score.passive) == score
    assert all(isinstance(value, float) for value in score)


def test_a_neutral_reply_has_delta_zero_and_certain_labels_count_statements():
    assert apc_score(RELEVANCE, [0] * 4, [0] * 4) == pytest.approx((2.0, 0, 0, 0))
    # relevant and entailed; relevant and contradicted; irrelevant and contradicted; irrelevant and open
    assert apc_score([1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]) == (2, 0, 1, 1)


def test_batches_share_the_relevance():
    rng = np.random.default_rng(0)
    nli = rng.dirichlet([1, 1, 1], (3, 4))
    many = apc_score(RELEVANCE, nli[..., 0], nli[..., 1])
    assert many.total.shape == (3,)
    for row in range(3):
        assert apc_score(RELEVANCE, nli[row, :, 0], nli[row, :, 1]) == pytest.approx([part[row] for part in many])
    assert apc_score(torch.tensor(RELEVANCE), nli[0, :, 0], nli[0, :, 1]).delta == pytest.approx(many.delta[0])
    # A reply's statements in another order are the same statements.
    turned = apc_score(RELEVANCE[::-1], nli[0, ::-1, 0], nli[0, ::-1, 1])
    assert turned == pytest.approx([part[0] for part in many])


def test_normalized_by_the_number_of_statements():
    assert apc_score(RELEVANCE, ENTAILMENT, CONTRADICTION, normalize=True) == pytest.approx((0.62, 0.12, 0.33, 0.21))
    twice = [values * 2 for values in (RELEVANCE, ENTAILMENT, CONTRADICTION)]
    assert apc_score(*twice).delta == pytest.approx(0.96)
    assert apc_score(*twice, normalize=True).delta == pytest.approx(0.12)


def test_an_explanation_adds_up():
    rows = explain(["a", "b", "c", "d"], RELEVANCE, ENTAILMENT, CONTRADICTION)
    assert [row.statement for row in rows] == ["a", "b", "c", "d"]
    assert [row.gain for row in rows] == pytest.approx([0.9, 0.4 - 0.08, 0.02 - 0.56, -0.2])
    score = apc_score(RELEVANCE, ENTAILMENT, CONTRADICTION)
    assert sum(row.satisfied for row in rows) == pytest.approx(score.total)
    assert sum(row.gain for row in rows) == pytest.approx(score.delta)


@pytest.mark.parametrize(
    "arrays, words",
    (
        (([0.5, 0.5], [0.5], [0.5]), r"shapes relevance \[2\], entailment \[1\]"),
        ((0.5, 0.5, 0.5), r"shapes relevance \[\]"),
        (([0.5], [1.5], [0.5]), "entailment holds values outside 0 to 1"),
        (([float("nan")], [0.5], [0.5]), "relevance holds values outside 0 to 1"),
    ),
)
def test_what_is_no_table_of_probabilities_is_refused(arrays, words):
    with pytest.raises(UserError, match=words):
        apc_score(*arrays)


# ---- discriminators ------------------------------------------------------------------------------------------------

LABELS = {"relevance": ("no", "yes"), "nli": ("contradicted", "neutral", "entailed")}
QUESTIONS = (
    Question("ann", ("ann keeps bees.", "ann hates the sea."), "pets?", ("i keep bees", "none")),
    Question("bo", ("bo is old.", "bo sings, and sings well enough.", "bo."), "how old are you?", ("i am!",)),
    Question("cy", ("cy hums.",), "what?", ()),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {key: save_bert(tmp_path_factory.mktemp(key), labels) for key, labels in LABELS.items()}


@pytest.fixture(scope="module")
def discriminators(folders):
    return Discriminators(folders["relevance"], folders["nli"])


def test_batched_scores_are_those_of_one_text_at_a_time(discriminators, folders):
    together = discriminators(QUESTIONS)
    small = Discriminators(folders["relevance"], folders["nli"], tokens=1)  # every text a batch of its own
    for question, found, alone in zip(QUESTIONS, together, small(QUESTIONS), strict=True):
        shape = (len(question.replies), len(question.statements))
        assert found.relevance.shape == shape[1:] and found.entailment.shape == found.contradiction.shape == shape
        for one, other in zip(found, alone, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        assert found.score().delta.shape == shape[:1]
    assert len({round(float(value), 6) for found in together for value in found.relevance}) == 6


def test_classes_are_found_by_name_in_any_order(discriminators, folders, tmp_path):
    """The same weights with their classes named the other way round: every probability moves with its name."""
    for key, folder in folders.items():
        shutil.copytree(folder, tmp_path / key)
        config = json.loads((tmp_path / key / "config.json").read_text())
        config["id2label"] = dict(enumerate(reversed(LABELS[key])))
        config["label2id"] = {label: number for number, label in config["id2label"].items()}
        (tmp_path / key / "config.json").write_text(json.dumps(config))
    found = Discriminators(str(tmp_path / "relevance"), str(tmp_path / "nli"))(QUESTIONS[:1])[0]
    before = discriminators(QUESTIONS[:1])[0]
    np.testing.assert_allclose(found.relevance, 1 - before.relevance, atol=1e-9)
    np.testing.assert_allclose(found.entailment, before.contradiction, atol=1e-9)


def test_classes_without_names_are_refused(folders, tmp_path):
    bare = save_bert(tmp_path, ("LABEL_0", "LABEL_1"))
    with pytest.raises(UserError, match="names its classes LABEL_0, LABEL_1; its config.json should name them no and"):
        Discriminators(bare, folders["nli"])
    with pytest.raises(UserError, match="names its classes no, yes; its config.json should name them entailment"):
        Discriminators(folders["relevance"], folders["relevance"])


def test_each_text_is_computed_once_and_the_relevance_not_per_reply(discriminators, monkeypatch):
    seen = {"relevance": [], "nli": []}
    for name, rows in seen.items():
        classifier = getattr(discriminators, name)
        forward = classifier.model.forward

        def counted(*args, rows=rows, forward=forward, **kwargs):
            rows.append(len(kwargs["input_ids"]))
            return forward(*args, **kwargs)

        monkeypatch.setattr(classifier.model, "forward", counted)
    statements = QUESTIONS[0].statements
    discriminators([Question("ann", statements, "pets?", ("i keep bees", "none", "none"))] * 2)
    assert sum(seen["relevance"]) == 2 and sum(seen["nli"]) == 2 * 2


def test_a_text_that_is_too_long_is_counted(folders, caplog):
    classifier = Discriminators(folders["relevance"], folders["nli"]).relevance
    classifier([{"character": "ann", "statement": "bees " * 200, "query": "pets?"}])
    assert classifier.cut == 1 and "1 texts so far are longer than 128 tokens" in caplog.text


def test_a_chat_lm_reads_replies_in_its_own_turns(llama):
    template = apc.chat_template(llama.tokenizer, apc.NLI_TEMPLATE)
    slots = {"character": "ann", "statement": "ann keeps {bees}.", "query": "pets?", "reply": "bees!"}
    messages = [
        {"role": "system", "content": "ann\nann keeps {bees}."},
        {"role": "user", "content": "pets?"},
        {"role": "assistant", "content": "bees!"},
    ]
    text = llama.tokenizer.apply_chat_template(messages, tokenize=False)
    assert template.format(**slots) == text
    # One beginning of text, whoever brings it.
    special = apc.adds_special(llama.tokenizer, template)
    ids = llama.tokenizer(text, add_special_tokens=special)["input_ids"]
    assert ids == llama.tokenizer.apply_chat_template(messages)["input_ids"]
    assert "{reply}" not in apc.chat_template(llama.tokenizer, apc.RELEVANCE_TEMPLATE)


def test_a_model_folder_may_have_its_own_template(folders, tmp_path):
    shutil.copytree(folders["relevance"], tmp_path / "own")
    (tmp_path / "own" / apc.TEMPLATE).write_text("{query} | {statement}\n")
    own = Discriminators(str(tmp_path / "own"), folders["nli"]).relevance
    assert own.template == "{query} | {statement}"
    item = {"character": "ann", "statement": "ann keeps bees.", "query": "pets?"}
    standard = Discriminators(folders["relevance"], folders["nli"]).relevance
    assert own([item])["yes"] != pytest.approx(standard([item])["yes"])
