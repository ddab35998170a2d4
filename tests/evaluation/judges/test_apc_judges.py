"""APC by a judge: verdicts become probabilities, what cannot be read is unscored, the published slip on request."""

import asyncio

import numpy as np
import pytest

from persona.evaluation.judges import apc
from persona.evaluation.judges.judging import ScriptedJudge, Unscored
from persona.evaluation.judges.oracle import OracleJudge
from persona.evaluation.judges.parsing import Unreadable
from persona.metrics.apc import Question, apc_score

STATEMENTS = ("ann keeps bees", "ann is old", "ann hates the sea")
# What a judge says of each statement: about the question, and about each of two replies.
RELEVANT = {"ann keeps bees": "Yes", "ann is old": "no", "ann hates the sea": "No"}
LABELS = {
    "i keep bees": dict(zip(STATEMENTS, ("entailed", "neutral", "contradicted"), strict=True)),
    "none, i am ten": dict(zip(STATEMENTS, ("contradicted", "Contradict", "neutral"), strict=True)),
}
QUESTION = Question("Ann", STATEMENTS, "pets?", tuple(LABELS))


def judge(labels=LABELS, relevant=RELEVANT, asked=None):
    def reply(rubric, slots):
        if asked is not None:
            asked.append(rubric.name)
        if rubric is apc.RELEVANCE:
            return relevant[slots["statement"]]
        return labels[slots["response"]][slots["statement"]]

    return ScriptedJudge("scripted", reply)


def probabilities(judge, question, compat=None):
    return [each.found for each in asyncio.run(apc.judged(judge, question, compat))]


def scores(found):
    return [apc_score(*one).total.item() for one in found]


def test_every_statement_is_asked_about_and_relevance_once():
    asked = []
    first, second = probabilities(judge(asked=asked), QUESTION)
    assert asked.count("apc_relevance") == 3 and asked.count("apc_nli") == 6
    np.testing.assert_array_equal(first.relevance, [1, 0, 0])
    np.testing.assert_array_equal(first.entailment, [[1, 0, 0]])
    np.testing.assert_array_equal(second.contradiction, [[1, 1, 0]])
    # Satisfied: bees and age; then the sea alone.
    assert scores((first, second)) == [2, 1]


def test_the_published_scorer_never_punishes_the_word_it_asks_for():
    """The reply "contradicted" speaks for no class there, "contradict" does (docs/errata.md)."""
    assert scores(probabilities(judge(), QUESTION, "reference")) == [2 + 1, 0 + 0 + 1]


def test_what_cannot_be_read_is_unscored_and_was_free_as_published():
    labels = {"i keep bees": {**LABELS["i keep bees"], "ann is old": "who knows"}}
    question = Question("Ann", STATEMENTS, "pets?", ("i keep bees",))
    (found,) = probabilities(judge(labels), question)
    assert isinstance(found, Unscored)
    assert found.reason.startswith("1 of 6 verdicts could not be read: ") and found.raw == "who knows"
    # As published: an NLI reply of another kind costs a passive statement nothing, a relevance one earns nothing.
    assert scores(probabilities(judge(labels), question, "reference")) == [3]
    relevant = {**RELEVANT, "ann is old": "perhaps"}
    assert scores(probabilities(judge(relevant=relevant), question, "reference")) == [2]


@pytest.mark.parametrize("reply", ("neutral or entailed", "", "yes"))
def test_labels_are_read_one_or_none(reply):
    with pytest.raises(Unreadable):
        apc.NLI.parse(reply)


@pytest.mark.parametrize(
    "reply, label", (("Entailment", "entailed"), ("Answer: contradicts.", "contradicted"), ("**neutral**", "neutral"))
)
def test_spellings(reply, label):
    assert apc.NLI.parse(reply) == label
    assert apc.NLI.parse(apc.NLI.reply(label)) == label


def test_the_town_s_oracle_answers_both_questions():
    statements = ("the pet of ada is cat .", "ada loves old things .", "ada talks like a sailor .")
    question = Question("ada", statements, "what is your pet ?", ("my pet is cat .", "my pet is dog .", "a cat"))
    good, bad, foreign = probabilities(OracleJudge(), question)
    np.testing.assert_array_equal(good.relevance, [1, 0, 1])
    np.testing.assert_array_equal(good.entailment, [[1, 0, 0]])
    np.testing.assert_array_equal(bad.contradiction, [[1, 0, 0]])
    assert isinstance(foreign, Unscored) and "outside the town's language" in foreign.reason
