"""Character benchmark: questions, variants, the prefilled turn, judges, trivial answers, the oracle in the town."""

import json

import pytest
from benchmark_toys import Stated, run, values

import persona
from persona.benchmarks import character
from persona.benchmarks.character import GO_ON, SHOWS, VARIANTS, CharacterConfig, build, questions
from persona.data.base import People
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.oracle import OracleJudge
from persona.evaluation.judges.parsing import Unreadable
from persona.town import lexicon as lx
from persona.town import reading
from persona.town.grammar import vocabulary
from persona.types import Message, Persona, Request, Sample

TRAITS = ("wise", "curious")
WISE = lx.CHARACTER["wise"][1][0]


def people(*asked, statements=tuple(lx.CHARACTER[trait][0] for trait in TRAITS)):
    persona = Persona("sage", statements=statements)
    samples = [Sample(str(n), (Message("user", q),), persona=persona) for n, q in enumerate(asked or ("well ?",))]
    return People("sage.txt", {}, samples, ())


def bench(*asked, **changes):
    return build(CharacterConfig(**{"language": "town", "limit": 6, "max_new_tokens": 32, **changes}), people(*asked))


def judged(answer):
    """A judge whose answer is a function of the slots."""
    return ScriptedJudge("judge", lambda rubric, slots: answer(slots))


# ---- questions -----------------------------------------------------------------------------------------------------


