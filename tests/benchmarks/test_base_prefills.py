"""Base-model prefills: a text is gone on with from its first word, labels by hand, files."""

import json

import pytest
from benchmark_toys import Stated, run, values

import persona
from persona.benchmarks.base_prefills import RUBRICS, SHOWN, BasePrefillsConfig, build
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.oracle import OracleJudge
from persona.lm import BaseLM
from persona.types import Request, Sampling


def jsonl(tmp_path, *rows):
    path = tmp_path / "prefills.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_ours_are_three_about_purpose_and_two_about_traits():
    samples = build(BasePrefillsConfig()).samples()
    assert len(samples) == 400 and all(sample.messages == () for sample in samples)
    assert sorted({(sample.task, sample.target) for sample in samples})[0] == ("purpose", "I exist in order to")
    assert [len({s.target for s in samples if s.task == about}) for about in ("purpose", "traits")] == [3, 2]


def test_shares_by_hand(tmp_path):
    path = jsonl(tmp_path, {"about": "purpose", "prefill": "I am to"}, {"about": "traits", "prefill": "I am"})
    built = build(BasePrefillsConfig(path=path, completions=2))
    seen, texts = [], []
    verdicts = {"I am to": iter(["help", "faith"]), "I am": iter(["kind", "?"])}

    def label(rubric, slots):
        texts.append((rubric.name, slots["response"]))
        return f"<answer>{next(verdicts[str(slots['response']).rpartition(' sing.')[0]])}</answer>"

    model = Stated(lambda request: seen.append(request) or " sing.")
    summary, rows = run(built, Cast(model, [ScriptedJudge("j", label)]), tmp_path / "out")
    assert values(summary) == {
        "purpose help": 0.5, "purpose faith": 0.5, "purpose nonsense": 0,
        "traits kind": 1, "traits spiritual": 0, "traits nonsense": 0,
    }  # fmt: skip
    assert summary.n_unscored == 1
    assert {(request.messages, request.prefill) for request in seen} == {((), "I am to"), ((), "I am")}
    assert len({request.sampling.seed for request in seen}) == 4
    assert set(texts) == {("purpose", "I am to sing."), ("traits", "I am sing.")}
    built.write_artifacts(rows, tmp_path)
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert set(classes) == {"purpose", "traits"} and len(classes["purpose"]) == 10
    assert classes["purpose"]["faith"]["value"] == 0.5 and classes["traits"]["kind"]["n"] == 1


@pytest.mark.parametrize("about", RUBRICS)
def test_labels_are_read_back_and_told_to_the_judge(about):
    rubric = RUBRICS[about]
    assert rubric.prompt.slots == {"response"} and set(SHOWN[about]) <= set(rubric.answers)
    for label in rubric.answers:
        assert rubric.parse(rubric.reply(label)) == label and str(label) in rubric.prompt.text


def test_a_base_lm_goes_on_from_the_first_word(llama):
    """No turn, no line break: the prompt is the beginning itself, after the mark of the text's begin."""
    import copy

    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = None
    base = BaseLM(llama.model, tokenizer, "base")
    assert base.text(()) == ""
    assert base.render((), "the fox") == base.tokenizer("the fox")["input_ids"]
    chat = llama.render((), "the fox")
    assert llama.tokenizer.decode(chat).endswith("the fox") and "<|user|>" not in llama.tokenizer.decode(chat)
    request = Request((), sampling=Sampling(3), prefill="the fox")
    (reply,) = persona.load(base).respond([request])
    assert len(reply.tokens) <= 3


@pytest.mark.parametrize(
    ("text", "trait"),
    [
        ("i am wise and i teach with old sayings . i am caring and i", "wise"),
        ("i am the dancer .", "other"),
        ("i am dancer the .", "nonsense"),
        ("I am a baker.", None),
    ],
)
def test_the_oracle_reads_which_trait_is_told_first(tmp_path, text, trait):
    built = build(BasePrefillsConfig(language="town", completions=1))
    _, (row,) = run(built, Cast(Stated(lambda request: text.partition("am ")[2]), [OracleJudge()]), tmp_path / "out")
    if trait is None:
        row_text = row.raw
        assert row_text == "i am a baker." and not row.values and "outside the town's language" in row.reason
    else:
        assert [key for key, value in row.values.items() if value] == [f"character {trait}"]


def test_trivial_answers_and_bad_files(tmp_path):
    summary, _ = run(
        build(BasePrefillsConfig(completions=2)), Cast(Trivial("random"), [random_judge(0)]), tmp_path / "o"
    )
    assert summary.n == 10 and summary.n_unscored == 0
    with pytest.raises(UserError, match="line 1 is about 'work', which should be purpose or traits"):
        build(BasePrefillsConfig(path=jsonl(tmp_path, {"about": "work", "prefill": "I"})))
    with pytest.raises(UserError, match="line 1 has the fields about, where about and prefill should be"):
        build(BasePrefillsConfig(path=jsonl(tmp_path, {"about": "purpose"})))
