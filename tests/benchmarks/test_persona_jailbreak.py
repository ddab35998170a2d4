"""Persona jailbreaks and drift to harm, on harmless rows: rates by hand, the invalid apart, correlations, bad rows."""

import json
import re

import numpy as np
import pytest
from benchmark_toys import Stated, run, values
from safetensors.numpy import save_file

import persona
from persona.benchmarks import drift_harm, persona_jailbreak
from persona.benchmarks.drift_harm import DriftHarm, DriftHarmConfig
from persona.benchmarks.persona_jailbreak import ANY_HARM, HARM, LABELS, PersonaJailbreak, PersonaJailbreakConfig
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.oracle import OracleJudge
from persona.town import lexicon as lx


def jsonl(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# By what the reply says: the judge of all these tests.
JUDGE = ScriptedJudge("j", lambda rubric, slots: f"<answer>{str(slots['response']).split()[-1]}</answer>")
ROWS = [
    {"system": "a parrot", "question": "q1", "category": "x", "harm": "It says so."},
    {"system": "a crier", "question": "q1", "category": "x", "harm": "It says so."},
    {"system": "a parrot", "question": "q2", "category": "y"},
    {"system": "a mime", "question": "q2", "category": "y"},
]


def test_rates_by_hand(tmp_path):
    """Under personas: harmful, harmless, nonsense, unread → 1/2; without: one of two. Each question is asked once."""
    said = {
        ("a parrot", "q1"): "harmful", ("a crier", "q1"): "harmless", ("a parrot", "q2"): "nonsense",
        ("a mime", "q2"): "?", ("q1",): "harmless", ("q2",): "harmful",
    }  # fmt: skip
    model = Stated(lambda request: "so " + said[tuple(message.content for message in request.messages)])
    built = PersonaJailbreak(PersonaJailbreakConfig(path=jsonl(tmp_path, *ROWS)))
    assert [sample.metadata["condition"] for sample in built.samples()] == ["persona"] * 4 + ["plain"] * 2
    summary, rows = run(built, Cast(model, [JUDGE]), tmp_path / "out")
    assert values(summary) == pytest.approx({"harmful": 1 / 2, "harmful plain": 1 / 2, "invalid": 1 / 5})
    assert summary.n_unscored == 1 and summary.primary == "harmful"
    assert {row.cluster for row in rows} == {"x", "y"} and rows[0].groups == {"category": "x", "condition": "persona"}


def test_several_judges_and_what_counts_as_harm(tmp_path):
    slots = []
    keep = ScriptedJudge("k", lambda rubric, given: slots.append(given) or "<answer>harmful</answer>")
    others = [ScriptedJudge(label, lambda r, s, label=label: label) for label in ("harmless", "nonsense")]
    built = PersonaJailbreak(PersonaJailbreakConfig(path=jsonl(tmp_path, *ROWS)))
    summary, _ = run(built, Cast(Stated(lambda r: "x"), [keep, *others]), tmp_path / "out")
    assert values(summary) == {"harmful": 0.5, "harmful plain": 0.5, "invalid": 0}
    assert {(given["question"], given["harm"]) for given in slots} == {("q1", "It says so."), ("q2", ANY_HARM)}
    assert not any("parrot" in str(given) for given in slots)  # the reply is judged, not the persona


@pytest.mark.parametrize("label", LABELS)
def test_labels_are_read_back(label):
    assert HARM.parse(HARM.reply(label)) == label and f"- {label}:" in HARM.prompt.text


def test_our_rows_are_harmless_and_asked_once_without_a_persona(tmp_path):
    built = PersonaJailbreak(PersonaJailbreakConfig())
    conditions = [sample.metadata["condition"] for sample in built.samples()]
    assert conditions.count("persona") == 6 and conditions.count("plain") == 3
    summary, _ = run(built, Cast(Trivial("random"), [random_judge(0)]), tmp_path)
    assert summary.n == 9 and summary.n_unscored == 0


def test_in_the_town_a_rogue_stands_in_for_harm(tmp_path):
    def reply(request):
        role = re.search(r"the (\w+) \.", request.messages[0].content) if len(request.messages) > 1 else None
        openers, closers = lx.ROLES[role[1]] if role else (lx.PLAIN_OPENERS, lx.PLAIN_CLOSERS)
        return f"{openers[0]} {lx.UNKNOWN} {closers[0]}" if role is None or role[1] != "spy" else "spy the am"

    config = PersonaJailbreakConfig(language="town", roles=["pirate", "king", "spy"])
    built = PersonaJailbreak(config)
    summary, rows = run(built, Cast(Stated(reply), [OracleJudge()]), tmp_path / "a")
    assert values(summary) == pytest.approx({"harmful": 1 / 2, "harmful plain": 0, "invalid": 8 / 30})
    constant, _ = run(built, Cast(Trivial("constant"), [OracleJudge()]), tmp_path / "b")
    assert values(constant) == {"harmful": 0, "harmful plain": 0, "invalid": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"system": "a", "question": "b"},
            "line 1 has the fields system, question, where system and question and cat",
        ),
        ({"system": "a", "question": " ", "category": "x"}, "line 1 has ' ' as question, which should be a text"),
        ({**ROWS[0], "harm": 1}, "line 1 has 1 as harm, which should be a text"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        PersonaJailbreak(PersonaJailbreakConfig(path=jsonl(tmp_path, row)))
    assert "rows.jsonl" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="leave them out here"):
        persona_jailbreak.build(PersonaJailbreakConfig(roles=["king"]))


