"""PersoBench: reading replies by the published rule, the official files, all metrics, and what published code gets
wrong (reference note, section 5)."""

import csv
import json
import logging
from pathlib import Path
from random import Random

import nltk
import pytest
from benchmark_toys import Stated, run, values
from scorer_toys import save_bert, save_punkt, save_t5

from persona.benchmarks import persobench
from persona.benchmarks.persobench import (
    DATASETS,
    PROMPTS,
    PersoBenchConfig,
    build,
    instructability,
    parse_reply,
    published_persona,
    published_ranking_score,
    ranking_score,
    read_reply,
    read_samples,
    reference,
    statements,
    truncated,
)
from persona.errors import UserError
from persona.evaluation.episodes import Trivial
from persona.metrics.nli import Entailment, c_score, ue_score
from persona.types import Response


def benchmark(**settings):
    return build(PersoBenchConfig(**settings))


def wrapped(text) -> str:
    return json.dumps({"response": text})


# ---- reading a reply -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, reply",
    [
        ('{"response": "hi"}', "hi"),
        ('Sure!\n{\n "reasoning": "so",\n "response": " two\\nlines "\n}\nDone', " two\nlines "),
        ('{"note": 1} {broken} {"response": "second"} {"response": "third"}', "second"),
        ('{"reasoning": "so"\n "response": "no comma"}', None),
        ('{"response": "cut of', None),
        ('{"response": ""}', None),
        ('{"response": null} {"response": "later"}', None),
        ('{"response": NaN}', None),
        ('{"response": 7}', "7"),
        ('{"response": ["a", true]}', "['a', True]"),
        ('{"Response": "another key"}', None),
        ('```json\n{"response": "fenced"}\n```', "fenced"),
        ('{"a": {"response": "inside"}}', None),
        ('{"response": "a brace } breaks it"}', None),
        ('response: "no object"', None),
        ("{" + "[" * 100_000 + "}", None),
        ("", None),
    ],
)
def test_the_published_rule_for_open_models(text, reply):
    assert parse_reply(text) == reply


@pytest.mark.parametrize(
    "text, reply",
    [
        ('{"response": "hi"}', "hi"),
        (' \n{"reasoning": "so", "response": "hi }"} ', "hi }"),
        ('```json\n{"response": "fenced"}\n```', "fenced"),
        ('Sure! {"response": "hi"}', None),
        ('{"response": "hi"} {"response": "ho"}', None),
        ('{"reasoning": "no reply"}', None),
        ('{"response": ""}', None),
        ('["response"]', None),
        ('"response"', None),
        ('{"response": 3.5}', "3.5"),
        ("", None),
    ],
)
def test_the_published_rule_for_closed_models(text, reply):
    assert parse_reply(text, closed=True) == reply


def test_braces_and_thoughts_are_understood_by_default():
    """Flaw 6: the published rule ends an object at its first closing brace, wherever that stands."""
    assert read_reply('{"response": "a brace } inside"}') == "a brace } inside"
    assert read_reply('{"mood": {"glad": 1}, "response": "nested"}') == "nested"
    assert parse_reply('{"mood": {"glad": 1}, "response": "nested"}') is None
    thought = '<think>{"response": "a draft"}</think>{"response": "final"}'
    assert (read_reply(thought), parse_reply(thought)) == ("final", "a draft")
    assert read_reply('{"response": "  "}') is None
    assert read_reply('{"a": {"response": "inside"}}') is None
    assert read_reply('{"a": 1 {"response": "after a broken one"}') == "after a broken one"
    assert read_reply("{" * 3000) is None
    assert read_reply('Well, {"response": "hi"}', closed=True) is None


def test_cut_replies_are_told_from_malformed_ones():
    """Flaw 5: the token limit leaves a brace open."""
    assert truncated('{"reasoning": "so", "response": "and th')
    assert not truncated('{"reasoning": "so", "response": "and th', "eos"), "it stopped by itself"
    assert not truncated('reasoning: so\nresponse: "hi"')
    assert not truncated('{"response": "un"quoted"}')


