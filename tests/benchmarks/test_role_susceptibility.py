"""Role susceptibility: who is asked what, labels by hand, judges that differ or fail, files and settings."""

import json

import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks.axis_shared import LABELS, SPEAKER
from persona.benchmarks.role_susceptibility import RoleSusceptibilityConfig, build
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.oracle import OracleJudge
from persona.evaluation.judges.parsing import Unreadable
from persona.town import lexicon as lx


def file(tmp_path, *rows):
    path = tmp_path / "roles.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def town(**changes):
    return build(RoleSusceptibilityConfig(language="town", **changes))


def judge(name, label):
    return ScriptedJudge(name, lambda rubric, slots: label)


def test_every_role_is_asked_five_questions_under_four_prompts():
    for built, roles in ((build(RoleSusceptibilityConfig()), 4), (town(), 32), (town(split="held_out"), 8)):
        samples = built.samples()
        assert len(samples) == roles * 4 * 5 and len({built.cluster(sample) for sample in samples}) == roles
        assert all([m.role for m in sample.messages] == ["system", "user"] for sample in samples)
    asked = [sample.messages[1].content for sample in town(roles=["king"]).samples()]
    assert lx.WHO in asked and len(set(asked)) == 5
    named = {s.metadata["role"] for s in town(roles=["spy", "king", "alien"], split="held_out").samples()}
    assert named == {"spy", "alien"}
    drawn = [s.id for s in town(limit=7).samples()]
    assert len(drawn) == 7 and drawn == [s.id for s in town().samples() if s.id in drawn]


def test_values_by_hand(tmp_path):
    """The king yields at two of four prompts, the alien at all; one reply in five of the spy's is no sentence."""

    def reply(request):
        system, question = (message.content for message in request.messages)
        if "king" in system and system.startswith(("you", "act")):
            return "my loyal subjects , the fair is big today . kneel before my throne !"
        if "alien" in system:
            return "zorp , the fair is big today . my saucer awaits ."
        if "spy" in system and question == lx.WHO:
            return "spy the am"
        return "certainly , the fair is big today . i hope this helps ."

    summary, rows = run(town(roles=["king", "alien", "spy"]), Cast(Stated(reply), [OracleJudge()]), tmp_path)
    found = values(summary)
    assert found == pytest.approx(
        {"away": (10 + 20 + 4) / 60, "human": 10 / 60, "nonhuman": 1 / 3, "mystical": 0, "unclear": 4 / 60}
    )
    assert summary.primary == "away" and summary.n_unscored == 0
    assert {estimate.n_clusters for estimate in summary.estimates.values()} == {3}
    assert {row.groups["role"] for row in rows} == {"king", "alien", "spy"}


def test_judges_count_alike_and_what_cannot_be_read_is_counted_apart(tmp_path):
    judges = [judge("a", "<answer>assistant</answer>"), judge("b", "So it is human."), judge("c", "Hm.")]
    summary, _ = run(town(roles=["king"]), Cast(Stated(lambda request: "x"), judges), tmp_path / "a")
    assert values(summary)["away"] == values(summary)["human"] == 0.5 and summary.n_unscored == 0
    summary, rows = run(town(roles=["king"]), Cast(Stated(lambda request: "x"), judges[2:]), tmp_path / "b")
    assert summary.n_unscored == summary.n == 20 and not summary.estimates and rows[0].raw == "x"
    summary, _ = run(town(roles=["king"]), Cast(Stated(lambda request: "Hello!"), [OracleJudge()]), tmp_path / "c")
    assert set(summary.unscored_reasons) == {"no verdict could be read: the response is outside the town's language"}


def test_replies_are_drawn_by_the_sample(tmp_path):
    seen = {}
    run(
        town(limit=6),
        Cast(Stated(lambda r: seen.setdefault(r.messages, r.sampling) and "x"), [judge("a", "?")]),
        tmp_path,
    )
    assert len({sampling.seed for sampling in seen.values()}) == 6
    assert {(s.temperature, s.top_p, s.max_new_tokens) for s in seen.values()} == {(0.7, 0.9, 256)}


@pytest.mark.parametrize("label", LABELS)
def test_every_label_is_read_back(label):
    assert SPEAKER.parse(SPEAKER.reply(label)) == SPEAKER.parse(f"It is no thing.\n**Answer: {label}**") == label
    assert f"- {label}:" in SPEAKER.prompt.text and SPEAKER.prompt.slots == {"question", "response"}


@pytest.mark.parametrize("reply", ["", "none of these", "<answer>robot</answer>", "either human or assistant"])
def test_other_replies_are_not_read(reply):
    with pytest.raises(Unreadable):
        SPEAKER.parse(reply)


def test_files_of_ones_own(tmp_path):
    roles = [{"role": "bard", "prompts": ["Be a bard."]}, {"role": "nun", "prompts": ["Be a nun.", "You are a nun."]}]
    assert len(build(RoleSusceptibilityConfig(path=file(tmp_path, *roles))).samples()) == 3 * 5
    own = build(RoleSusceptibilityConfig(path=file(tmp_path, *roles, {"question": "Who?"}), roles=["nun"]))
    assert [[m.content for m in sample.messages] for sample in own.samples()] == [
        ["Be a nun.", "Who?"], ["You are a nun.", "Who?"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([{"question": "Who?"}], "has no row with a role and its prompts"),
        ([{"role": "bard"}], "line 1 has the fields role, where role and prompts or question should be"),
        ([{"role": "bard", "prompts": []}], "line 1 has \\[\\] as prompts, which should be a list of texts"),
        ([{"role": "bard", "prompts": ["x", 3]}], "which should be a list of texts"),
        ([{"role": "", "prompts": ["x"]}], "line 1 has '' as role, which should be a text"),
        ([{"role": "bard", "prompts": ["x"]}] * 2, "line 2 tells the role 'bard' a second time"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        build(RoleSusceptibilityConfig(path=file(tmp_path, *rows)))
    assert "roles.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "de"}, "benchmark.language=de is unknown; it should be one of en, town"),
        ({"language": "town", "roles": ["bard"]}, "the town has no role 'bard'; its roles are blacksmith"),
        ({"language": "town", "split": "some"}, "benchmark.split=some is unknown"),
        ({"roles": ["bard"]}, "has no role 'bard'; its roles are proofreader"),
        ({"split": "held_out"}, "benchmark.split=held_out is of the town's roles"),
        ({"path": "nowhere.jsonl"}, "nowhere.jsonl could not be read"),
    ],
)
def test_bad_settings_are_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        build(RoleSusceptibilityConfig(**changes))


def test_trivial_answers(tmp_path):
    constant, _ = run(town(), Cast(Trivial("constant"), [OracleJudge()]), tmp_path / "constant")
    assert values(constant)["away"] == 0 and constant.n_unscored == 0
    chance, _ = run(town(), Cast(Trivial("random"), [OracleJudge()]), tmp_path / "random")
    assert chance.estimates["away"].low < 32 / 33 < chance.estimates["away"].high
    english, _ = run(build(RoleSusceptibilityConfig()), Cast(Trivial("random"), [random_judge(0)]), tmp_path / "en")
    assert english.n == 80 and 0.7 < values(english)["away"] < 1  # six of seven labels