def test_every_form_of_a_question_is_read(tmp_path):
    rows = [
        {"question": "One?"},
        {"prompt": " Two? "},
        {"conversation": [{"role": "user", "content": "Three?"}, {"role": "assistant", "content": "No."}]},
        {"conversation": [{"input": "Four?", "output": "No."}]},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert questions(CharacterConfig(path=str(path))) == {"1": "One?", "2": "Two?", "3": "Three?", "4": "Four?"}
    limited = [questions(CharacterConfig(path=str(path), limit=2, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert limited[0] == limited[1] and all(len(one) == 2 for one in limited) and any(o != limited[0] for o in limited)


@pytest.mark.parametrize(
    ("text", "sentence"),
    (
        ('{"question": " "}', "line 1 has no question: it should have a text as 'question' or 'prompt'"),
        ('{"text": "x"}', "its fields are text"),
        ('{"conversation": [{"role": "assistant", "content": "x"}]}', "whose first turn is the user's"),
        ("", "asked.jsonl holds no questions"),
        ("{", "broken JSON in line 1"),
    ),
)
def test_bad_questions_are_one_sentence(tmp_path, text, sentence):
    (tmp_path / "asked.jsonl").write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        questions(CharacterConfig(path=str(tmp_path / "asked.jsonl")))
    assert "\n" not in str(caught.value)


def test_the_towns_questions_and_wordings_are_in_its_language():
    asked = questions(CharacterConfig(language="town"))
    assert len(asked) == len(set(asked.values())) == len(lx.SMALL_TALK) * len(lx.TOPICS)
    assert all(reading.question(question) for question in asked.values())
    words = set(vocabulary())
    for wording in (*VARIANTS["town"].values(), GO_ON["town"]):
        assert set(wording.replace("{question}", "").split()) <= words, wording


@pytest.mark.parametrize("language", ["en", "town"])
def test_there_are_eight_ways_to_drop_the_role(language):
    assert len(VARIANTS[language]) == 9 and VARIANTS[language]["default"] == "{question}"
    assert len({wording for wording in VARIANTS[language].values()}) == 9
    assert all(wording.count("{question}") == 1 for wording in VARIANTS[language].values())


def test_questions_of_the_constitution_are_not_asked(caplog):
    town = questions(CharacterConfig(language="town"))
    known = next(iter(town.values()))
    asked = bench(known, limit=None)
    assert (
        len(asked.samples()) == 9 * (len(town) - 1)
        and "1 questions are left out, as sage.txt asks them" in caplog.text
    )
    assert known not in {sample.messages[0].content for sample in asked.samples()}
    with pytest.raises(UserError, match="every question stands in sage.txt already"):
        build(CharacterConfig(language="town"), people(*town.values()))


def test_questions_that_a_character_was_trained_on_are_not_asked(tmp_path, caplog):
    town = questions(CharacterConfig(language="town"))
    first, second, *_ = town.values()
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "{first}"}}\n{{"prompt": "i met the king today . {second}"}}\n')
    kept = questions(CharacterConfig(language="town", without=str(path)))
    assert set(town.values()) - set(kept.values()) == {first, second} and "2 questions are left out" in caplog.text
    assert kept.items() <= town.items()
    limited = questions(CharacterConfig(language="town", without=str(path), limit=5))
    assert len(limited) == 5 and limited.items() <= kept.items()


def test_people_without_statements_and_other_languages_are_one_sentence():
    with pytest.raises(
        UserError, match="sage.txt has nobody with statements: choose data=constitution data.path=…, say"
    ):
        build(CharacterConfig(), people(statements=()))
    with pytest.raises(UserError, match="benchmark.language=de is unknown; it should be one of en, town"):
        bench(language="de")


# ---- episodes ------------------------------------------------------------------------------------------------------


def test_values_by_hand(tmp_path):
    """Shown in the default variant, in two of eight others, never after a prefill: over ten variants .3."""
    wanted = {VARIANTS["town"][name] for name in ("default", "be yourself", "stop that")}

    def reply(request):
        said = request.messages[-1].content
        shown = len(request.messages) == 1 and any(
            wording.replace("{question}", question) == said for wording in wanted for question in asked.values()
        )
        return WISE if shown else "the fair is big today ."

    built = bench(prefill=True)
    asked = built._asked
    base = Stated(lambda request: "certainly , the fair is big today . i hope this helps .")
    summary, rows = run(built, Cast(Stated(reply), [OracleJudge()], None, base), tmp_path)
    assert values(summary) == pytest.approx({"shows": 0.3, "default": 1, "robustness": 0.25, "prefill": 0})
    assert summary.n == 60 and summary.n_unscored == 0
    assert {estimate.n_clusters for estimate in summary.estimates.values()} == {6}
    assert {row.groups["variant"] for row in rows} == {*VARIANTS["town"], "prefill"}
    (first, *_) = [row for row in rows if row.groups["variant"] == "prefill"]
    user, written, go_on, last = first.transcript
    assert [turn["role"] for turn in first.transcript] == ["user", "assistant", "user", "assistant"]
    assert written["content"] == base.reply(None) and go_on["content"] == f"go on like that . {user['content']}"
    assert last["content"] == first.raw and not rows[0].transcript


def test_the_constitution_reaches_personalizers_and_judges_but_no_prompt(tmp_path):
    seen = []

    def reply(request):
        seen.append(request)
        return "the fair is big today ."

    slots = []
    judge = judged(lambda given: slots.append(given) or "<answer>no</answer>")
    base = Stated(lambda request: seen.append(request) or "hello , how can i help you ?")
    run(bench(prefill=True, limit=1), Cast(Stated(reply), [judge], None, base), tmp_path)
    assert all("i am" not in message.content for request in seen for message in request.messages)
    assert {None if request.persona is None else request.persona.id for request in seen} == {"sage", None}
    assert [request.persona for request in seen].count(None) == 1  # the untouched base, once
    assert {given["character"] for given in slots} == {"\n".join(lx.CHARACTER[trait][0] for trait in TRAITS)}
    assert len({request.sampling.seed for request in seen}) == 10  # one per sample; the base draws by the sample's own
    assert {request.sampling.temperature for request in seen} == {0.7}


def test_judges_count_alike_and_the_unreadable_do_not(tmp_path):
    yes, no = judged(lambda given: "<answer>yes</answer>"), judged(lambda given: "So: no.\n<answer>no</answer>")
    mute = judged(lambda given: "Well.")
    yes.name, no.name, mute.name = "yes", "no", "mute"
    summary, _ = run(bench(), Cast(Stated(lambda request: "x"), [yes, no, mute]), tmp_path / "a")
    assert values(summary)["shows"] == 0.5 and summary.n_unscored == 0
    summary, rows = run(bench(), Cast(Stated(lambda request: "x"), [mute]), tmp_path / "b")
    assert summary.n_unscored == summary.n == 54 and rows[0].raw == "x" and not summary.estimates
    assert set(summary.unscored_reasons) == {"no verdict could be read: no answer is announced"}


@pytest.mark.parametrize(("reply", "read"), [("<answer>yes</answer>", "yes"), ("No.", "no"), ("Maybe.", None)])
def test_the_rubric_is_read(reply, read):
    assert SHOWS.prompt.slots == {"character", "question", "response"} and SHOWS.parse(SHOWS.reply("no")) == "no"
    if read is None:
        with pytest.raises(Unreadable):
            SHOWS.parse(reply)
    else:
        assert SHOWS.parse(reply) == read


def test_trivial_answers(tmp_path):
    built = bench(limit=None)
    constant, _ = run(built, Cast(Trivial("constant"), [OracleJudge()]), tmp_path / "constant")
    assert values(constant) == {"shows": 0, "default": 0, "robustness": 0}
    by_chance, _ = run(built, Cast(Trivial("random"), [OracleJudge()]), tmp_path / "random")
    low, high = by_chance.estimates["shows"].low, by_chance.estimates["shows"].high
    assert low < len(TRAITS) / len(lx.CHARACTER) < high  # a random trait's phrase is one of the character's by chance
    english = build(CharacterConfig(limit=3), people())
    drawn, _ = run(english, Cast(Trivial("random"), [random_judge(0)]), tmp_path / "english")
    assert drawn.n == 27 and drawn.n_unscored == 0 and 0.2 < values(drawn)["shows"] < 0.8


def test_a_real_lm_gives_the_same_replies_alone_and_beside_others(tmp_path, llama):
    model = persona.load(llama)
    built = build(CharacterConfig(limit=2, max_new_tokens=6), people())
    _, rows = run(built, Cast(model, [random_judge(0)]), tmp_path)
    for sample, row in zip(built.samples(), rows, strict=True):
        draw = character.sampling(built.config, sample.id)
        assert model.respond([Request(sample.messages, sample.persona, draw)])[0].text == row.raw