# ---- the official files --------------------------------------------------------------------------------------------


def test_statements_of_all_forms():
    assert statements("I keep bees.I live in the U.S. now.I am 5 feet tall") == (
        "I keep bees.", "I live in the U.S. now.", "I am 5 feet tall",
    )  # fmt: skip
    assert statements("i like tea.im late") == ("i like tea.", "im late")
    listed = "[User 1 persona]: ['i like tea.'\n \"i'm late.\" 'i can\\'t swim.']"
    assert statements(listed) == ("i like tea.", "i'm late.", "i can't swim.")
    assert statements("[Responder persona]: ['one']") == ("one",)


def test_published_personas_lose_their_apostrophes_and_the_space_between_statements():
    listed = "[User 1 persona]: ['i like tea.'\n \"i'm late.\"]"
    assert published_persona(listed) == "i like tea.\n im late."
    assert published_persona("I keep bees.I am late.") == "I keep bees.I am late."


def test_references_lose_their_speaker():
    assert reference("FoCus", "User2: It opened at 9: too late.") == "It opened at 9: too late."
    assert reference("Blended Skill Talk", " Note: I wait. ") == "Note: I wait."


def test_the_sample_is_in_the_official_form():
    found = {name: read_samples(persobench.SAMPLES / f"{name}.csv", name) for name in DATASETS}
    assert [len(samples) for samples in found.values()] == [5, 5, 5]
    for name, samples in found.items():
        for sample in samples:
            assert len(sample.persona.statements) in ((2,) if name == "Blended Skill Talk" else (4, 5))
            assert sample.target and not sample.target.startswith("User")
            if name in ("FoCus", "IT-ConvAI2"):
                assert "'" not in sample.target + sample.metadata["personas"]
    assert "'" in found["Blended Skill Talk"][0].persona.description