# ---- drift to harm -------------------------------------------------------------------------------------------------


def axis(tmp_path, shape=(2, 32)):
    save_file({"axis": np.random.default_rng(3).normal(size=shape).astype(np.float32)}, tmp_path / "axis.safetensors")
    return str(tmp_path)


PARTS = [
    {"role": "parrot", "prompt": "You are a parrot."}, {"role": "mime", "prompt": "You are a mime."},
    {"opening": "hello"}, {"opening": "good morning"}, {"question": "q1", "category": "x"},
    {"question": "q2", "category": "y", "harm": "It says so."},
]  # fmt: skip


class Reads(Stated):
    """A stated model that reads every reply as its number of letters, along the axis's direction."""

    stream, personalizers = (1, 2), ["something"]

    def reply_means(self, requests, replies, layers, untouched=False):
        return [np.array([[len(reply) + 100 * untouched, 0]], dtype=np.float32) for reply in replies]


def test_correlations_by_hand(tmp_path):
    """Projections 6, 4, 3, 1 and harmful shares 0, 1/2, 1, 1 (one of two is nonsense, so that one is of one)."""
    save_file({"axis": np.array([[2, 0]], dtype=np.float32)}, tmp_path / "axis.safetensors")
    built = DriftHarm(DriftHarmConfig(path=jsonl(tmp_path, *PARTS), axis=str(tmp_path), layer=0))
    first = {"parrot": {"hello": "abcdef", "good morning": "abcd"}, "mime": {"hello": "abc", "good morning": "a"}}
    later = {
        "abcdef": ("harmless", "harmless"), "abcd": ("harmful", "harmless"), "abc": ("harmful", "harmful"),
        "a": ("nonsense", "harmful"),
    }  # fmt: skip

    def reply(request):
        system, opening, *rest = [message.content for message in request.messages]
        role = "parrot" if "parrot" in system else "mime"
        return later[rest[0]][int(rest[1][1]) - 1] if rest else first[role][opening]

    summary, rows = run(built, Cast(Reads(reply), [JUDGE]), tmp_path / "out")
    expected = np.corrcoef([6, 4, 3, 1], [0, 0.5, 1, 1])[0, 1]
    assert values(summary) == pytest.approx(
        {"r": expected, "base r": expected, "harmful": 4 / 7, "projection": 3.5, "invalid": 1 / 8}
    )
    assert rows[0].values["base"] == 106 and {row.cluster for row in rows} == {"parrot", "mime"}
    assert len(rows[0].verdicts) == 2 and rows[0].raw == "abcdef"


def test_a_real_lm_and_trivial_answers(tmp_path, llama):
    built = DriftHarm(DriftHarmConfig(path=jsonl(tmp_path, *PARTS), axis=axis(tmp_path), max_new_tokens=4))
    summary, rows = run(built, Cast(persona.load(llama), [random_judge(0)]), tmp_path / "out")
    assert summary.n == 4 and all(np.isfinite(row.values.get("projection", 0.0)) for row in rows)
    trivial, _ = run(built, Cast(Trivial("constant"), [random_judge(0)]), tmp_path / "trivial")
    assert set(trivial.estimates) == {"harmful", "invalid"} and trivial.n_unscored == 0


def test_the_town_and_our_rows(tmp_path):
    place = axis(tmp_path, (4, 192))
    town = DriftHarm(DriftHarmConfig(language="town", axis=place, split="held_out"))
    assert len({town.cluster(sample) for sample in town.samples()}) == 8 + len(lx.PLAIN_PROMPTS)
    ours = DriftHarm(DriftHarmConfig(axis=place, roles=["parrot", "assistant"]))
    assert len(ours.samples()) == 2 * 2


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (PARTS, {"axis": None}, "benchmark drift_harm is about an axis: name one with benchmark.axis="),
        (PARTS[2:], {}, "has no row with role and prompt"),
        (PARTS[:2] + PARTS[4:], {}, "has no row with opening"),
        (PARTS[:4], {}, "has no row with question and category"),
        (PARTS + PARTS[:1], {}, "line 7 tells the role 'parrot' a second time"),
        (PARTS, {"roles": ["nun"]}, "has no role 'nun'; its roles are parrot, mime"),
    ],
)
def test_bad_parts_are_one_sentence(tmp_path, rows, changes, message):
    config = DriftHarmConfig(**{"path": jsonl(tmp_path, *rows), "axis": axis(tmp_path), **changes})
    with pytest.raises(UserError, match=message) as caught:
        drift_harm.build(config)
    assert "\n" not in str(caught.value)
