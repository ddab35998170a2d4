"""APC: pairs by hand, rows as many as published, splits, files, and the whole method in the town for two."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation.fault_server import Answer, FaultServer

from persona import data, lm
from persona.data import BiographyConfig, TownCharactersConfig
from persona.errors import UserError
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig
from persona.evaluation.judges.judging import ScriptedJudge, Unscored
from persona.evaluation.judges.oracle import OracleJudge
from persona.evaluation.roles import Parrot, Roles
from persona.lm.load import resolve
from persona.methods import load_personalizer
from persona.methods.apc import (
    APCConfig,
    DiscriminatorConfig,
    discriminators,
    formats,
    labels,
    method,
    pairs,
    preference_pairs,
    train,
)
from persona.methods.apc.characters import characters
from persona.methods.apc.discriminators import Labelled, calibration, class_weights, split
from persona.methods.apc.pairs import statement_weights
from persona.methods.apc.statements import bullets, quoted, take
from persona.metrics.apc import Probabilities, Question
from persona.personalizer import LanguageModel
from persona.training.classifier import ClassifierTraining
from persona.training.lora import LoraSettings
from persona.training.trainer import TrainerConfig
from persona.types import Request

TRAINER = TrainerConfig(epochs=2, batch_size=4, wandb="disabled", learning_rate=1e-3, warmup_ratio=0.0, cpu=True)
TINY = APCConfig(
    queries="data", responses="sampled", prompts="town", others=3, samples=4, max_new_tokens=24, gap=0.05, beta=0.1,
    lora=LoraSettings(r=2, lora_alpha=2), max_length=256,
    discriminator=DiscriminatorConfig(
        base="town", relevance_epochs=1, nli_epochs=1, learning_rate=1e-3, batch_size=32, max_length=128
    ),
)  # fmt: skip

# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_the_best_reply_is_preferred_to_the_worst_where_they_differ_enough():
    scores = [[2.0, 2.5], [1.0, 0.9, 1.3, 0.9], [3.0, 3.1], [4.0], [], [1.0, 0.8]]
    found = preference_pairs(scores, gap=0.2)
    assert [(pair.query, pair.chosen, pair.rejected) for pair in found] == [(0, 1, 0), (1, 2, 1)]
    assert found[0].gap == 0.5 and found[1].gap == pytest.approx(0.4)
    assert [pair.query for pair in preference_pairs(scores, gap=0.05)] == [0, 1, 2, 5]
    assert preference_pairs([[1.0, 1.25]], gap=0.25) == []  # it has to be exceeded


def test_weights_per_statement_by_hand():
    """An active statement that the first reply follows and the second leaves open; a passive one that it denies."""
    found = Probabilities(
        np.array([1.0, 0.25]), np.array([[1.0, 0.0], [0.5, 0.0]]), np.array([[0.0, 1.0], [0.0, 0.2]])
    )
    # .25 · (1 - 1)(.2) for the first reply, .25 · (.8)(1) for the second.
    assert statement_weights(found, 0, 1) == pytest.approx((1.0 * 1.0 * 0.5, 0.75 * 0.8))
    total = found.score().total
    first, second = statement_weights(found, 0, 1)
    assert first - second == pytest.approx(total[0] - total[1])
    assert statement_weights(found, 1, 0) == pytest.approx((second, first))
    assert statement_weights(found, 0, 0)[0] == statement_weights(found, 0, 0)[1]


# ---- rows ----------------------------------------------------------------------------------------------------------


def people(train=2, questions=4):
    return data.load(TownCharactersConfig(train=train, test=1, questions=questions, held_out=1))


def test_rows_as_many_as_published():
    (character, *_) = characters(people())
    statements = [f"ada {n}" for n in range(9)]
    queries = {statement: [f"{statement} {letter}?" for letter in "abc"] for statement in statements}
    config = APCConfig()
    items = [item for _, item in labels.relevance_items(character, queries, config, 0)]
    assert (
        len(items) == 9 * 5 and len({name for name, _ in labels.relevance_items(character, queries, config, 0)}) == 45
    )
    assert not any(item.query in queries[item.statement] for item in items)
    own = labels.own_queries(character, queries, [], config)
    assert len(own) == 27
    rows = [
        {"of": i.character, "character": i.name, "statement": i.statement, "query": i.query,
         "responses": [f"{i.query} {label}" for label in ("yes", "perhaps", "no")]} for _, i in own
    ]  # fmt: skip
    asked = labels.nli_items(rows, [], 3, 0)
    assert len(asked) == 27 * 6 and len({name for name, _ in asked}) == 27 * 6
    assert labels.nli_items(rows[:3], [], 3, 0)[0] == asked[0]  # of its own replies, a row is asked the same
    assert len(labels.nli_items(rows, [replace(own[0][1], statement="bare")], 3, 0)) == 27 * 6 + 3


def test_queries_of_the_data_are_judged_and_the_relevant_ones_answered():
    (character, *_) = characters(people(questions=12))
    statements = dict.fromkeys(character.persona.statements, ())
    config = replace(TINY, queries_per_statement=2, others=30)
    items = labels.relevance_items(character, statements, config, 0)
    assert len(items) == len(statements) * 12
    judge = Roles(Parrot(""), judges=[OracleJudge()])
    rows = [asyncio.run(labels.judge_relevance(item, judge)) for _, item in items]
    own = labels.own_queries(character, statements, rows, config)
    yes = {(row["statement"], row["query"]) for row in rows if row["relevant"] == "yes"}
    assert 0 < len(own) < len(yes) and {(item.statement, item.query) for _, item in own} <= yes


def test_a_character_without_questions_of_its_own(base, tmp_path):
    with pytest.raises(UserError, match="takes the questions of the train split, but .* has none there"):
        train(TINY, under(base), replace(people(), train=()), TRAINER, tmp_path)


def test_statements_and_queries_are_read_off_replies():
    assert bullets("Facts:\n- Ada sails.\n-Ada\n * Ada is old. \n- Ada sails.\n") == ["Ada sails.", "Ada is old."]
    assert quoted('1. "Do you sail?"\n2. “How old are you?” "" "Do you sail?"') == ["Do you sail?", "How old are you?"]
    (character, *_) = characters(people())
    reply = f"- {character.name} sails.\n- She is old."
    row = asyncio.run(take((character, "text"), Roles(Parrot(reply))))
    assert row["statements"] == [f"{character.name} sails."] and row["nameless"] == 1
    with pytest.raises(Unscored, match="no line of the reply begins with a dash"):
        asyncio.run(take((character, "text"), Roles(Parrot("I cannot."))))


# ---- discriminators ------------------------------------------------------------------------------------------------


def test_no_statement_is_in_training_and_held_out():
    rows = [Labelled({"query": str(n)}, "yes", f"statement {n % 50}") for n in range(1000)]
    parts = split(rows, DiscriminatorConfig(), 0)
    held = {row.cluster for row in parts["held_out"]}
    assert (
        not {row.cluster for row in parts["train"]} & ({row.cluster for row in parts["dev"]} | held)
        and 3 < len(held) < 18
    )
    assert parts["dev"] and not held & {row.cluster for row in parts["dev"]}
    fewer = split(rows[:300], DiscriminatorConfig(), 0)["held_out"]
    assert fewer == parts["held_out"][: len(fewer)]


def test_neutral_rows_are_thinned_and_no_others():
    rows = [Labelled({"query": str(n)}, ("neutral", "entailment")[n % 10 == 0], "s") for n in range(100)]
    kept = discriminators.thinned(rows, 1.5, 0)
    assert [row.label for row in kept].count("entailment") == 10 and len(kept) == 25
    assert kept == [row for row in rows if row in kept] == discriminators.thinned(rows, 1.5, 0)
    assert discriminators.thinned(rows, 20, 0) == rows


def test_calibration_by_hand():
    """Logits that say nothing: what is left is how frequent the classes are; too sure ones are scaled down."""
    scale, bias = calibration(np.zeros((400, 2)), [0] * 300 + [1] * 100)
    assert scale == pytest.approx(1.0, abs=1e-3) and bias[0] - bias[1] == pytest.approx(np.log(3), abs=0.01)
    # Logits ±4 that are right three times in four deserve ±log(3) / 2.
    logits = np.tile([[4.0, 0.0], [0.0, 4.0]], (400, 1))
    right = np.tile([0, 1], 400)
    right[:200] = 1 - right[:200]
    scale, bias = calibration(logits, right)
    assert scale == pytest.approx(np.log(3) / 4, abs=0.01) and bias == pytest.approx([0.0, 0.0], abs=0.01)
    assert np.isfinite(calibration(np.zeros((10, 3)), [0] * 10)[1]).all()  # two classes without a row


def test_class_weights_by_hand():
    assert class_weights(["no"] * 3 + ["yes"], ("no", "yes")).tolist() == pytest.approx([2 / 3, 2.0])
    assert class_weights(["a"] * 4, ("a", "b")).tolist() == [1.0, 0.0]
    assert class_weights(["a"] * 3 + ["b"], ("a", "b"), balanced=False).tolist() == [1.0, 1.0]


def test_dropout_is_on_while_it_learns(tmp_path, monkeypatch):
    """As published it was off: from_pretrained leaves a model in evaluation mode."""
    modes = []
    forward = ClassifierTraining.forward

    def seen(self, *args, **inputs):
        modes.append(self.model.training)
        return forward(self, *args, **inputs)

    monkeypatch.setattr(ClassifierTraining, "forward", seen)
    rows = [
        Labelled({"character": "ada", "statement": f"ada {n}", "query": "?"}, ("no", "yes")[n % 2], f"{n}")
        for n in range(24)
    ]
    config = replace(TINY.discriminator, held_out=0.5, dev=0.0)
    discriminators.train_discriminator("relevance", rows, [], config, TRAINER, tmp_path / "work", tmp_path / "model")
    assert modes and all(modes)
    report = json.loads((tmp_path / "model" / "report.json").read_text())
    held = report["held_out"]
    assert held["rows"] == held["statements"] > 5 and held["low"] <= held["accuracy"] <= held["high"]
    with pytest.raises(UserError, match="needs training rows of two classes at least, but has .* × yes"):
        only = [replace(row, label="yes") for row in rows]
        discriminators.train_discriminator("relevance", only, [], config, TRAINER, tmp_path / "w", tmp_path / "m")


# ---- files ---------------------------------------------------------------------------------------------------------


def test_published_files_are_read_and_checked(tmp_path):
    path = tmp_path / "Alice.nli.v2.json"
    row = {"character": "Alice", "statement": "Alice sails.", "query": "?", "response": "I do.", "label": "contradict"}
    path.write_text(json.dumps([row]))
    assert formats.read(path)[0]["label"] == "contradicted"
    for changed, words in (
        ({"label": "false"}, "row 1, has the label 'false', which should be entailed, neutral, contradicted"),
        ({"query": None}, "row 1, has no 'query', which should be a text"),
    ):
        path.write_text(json.dumps([{**row, **changed}]))
        with pytest.raises(UserError, match=words):
            formats.read(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        formats.read(path)


# ---- the whole method ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return lm.load(lm.ModelConfig(path="town", device="cpu"))


def under(base, *stack):
    return LanguageModel(base, [load_personalizer(what, base) for what in stack], 64)


RAG = {"statements": {"ranker": "bm25", "k": 3, "prompts": "town"}}


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("apc")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    folder = train(TINY, under(base, RAG), people(), TRAINER, out, judges=[OracleJudge()])
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return folder


def test_from_statements_to_an_adapter(trained, base):
    stages = trained.parent / "stages"
    names = {path.name for path in (stages / "labels").iterdir()}
    assert len(names) == 6 and sum(name.endswith(".nli.v2.json") for name in names) == 2
    rows = [json.loads(line) for line in (stages / "pairs" / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["gap"] > 0.05 and row["chosen"] != row["rejected"]
        assert row["chosen_weight"] - row["rejected_weight"] == pytest.approx(row["gap"])
        # Sampled and learned behind the statements that the stack shows, in front of the question.
        assert row["messages"][0]["content"].count(" .") > 2 and row["messages"][1]["content"] == row["query"]
    published = [pair for path in (stages / "pairs").glob("*.rag.dpo.json") for pair in formats.read(path)]
    assert len(published) == len(rows) and published[0]["chosen"].endswith("<|end|>")
    model = LanguageModel(base, [load_personalizer(RAG, base), load_personalizer(trained, base)])
    assert model.personalizers[1].method == "apc" and model.personalizers[1].trained_on_top_of == ("statements",)
    sample = people().test[0]
    request = Request(sample.messages, sample.persona)
    assert model.loglikelihood([request], ["hello ."]) != under(base, RAG).loglikelihood([request], ["hello ."])


def test_the_adapter_gives_the_same_logits_in_plain_peft(trained, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([base.render(people().test[0].messages)])
    ours = load_personalizer(trained, base)
    with torch.no_grad(), ours.modules([None]):
        expected = base.model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(resolve("town"), dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain, trained / "adapter").eval()(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_made_again_and_a_change_runs_what_builds_on_it(trained, base, caplog):
    caplog.set_level(logging.INFO)
    again = train(TINY, under(base, RAG), people(), TRAINER, trained.parent, judges=[OracleJudge()])
    assert again == trained and sum("skipped" in message for message in caplog.messages) == 5
    caplog.clear()
    weighed = replace(TINY, objective="per_statement")
    train(weighed, under(base, RAG), people(), TRAINER, trained.parent, judges=[OracleJudge()], stage="dpo")
    assert sum("skipped" in message for message in caplog.messages) == 4


def test_no_pair_survives(trained, base):
    with pytest.raises(UserError, match="no preference pair survives: over 8 queries the widest gap .* method.gap=50"):
        train(replace(TINY, gap=50.0), under(base, RAG), people(), TRAINER, trained.parent, judges=[OracleJudge()])


def test_experience_is_uploaded_without_statements_and_dpo_goes_on_top(trained, base, tmp_path):
    config = replace(TINY, mode="experience")
    folder = train(config, under(base), people(), TRAINER, tmp_path / "eu", judges=[OracleJudge()])
    assert not (tmp_path / "eu" / "stages" / "pairs").exists()
    stages = trained.parent / "stages" / "discriminators"
    models = {"relevance_model": str(stages / "relevance"), "nli_model": str(stages / "nli")}
    kept = [json.loads(file.read_text()) for file in stages.glob("*/tokenizer.json")]
    assert [(one["truncation"], one["padding"]) for one in kept] == [(None, None)] * 2  # no trace of the last batch
    stack = under(base, str(folder))
    both = train(replace(TINY, **models), stack, people(), TRAINER, tmp_path / "both")
    assert load_personalizer(both, base).trained_on_top_of == ("apc",)


def test_the_judge_itself_may_score(base, tmp_path):
    config = replace(TINY, reward="judge")
    train(config, under(base, RAG), people(questions=8), TRAINER, tmp_path, judges=[OracleJudge()])
    stages = tmp_path / "stages"
    assert {path.name for path in stages.iterdir()} == {"statements", "pairs", "dpo", "records", "work"}
    rows = [json.loads(line) for line in (stages / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert rows and all(score == int(score) for row in rows for score in row["scores"])  # statements are counted


def test_a_teacher_who_is_told_what_bears_on_a_query_gives_direct_prompting_its_pairs(base, tmp_path):
    """Asked directly the LM knows nobody and says nothing; what is learned has no statement in its prompt."""
    config = replace(TINY, reward="judge", samples=1, told=1, gap=0.5)
    train(config, under(base), people(questions=8), TRAINER, tmp_path, judges=[OracleJudge()])
    rows = [json.loads(line) for line in (tmp_path / "stages" / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 8 and all(row["scores"][1] > row["scores"][0] for row in rows)
    assert {row["messages"][0]["content"] for row in rows} == {
        sample.messages[0].content for sample in people(questions=8).train
    }


def test_a_reply_that_the_judge_cannot_read_is_left_out_and_the_others_are_compared():
    question = Question("ada", ("ada sails .",), "hobby ?", ("i sail .", "mumble", "no ."))

    def reply(rubric, slots):
        labels = {"i sail .": "entailed", "no .": "contradicted", "mumble": "who knows"}
        return labels[slots["response"]] if "response" in slots else "yes"

    judges = Roles(Parrot(""), judges=[ScriptedJudge("half", reply)])
    row = asyncio.run(pairs.judge_replies(question, judges))
    assert row["kept"] == [0, 2] and pairs.probabilities(row).score().total.tolist() == [1.0, 0.0]
    with pytest.raises(Unscored, match="1 of 2 verdicts could not be read"):  # one reply is no pair
        asyncio.run(pairs.judge_replies(replace(question, replies=("i sail .", "mumble")), judges))


def test_pairs_that_were_all_drawn_to_be_measured_on_are_learned_from(base, tmp_path, monkeypatch):
    monkeypatch.setattr(method, "DEV_PAIRS", 1.0)
    judge = {"judges": [OracleJudge()]}
    train(replace(TINY, reward="judge"), under(base, RAG), people(questions=8), TRAINER, tmp_path, **judge)
    logged = [json.loads(line) for line in (tmp_path / "stages" / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert any("train_runtime" in row for row in logged) and not any("eval_loss" in row for row in logged)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_no_judge_or_one_that_cannot_be_read(base, tmp_path):
    with pytest.raises(UserError, match="are labelled by one judge, but none is given: choose one with"):
        train(TINY, under(base), people(), TRAINER, tmp_path)
    dumb = ScriptedJudge("dumb", lambda rubric, slots: "I would rather not say")
    with pytest.raises(UserError, match="none of .* replies of the judge on relevance could be read: no answer"):
        train(TINY, under(base), people(), TRAINER, tmp_path, judges=[dumb])


def test_verdicts_that_cannot_be_read_are_left_out_and_counted(base, tmp_path, caplog):
    def reply(rubric, slots):
        if "cat" in slots["statement"] or "loves" in slots["statement"]:
            return "hm"
        return rubric.reply(rubric.answers[len(slots["query"]) % len(rubric.answers)])

    train(TINY, under(base), people(), TRAINER, tmp_path, judges=[ScriptedJudge("half", reply)], stage="statements")
    train(TINY, under(base), people(), TRAINER, tmp_path, judges=[ScriptedJudge("half", reply)], stage="labels")
    assert any("have no answer" in message for message in caplog.messages)
    rows = [row for path in (tmp_path / "stages" / "labels").iterdir() for row in formats.read(path)]
    assert rows and not any("loves" in row["statement"] for row in rows)


SHEET = "Mira Holm was born in a lighthouse. She carves spoons.\n\nMira Holm became a carpenter in Varde.\n"


def test_a_teacher_that_dies_half_way_is_not_asked_twice(base, tmp_path):
    """Statements of prose, then three queries for each; the server dies in the middle of the queries."""
    (tmp_path / "mira.txt").write_text(SHEET)
    people = data.load(BiographyConfig(path=str(tmp_path / "mira.txt"), character="Mira Holm"))
    dead = threading.Event()

    def plan(seen):
        if dead.is_set():
            return Answer(fault="500")
        if "Take out of the passage" in seen.text:
            name = "Holm" if "carpenter" in seen.text else "Mira"
            return Answer(text="".join(f"- {name} has fact {n}.\n" for n in range(20)) + "- She is nice.")
        if sum("Somebody is talking" in other.text for other in server.seen) > 10:
            dead.set()
            return Answer(fault="500")
        return Answer(text='"Is it so?" "Really?" "And then?"')

    def run(stage):
        endpoint = Endpoint(EndpointConfig(model="judge-7b", base_url=server.url, retries=0, concurrency=2))
        return train(APCConfig(), under(base), people, TRAINER, tmp_path / "out", teacher=endpoint, stage=stage)

    with FaultServer(plan) as server:
        run("statements")
        rows = formats.read(tmp_path / "out" / "stages" / "statements" / "mira.json")
        assert len(rows) == 40 and rows[0] == {
            "character": "Mira Holm", "passage": SHEET.split("\n")[0], "statement": "Mira has fact 0.",
        }  # fmt: skip
        with pytest.raises(UserError, match="is down"):
            run("queries")
        assert not (tmp_path / "out" / "stages" / "queries").exists()
        dead.clear()
        server.seen.clear()
        server.plan = lambda seen: Answer(text='"Is it so?" "Really?" "And then?"')
        run("queries")
        assert 25 <= len(server.seen) <= 31  # ten had an answer
    rows = formats.read(tmp_path / "out" / "stages" / "queries" / "mira.query_relevant_to_statement.json")
    assert len(rows) == 40 and all(len(row["queries"]) == 3 for row in rows)


def test_a_statement_without_the_name_and_a_text_without_facts(base, tmp_path):
    samples = people().train
    nameless = replace(samples[0].persona, statements=("hums all day .",))
    bad = replace(people(), train=tuple(replace(sample, persona=nameless) for sample in samples[:1]))
    with pytest.raises(UserError, match="statement 1, does not name .*: 'hums all day .'"):
        train(TINY, under(base), bad, TRAINER, tmp_path, judges=[OracleJudge()])
    none = replace(samples[0].persona, statements=())
    bad = replace(people(), train=(replace(samples[0], persona=none),))
    with pytest.raises(UserError, match="has no statements and no text to take them from"):
        train(TINY, under(base), bad, TRAINER, tmp_path / "b", judges=[OracleJudge()])


def test_a_stack_that_acts_by_vectors_is_refused(base, tmp_path):
    from persona.personalizer import Personalizer

    class Vectors(Personalizer):
        method = "vectors"

        def embeddings(self, requests):
            return [None] * len(requests)

    stack = LanguageModel(base, [Vectors()])
    with pytest.raises(UserError, match="trains on top of prompts and LoRA adapters, not on top of vectors"):
        train(TINY, stack, people(), TRAINER, tmp_path, judges=[OracleJudge()])