def write(path: Path, rows, columns=("personas", "context", "act_response")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


ROWS = [
    ("I keep bees.I fear geese.", "User1: Where to?", "User2: Im off to the bees."),
    ("I keep bees.I fear geese.", "User1: And then?", "User2: Home, where no geese are."),
    ("I paint boats.I like rain.", "User1: Is it raining?", "User2: It is, and I like rain."),
]


def test_official_folders_files_and_a_data_set_of_ones_own(tmp_path):
    for name in DATASETS:
        write(tmp_path / "Prompts" / f"{name}.csv", ROWS)
    everything = benchmark(path=str(tmp_path))
    assert [sample.id for sample in everything.samples()][:4] == [
        "FoCus-0000", "IT-ConvAI2-0000", "Blended Skill Talk-0000", "FoCus-0001",
    ]  # fmt: skip
    assert {
        everything.groups(sample)["dataset"] for sample in benchmark(path=str(tmp_path), limit=3).samples()
    } == set(DATASETS)
    assert len(benchmark(path=str(tmp_path), dataset="FoCus").samples()) == 3
    mine = benchmark(path=str(write(tmp_path / "mine.csv", ROWS)))
    assert [sample.id for sample in mine.samples()] == ["mine-0000", "mine-0001", "mine-0002"]
    first, second, third = (mine.cluster(sample) for sample in mine.samples())
    assert first == second != third, "rows of one persona are not independent"


HEADER = ("personas", "context", "act_response")


@pytest.mark.parametrize(
    "name, rows, columns, complaint",
    [
        (
            "FoCus",
            ROWS,
            ("personas", "story", "reply"),
            "lacks the columns context, act_response; it has personas, st",
        ),
        ("FoCus", [], HEADER, "has no rows"),
        ("FoCus", [*ROWS, ("x", " ", "y")], HEADER, "row 3 .* nothing in its column context"),
        ("FoCus", [("x", "y", "User2: ")], HEADER, "row 0 .* only a speaker's mark"),
        ("Other", ROWS, HEADER, "has no FoCus.csv; it holds Other.csv"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, name, rows, columns, complaint):
    write(tmp_path / f"{name}.csv", rows, columns)
    with pytest.raises(UserError, match=complaint):
        benchmark(path=str(tmp_path), dataset="FoCus")


def test_a_folder_that_is_not_there_and_an_unknown_mode(tmp_path):
    with pytest.raises(UserError, match="has no FoCus.csv, IT-ConvAI2.csv, Blended Skill Talk.csv; it holds no CSV"):
        benchmark(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="mode=think is unknown; it should be vanilla or cot"):
        benchmark(mode="think")


# ---- prompts -------------------------------------------------------------------------------------------------------


def asked(**settings) -> str:
    return benchmark(dataset="FoCus", **settings).samples()[0].messages[-1].content


def test_slots_are_those_that_are_filled():
    assert PROMPTS["vanilla"].slots == {"personas", "context", "closed"}
    assert PROMPTS["cot"].slots == {"personas", "context", "closed", "separator"}
    assert PROMPTS["system"].slots == set()


def test_the_prompt_holds_the_cells_as_they_are():
    sample = benchmark(dataset="FoCus").samples()[0]
    assert [message.role for message in sample.messages] == ["user"]
    assert sample.metadata["personas"] in sample.messages[0].content
    assert sample.metadata["context"] in sample.messages[0].content
    assert sample.target not in sample.messages[0].content


def shown(prompt: str) -> str:
    return prompt[prompt.rindex("{") :]


def test_only_chain_of_thought_asks_for_reasoning():
    assert "step by step" in asked(mode="cot") and "step by step" not in asked()
    assert list(json.loads(shown(asked(mode="cot")))) == ["reasoning", "response"]
    assert list(json.loads(shown(asked()))) == ["response"]


def test_the_published_form_lacks_a_comma():
    """Note 3: its two keys stand without a comma, so a model that copies the form writes no JSON."""
    with pytest.raises(ValueError, match="delimiter"):
        json.loads(shown(asked(mode="cot", compat="reference")))


def test_closed_models_have_a_system_message_and_no_limit_on_the_response():
    made = benchmark(dataset="FoCus", mode="cot", closed=True)
    roles = [message.role for message in made.samples()[0].messages]
    assert roles == ["system", "user"] and made.prompts == (PROMPTS["cot"], PROMPTS["system"])
    limits = [asked(mode="cot", closed=closed).count("110 words") for closed in (False, True)]
    assert limits == [2, 1] and asked(closed=True).count("110 words") == 0


@pytest.mark.parametrize("mode, limit", [("vanilla", 110), ("cot", 220)])
def test_token_limits_are_the_published_ones(tmp_path, mode, limit):
    seen = []

    def reply(request):
        seen.append((request.sampling.max_new_tokens, request.sampling.temperature, request.persona))
        return wrapped("hi")

    made = benchmark(mode=mode)
    run(made, Stated(reply), tmp_path)
    assert {(tokens, temperature) for tokens, temperature, _ in seen} == {(limit, 0.0)}
    assert {persona.id for *_, persona in seen} == {sample.persona.id for sample in made.samples()}


# ---- metrics without models ----------------------------------------------------------------------------------------


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """NLTK's data: a sentence splitter, no WordNet."""
    monkeypatch.setattr(nltk.data, "path", [str(save_punkt(tmp_path / "nltk_data"))])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    yield
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


class Outputs(Stated):
    """One output per sample, in the order of the samples; those that end in "…" stop at the token limit."""

    def __init__(self, made, outputs):
        replies = {sample.messages: output for sample, output in zip(made.samples(), outputs, strict=True)}
        super().__init__(lambda request: replies[request.messages])

    def respond(self, requests):
        texts = [self.reply(request) for request in requests]
        return [Response(text.rstrip("…"), finish_reason="length" if text[-1:] == "…" else "eos") for text in texts]


@pytest.fixture
def bees(tmp_path):
    return str(write(tmp_path / "data" / "FoCus.csv", ROWS))


def test_unreadable_replies_have_the_worst_values_and_are_counted_apart(bees, tmp_path, nltk_data):
    made = benchmark(path=bees)
    outputs = [wrapped("I'm off to the bees."), '{"response": "Home, whe…', 'response: "It is"']
    summary, rows = run(made, Outputs(made, outputs), tmp_path / "out")
    found = values(summary)
    assert summary.n_unscored == 0 and rows[0].values["bleu"] == 1
    assert found["invalid"] == pytest.approx(2 / 3)
    assert found["truncated"] == found["malformed"] == pytest.approx(1 / 3)
    assert found["bleu"] == pytest.approx(1 / 3) and found["dist2"] == pytest.approx(1 / 3)
    assert {value for name, value in rows[1].values.items() if name not in ("invalid", "truncated")} == {0.0}
    assert [row.raw for row in rows] == [output.rstrip("…") for output in outputs]


def test_apostrophes_that_references_lost_cost_nothing_by_default(bees, tmp_path, nltk_data):
    """Flaw 6: references of FoCus and IT-ConvAI2 lost every apostrophe, replies did not."""
    outputs = [wrapped("I'm off to the bees.")] * 3
    rows = {}
    for compat in (None, "reference"):
        made = benchmark(path=bees, compat=compat)
        rows[compat] = run(made, Outputs(made, outputs), tmp_path / str(compat))[1][0].values
    assert rows[None]["rouge1"] == pytest.approx(1, abs=1e-6)
    assert rows["reference"]["rouge1"] == pytest.approx(4 / 5, abs=1e-6)
    talk = benchmark(dataset="Blended Skill Talk")
    sample = talk.samples()[0]
    assert "'" in sample.target and talk.compare(sample, sample.target)["bleu"] == pytest.approx(1)


def test_statements_are_told_apart_for_the_overlap(bees, nltk_data):
    """Published personas run together: "bees.I" loses its full stop and is the word "beesi"."""
    both = [benchmark(path=bees, compat=compat) for compat in (None, "reference")]
    overlaps = [made.compare(made.samples()[0], "my bees sting")["idf_overlap"] for made in both]
    assert overlaps[0] > 0 == overlaps[1]


def test_the_published_rule_of_reading_goes_with_compat(bees, tmp_path, nltk_data):
    found = {}
    for compat in (None, "reference"):
        made = benchmark(path=bees, compat=compat)
        outputs = [wrapped("a } b"), wrapped(" "), wrapped("fine")]
        found[compat] = values(run(made, Outputs(made, outputs), tmp_path / str(compat))[0])["invalid"]
    assert found == {None: pytest.approx(1 / 3), "reference": pytest.approx(2 / 3)}


def test_half_a_character_in_a_reply_is_no_error(bees, tmp_path, nltk_data):
    made = benchmark(path=bees)
    rows = run(made, Outputs(made, ['{"response": "half \\ud83d"}'] * 3), tmp_path / "out")[1]
    assert rows[0].values["invalid"] == 0


def test_what_is_not_measured_is_said_once(caplog, nltk_data):
    with caplog.at_level(logging.WARNING):
        made = benchmark()
    (record,) = caplog.records
    told = record.getMessage()
    for name in ("meteor", "c_score", "ue_score", "bertscore_f1", "persona_coverage", "unieval_overall", "ranking"):
        assert name in told and name not in made.metrics
    for key in ("nli_model", "coherence_model", "bertscore_model", "unieval_model", "word_vectors", "WordNet"):
        assert key in told
    assert made.primary == "idf_overlap"


def test_trivial_answers_are_readable_and_different(tmp_path, nltk_data):
    made = benchmark()
    constant = values(run(made, Trivial("constant"), tmp_path / "constant")[0])
    random = values(run(made, Trivial("random"), tmp_path / "random")[0])
    assert constant["invalid"] == random["invalid"] == 0
    assert constant["rouge1"] < 0.5 and constant["rouge1"] != random["rouge1"]
    few = benchmark(limit=2)
    said = {json.loads(few.chance(few.samples()[0], Random(seed)))["response"] for seed in range(9)}
    assert said == {few.samples()[1].target}, "another sample's reply, never its own"


def test_the_official_tables_and_files(bees, tmp_path, nltk_data):
    made = benchmark(path=bees)
    rows = run(made, Outputs(made, [wrapped("one two"), wrapped("a a a"), "nothing"]), tmp_path / "out")[1]
    made.write_artifacts(rows, tmp_path)
    with open(tmp_path / "responses_FoCus.csv", newline="") as stream:
        assert list(csv.reader(stream)) == [["gen_response"], ["one two"], ["a a a"], [""]]
    with open(tmp_path / "metrics.csv", newline="") as stream:
        table = {row["metric"]: row for row in csv.DictReader(stream)}
    assert set(table) == set(made.metrics) and {row["dataset"] for row in table.values()} == {"FoCus"}
    # Dist-1 is 1, 1/3 and the worst value: mean 4/9, population variance ((5/9)^2 + (1/9)^2 + (4/9)^2) / 3.
    dist1 = table["dist1"]
    assert float(dist1["mean"]) == pytest.approx(4 / 9, abs=1e-4)
    assert float(dist1["population_std"]) == pytest.approx((42 / 81 / 3) ** 0.5, abs=1e-4)
    assert (dist1["n"], dist1["n_readable"]) == ("3", "2")
    assert float(dist1["mean_readable"]) == pytest.approx(2 / 3, abs=1e-4)


# ---- metrics with models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    vectors = "bees 1 0\ngeese 0 1\nkeep 1 1\nrain 0 2\n"
    (place / "vectors.txt").write_text(vectors)
    bert = save_bert(place / "bert")
    return {"nli_model": bert, "coherence_model": bert, "bertscore_model": bert,
            "unieval_model": save_t5(place / "t5"), "word_vectors": str(place / "vectors.txt")}  # fmt: skip


REPLIES = ["bees and geese", "i keep rain", "no boat is mine"]


def measured(tmp_path, bees, models, compat):
    made = benchmark(path=bees, compat=compat, **models)
    outputs = [*map(wrapped, REPLIES)]
    return made, *run(made, Outputs(made, outputs), tmp_path / f"out {compat}")


def test_all_metrics_from_models(bees, models, tmp_path, nltk_data):
    made, summary, rows = measured(tmp_path, bees, models, None)
    assert set(made.metrics) == set(persobench._METRICS) - {"meteor"} == set(values(summary))
    assert made.primary == "ranking"
    nli = Entailment(models["nli_model"])
    for sample, reply, row in zip(made.samples(), REPLIES, rows, strict=True):
        persona = sample.persona.description
        by_persona, by_reference = nli([(persona, reply), (sample.target, reply)])
        found = row.values
        assert found["c_score"] == c_score(by_persona) and found["ue_score"] == ue_score(by_persona, by_reference)
        assert 0 < found["bertscore_f1"] < 1 and 0 < found["unieval_naturalness"] < 1
        assert found["ranking"] == pytest.approx(
            20 * (found["ue_score"] / 2 + found["persona_coverage"] + found["unieval_groundedness"])
            + 20 * ((found["c_score"] + 1) / 2 + 1)
        )
    # Persona: keep (1, 1); "bees." has no vector for its full stop. Reply: bees (1, 0) and geese (0, 1).
    assert rows[0].values["persona_coverage"] == pytest.approx(1)


def test_published_nli_inputs_go_with_compat(bees, models, tmp_path, nltk_data):
    """Flaw 1: one string "reply persona" for the C score, "persona [SEP] reply" in one segment for UE."""
    made, _, rows = measured(tmp_path, bees, models, "reference")
    nli = Entailment(models["nli_model"])
    for sample, reply, row in zip(made.samples(), REPLIES, rows, strict=True):
        persona = sample.metadata["personas"]
        texts = (f"{reply} {persona}", f"{persona} [SEP] {reply}", f"{sample.target} [SEP] {reply}")
        swapped, by_persona, by_reference = nli([(text, None) for text in texts])
        assert row.values["c_score"] == c_score(swapped)
        assert row.values["ue_score"] == ue_score(by_persona, by_reference)
    _, _, right = measured(tmp_path, bees, models, None)
    assert [row.values["c_score"] for row in rows] != [row.values["c_score"] for row in right]


def test_unreadable_replies_under_models(bees, models, tmp_path, nltk_data):
    made = benchmark(path=bees, **models)
    rows = run(made, Outputs(made, ["nothing", wrapped("bees"), "no"]), tmp_path / "out")[1]
    assert rows[0].values["c_score"] == -1 and rows[0].values["p_consistency"] == rows[0].values["ranking"] == 0
    assert set(rows[0].values) == set(rows[1].values) == set(made.metrics)


def test_a_model_that_plays_two_parts_is_loaded_once(models, tmp_path):
    both = benchmark(nli_model=models["nli_model"], coherence_model=models["nli_model"])
    assert both._fronts["nli_model"] is both._fronts["coherence_model"]
    assert both.primary == "c_score"
    with pytest.raises(UserError, match="coherence_model=.*nowhere could not be loaded"):
        benchmark(coherence_model=str(tmp_path / "nowhere"))


def test_a_second_run_scores_the_same(bees, models, tmp_path, nltk_data):
    """The fronts live through several runs, each in an event loop of its own."""
    made = benchmark(path=bees, **models)
    first, second = (run(made, Outputs(made, map(wrapped, REPLIES)), tmp_path / name)[1] for name in "ab")
    assert [row.values for row in first] == [row.values for row in second]


# ---- over several runs ---------------------------------------------------------------------------------------------

# C, UE, persona distance, groundedness, failure (FoCus vanilla), and the ranking on equal scales (note 5, flaw 4).
FOCUS = {
    "GPT-3.5": (0.26, 0.37, 0.51, 0.72, 0.090, 59.1),
    "4o-mini": (0.16, 0.35, 0.54, 0.72, 0.086, 58.6),
    "4-turbo": (0.14, 0.39, 0.51, 0.66, 0.035, 58.0),
    "Qwen2": (-0.31, 0.17, 0.29, 0.43, 0.509, 32.8),
}


def test_ranking_on_equal_scales():
    for c, ue, coverage, groundedness, failure, expected in FOCUS.values():
        assert ranking_score(ue, coverage, groundedness, c, failure) == pytest.approx(expected, abs=0.06)


def test_the_published_ranking_gives_instructability_no_weight():
    """Flaw 4: 37.36 for GPT-3.5 and 11.60 for Qwen2; following the format perfectly would add a fifth of a point."""
    instruct = instructability({name: row[4] for name, row in FOCUS.items()})
    assert instruct["Qwen2"] == 0 and instruct["GPT-3.5"] == pytest.approx(1 - 0.090 / 0.509)
    published = {
        name: published_ranking_score(ue, coverage, groundedness, c, instruct[name])
        for name, (c, ue, coverage, groundedness, *_) in FOCUS.items()
    }
    assert published["GPT-3.5"] == pytest.approx(37.36, abs=0.01)
    assert published["Qwen2"] == pytest.approx(11.60, abs=0.01)
    assert published_ranking_score(0.37, 0.51, 0.72, 0.26, 1) - published_ranking_score(0.37, 0.51, 0.72, 0.26, 0) == (
        pytest.approx(0.2)
    )
    assert instructability({"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}
