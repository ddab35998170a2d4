"""Drift: whole conversations, projections against stored states, edits seen, simulated users, given transcripts."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_toys import Stated, run, values
from safetensors.numpy import save_file

import persona
from evaluate import evaluate
from persona.benchmarks.drift import SCRIPTED, SIMULATED, DriftConfig, _along, build, turns
from persona.config import load_config
from persona.errors import UserError
from persona.evaluation.episodes import Cast, Trivial
from persona.evaluation.judges.judging import ScriptedJudge, random_judge
from persona.evaluation.judges.oracle import OracleJudge
from persona.evaluation.results import read_curves
from persona.lm.edits import Edit, edited
from persona.lm.residual import Site
from persona.personalizer import LanguageModel, Personalizer
from persona.town import lexicon as lx
from persona.types import Message, Request

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from fault_server import Answer, FaultServer

PLAIN = "certainly , the fair is big today . i hope this helps ."


def jsonl(tmp_path, *rows):
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def axis_file(tmp_path, shape=(2, 32), name="axis.safetensors"):
    drawn = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    save_file({"axis": drawn}, tmp_path / name)
    return str(tmp_path / name), drawn


def given(*turns):
    return {"conversation": [{"role": role, "content": text} for role, text in turns]}


TALK = given(
    ("system", "you are ada"), ("user", "how was your day ?"), ("assistant", "a good day"),
    ("user", "and the rain ?"), ("assistant", "i like long walks in the rain"),
)  # fmt: skip


# ---- conversations -------------------------------------------------------------------------------------------------


def test_the_town_pulls_towards_each_role_and_chats_as_long():
    samples = build(DriftConfig(language="town", axis=None)).samples()
    assert len(samples) == 64 and {sample.task for sample in samples} == {SCRIPTED}
    by_domain = {sample.metadata["domain"]: sample for sample in samples if sample.metadata["role"] == "king"}
    pull = [message.content for message in by_domain["role play"].messages]
    assert len(pull) == len(by_domain["chat"].messages) == 6
    assert "king" in pull[1] and "king" in pull[2] and all(turn.startswith(lx.STAY) for turn in pull[3:])
    assert not any("king" in message.content for message in by_domain["chat"].messages)
    few = build(DriftConfig(language="town", split="held_out", roles=["spy", "king"], turns=3)).samples()
    assert {(s.metadata["role"], len(s.messages)) for s in few} == {("spy", 3)}


def test_who_speaks_turn_by_turn(tmp_path):
    """The model yields from the third turn on when it is drawn to a role, and stays itself in a chat."""

    def reply(request):
        said = [message.content for message in request.messages if message.role == "user"]
        pulled = any(said[-1].startswith(lead.partition(" {")[0]) for lead in (*lx.STAY, *lx.IMAGINE))
        if pulled and len(request.messages) == 5:
            return "zorp the big"
        return "zorp , the fair is big today . my saucer awaits ." if pulled else PLAIN

    built = build(DriftConfig(language="town", roles=["alien", "king"], min_count=2))
    summary, rows = run(built, Cast(Stated(reply), [OracleJudge()]), tmp_path)
    assert values(summary) == pytest.approx({"away": 8 / 24, "away last": 0.5, "unclear": 2 / 24, "unjudged": 0})
    assert summary.primary == "away" and {e.n_clusters for e in summary.estimates.values()} == {2}
    built.write_artifacts(rows, tmp_path)
    curves = {curve.title: curve.points for curve in read_curves(tmp_path)}
    assert [point.value for point in curves["away in role play"].values()] == [0, 0, 1, 1, 1, 1]
    assert [point.value for point in curves["away"].values()] == [0, 0, 0.5, 0.5, 0.5, 0.5]
    assert list(curves["away in chat"]) == [1, 2, 3, 4, 5, 6] and len(curves) == 3
    assert turns(rows, "away", 5) == {}  # four conversations reach each turn
    assert [m["role"] for m in rows[0].transcript] == ["user", "assistant"] * 6


def test_the_history_holds_the_models_own_replies(tmp_path):
    asked = []

    def reply(request):
        asked.append([message.content for message in request.messages])
        return f"reply {len(asked)}"

    path = jsonl(tmp_path, {"domain": "d", "turns": ["one", "two", "three"]})
    run(build(DriftConfig(path=path, turns=2)), Cast(Stated(reply), [random_judge(0)]), tmp_path / "out")
    assert asked == [["one"], ["one", "reply 1", "two"]]


def test_a_simulated_user_sees_the_conversation_from_its_side_and_ends_it(tmp_path):
    seen = []

    def user(request):
        seen.append(request.messages)
        return ["hello", "why ?", "END."][len(seen) - 1]

    path = jsonl(tmp_path, {"domain": "therapy", "persona": "You are a potter.", "topic": "Clay that cracks."})
    built = build(DriftConfig(path=path))
    assert built.needs == ("judge", "user_simulator") and built.samples()[0].task == SIMULATED
    cast = Cast(Stated(lambda request: f"re: {request.messages[-1].content}"), [random_judge(0)], Stated(user))
    _, (row,) = run(built, cast, tmp_path / "out")
    assert [m["content"] for m in row.transcript] == ["hello", "re: hello", "why ?", "re: why ?"]
    assert "You are a potter." in seen[0][0].content and "Clay that cracks." in seen[0][0].content
    assert [(m.role, m.content) for m in seen[2][2:]] == [
        ("assistant", "hello"), ("user", "re: hello"), ("assistant", "why ?"), ("user", "re: why ?"),
    ]  # fmt: skip
    _, (silent,) = run(built, Cast(cast.model, cast.judges, Stated(lambda r: " END ")), tmp_path / "silent")
    assert not silent.values and silent.reason == "the simulated user said nothing"
    _, (long,) = run(built, Cast(cast.model, cast.judges, Stated(lambda r: "go on")), tmp_path / "long")
    assert len(long.transcript) == 2 * 15


def test_a_simulated_user_may_be_a_server(tmp_path):
    """Over HTTP, by the command: the town's LM talks with who is on the other side, and its replies are projected."""
    axis, _ = axis_file(tmp_path, (4, 192))
    path = jsonl(tmp_path, {"domain": "therapy", "persona": "You are a potter.", "topic": "Clay that cracks."})
    said = ["how is the fair today ?", "i met the pirate today .", "END"]

    def user(seen):  # the system prompt and the opening, then two messages a turn
        return Answer(text=said[(len(seen.body["messages"]) - 2) // 2])

    with FaultServer(user, ["user-7b"]) as server:
        evaluate(load_config("evaluate", [
            "benchmark=drift", f"benchmark.path={path}", f"benchmark.axis={axis}", "benchmark.max_new_tokens=16",
            "user_simulator=endpoint", "user_simulator.endpoint.model=user-7b",
            f"user_simulator.endpoint.base_url={server.url}", "trivial=false", "baselines=none", "model.device=cpu",
            f"output={tmp_path / 'out'}",
        ]))  # fmt: skip
        first, last = server.seen[0].body["messages"], server.seen[-1].body["messages"]
    (file,) = (tmp_path / "out").rglob("samples.jsonl")
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    turns = [message["content"] for message in row["transcript"]]
    assert turns[::2] == said[:2] and len(turns) == 4 and all(turns)
    assert "You are a potter." in first[0]["content"] and len(server.seen) == 3
    assert [message["content"] for message in last[2:]] == turns and last[2]["role"] == "assistant"
    assert row["values"]["slope"] == pytest.approx(row["values"]["last"], rel=1e-5)


# ---- projections ---------------------------------------------------------------------------------------------------


def test_projections_are_those_of_stored_states(tmp_path, llama):
    """A given conversation, by hand: tokens of each reply in one forward over all of it, averaged, then projected."""
    path, axis = axis_file(tmp_path)
    built = build(DriftConfig(path=jsonl(tmp_path, TALK), axis=path, layer=0))
    _, (row,) = run(built, persona.load(llama), tmp_path / "out")
    messages = [Message(turn["role"], turn["content"]) for turn in TALK["conversation"]]
    ids = llama.render(messages[:4]) + llama.render_reply(messages[:4], messages[4].content)
    theirs = copy.deepcopy(llama.model)  # transformers leaves hooks of its own in a model once it was asked for states
    with torch.no_grad():
        states = theirs(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
    unit = torch.from_numpy(axis[0] / np.linalg.norm(axis[0]))
    expected = []
    for place in (2, 4):
        start, reply = len(llama.render(messages[:place])), llama.tokenizer(messages[place].content).input_ids
        reply = [token for token in reply if token not in llama.tokenizer.all_special_ids]
        assert ids[start : start + len(reply)] == reply
        expected.append(float(states[start : start + len(reply)].mean(0) @ unit))
    assert [row.values["projection_1"], row.values["projection_2"]] == pytest.approx(expected, abs=1e-4)
    assert row.values["projection"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert [row.values["slope"], row.values["last"]] == pytest.approx([expected[1] - expected[0]] * 2, abs=1e-4)
    assert row.raw == "i like long walks in the rain" and row.groups == {"domain": "given"}


class Shift(Personalizer):
    method = "shift"

    def __init__(self, base, vector):
        self.base, self.vector = base, vector

    def prompt(self, requests):
        return [Request((Message("system", "you are old"), *r.messages), sampling=r.sampling) for r in requests]

    def modules(self, requests):
        return edited(self.base.model, [Edit(Site(1), "add", self.vector)])


def test_the_personalized_model_reads_with_its_doors_open_and_the_base_without(tmp_path, llama):
    path, axis = axis_file(tmp_path)
    vector = torch.from_numpy(axis[1]) * 2
    rows = [{**TALK, "id": "a"}, {"domain": "x", "turns": ["the fox"]}]
    built = build(DriftConfig(path=jsonl(tmp_path, *rows), axis=path, max_new_tokens=5))
    assert built.axis.layer == 1 and built.needs == ()
    shift = Shift(llama, vector)
    _, shifted = run(built, LanguageModel(llama, [shift]), tmp_path / "shifted")
    shift.modules = LanguageModel(llama).edit  # the first door alone
    _, told = run(built, LanguageModel(llama, [shift]), tmp_path / "told")
    _, plain = run(built, LanguageModel(llama), tmp_path / "plain")
    moved = shifted[0].values["projection"] - told[0].values["projection"]
    assert moved == pytest.approx(2 * np.linalg.norm(axis[1]), rel=1e-3)  # at the last layer, along the axis
    assert abs(told[0].values["projection"] - plain[0].values["projection"]) > 1e-3  # the system prompt is read
    assert shifted[0].values["base projection"] == pytest.approx(plain[0].values["projection"], abs=1e-4)
    assert plain[0].values["base projection"] == plain[0].values["projection"]
    assert not any(module._forward_hooks for module in llama.model.modules())


def test_slopes_by_hand():
    found = _along("projection", {1: 4.0, 2: 1.0, 3: float("nan"), 4: 1.0})
    # Turns 1, 2, 4 (mean 7/3) and 4, 1, 1 (mean 2): Σ(t - 7/3)(y - 2) = -4, Σ(t - 7/3)² = 42/9.
    assert found["slope"] == pytest.approx(-4 / (42 / 9)) and found["projection"] == 2 and found["last"] == -3
    assert "projection_3" not in found and found["projection_4"] == 1
    assert _along("base", {1: 2.0}) == {"base_1": 2.0, "base projection": 2.0}
    assert _along("base", {1: float("nan")}) == {}


def test_an_endpoint_and_a_trivial_answer_have_no_activations(tmp_path):
    path, _ = axis_file(tmp_path)
    built = build(DriftConfig(axis=path, limit=2))
    summary, _ = run(built, Trivial("constant"), tmp_path / "constant")
    assert set(summary.unscored_reasons) == {"a constant or random answer has no activations"}
    judged, _ = run(built, Cast(Trivial("random"), [random_judge(0)]), tmp_path / "judged")
    assert judged.n_unscored == 0 and "projection" not in judged.estimates and "away" in judged.estimates

    class Remote:
        name = "remote"

        async def respond(self, request):
            return Stated(lambda r: "x").respond([request])[0]

    with pytest.raises(UserError, match="needs a local model, as remote does not show its activations"):
        run(built, Remote(), tmp_path / "remote")


def test_an_axis_of_another_model_is_one_sentence(tmp_path, llama):
    for shape in ((3, 32), (2, 16)):
        path, _ = axis_file(tmp_path, shape)
        with pytest.raises(UserError, match=r"and the base LM \[2, 32\]: it was made of another model"):
            run(
                build(DriftConfig(axis=path, limit=1, max_new_tokens=4)), persona.load(llama), tmp_path / f"{shape[0]}"
            )


@pytest.mark.parametrize(
    ("tensors", "layer", "message"),
    [
        (None, None, "axis.safetensors could not be read"),
        ({"direction": np.ones((2, 4), np.float32)}, None, "has \\(none\\) as its tensor 'axis', which should be"),
        ({"axis": np.ones(4, np.float32)}, None, "has \\[4\\] as its tensor 'axis'"),
        ({"axis": np.ones((2, 4), np.float32)}, 2, "benchmark.layer=2: .* has layers 0 to 1"),
        ({"axis": np.zeros((2, 4), np.float32)}, None, "has no direction at layer 1"),
        ({"axis": np.full((2, 4), np.nan, np.float32)}, 0, "has no direction at layer 0"),
    ],
)
def test_bad_axes_are_one_sentence(tmp_path, tensors, layer, message):
    if tensors is not None:
        save_file(tensors, tmp_path / "axis.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        build(DriftConfig(axis=str(tmp_path), layer=layer))
    assert "\n" not in str(caught.value)


def test_another_axis_is_another_setting(tmp_path):
    versions = {build(DriftConfig(axis=axis_file(tmp_path)[0], layer=layer)).version for layer in (0, 1, None)}
    save_file({"axis": np.ones((2, 32), np.float32)}, tmp_path / "axis.safetensors")
    versions |= {build(DriftConfig(axis=str(tmp_path))).version, build(DriftConfig()).version}
    assert len(versions) == 4


# ---- files ---------------------------------------------------------------------------------------------------------


def test_transcripts_are_read_as_they_are(tmp_path, llama):
    """The published form: `turns` counts whatever it likes, other keys stand beside it; folders are looked through."""
    (tmp_path / "t" / "deep").mkdir(parents=True)
    bare = {
        "model": "m",
        "turns": 7,
        **given(("user", "hi"), ("assistant", ""), ("user", "the fox"), ("assistant", "a dog")),
    }
    drifted = {"domain": "coding", "persona": "p", "topic": "t", "turns": 2, **TALK}
    (tmp_path / "t" / "deep" / "delusion_capped.json.json").write_text(json.dumps(bare))
    (tmp_path / "t" / "coding.json").write_text(json.dumps(drifted))
    path, _ = axis_file(tmp_path)
    built = build(DriftConfig(path=str(tmp_path / "t"), axis=path, turns=1, min_count=1))
    assert [(s.id, s.metadata["domain"]) for s in built.samples()] == [
        ("coding.json", "coding"), ("deep/delusion_capped.json.json", "delusion_capped"),
    ]  # fmt: skip
    _, rows = run(built, persona.load(llama), tmp_path / "out")
    assert {key for key in rows[0].values if key.startswith("projection_")} == {"projection_1", "projection_2"}
    assert {key for key in rows[1].values if key.startswith("projection_")} == {
        "projection_2"
    }  # an empty reply has none
    one = build(DriftConfig(path=str(tmp_path / "t" / "coding.json"), axis=path))
    assert [sample.id for sample in one.samples()] == ["coding.json"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"domain": "x"},
            "line 1 has the fields domain, where conversation or domain and turns or domain and persona",
        ),
        ({"domain": "x", "turns": []}, "line 1 has \\[\\] as turns, which should be a list of texts"),
        ({"domain": "x", "persona": 3, "topic": "y"}, "line 1 has 3 as persona, which should be a text"),
        ({"conversation": "hello"}, "line 1: turn 1 of the conversation is 'hello', where an object with a role"),
        (
            given(("user", "x"), ("human", "y")),
            "turn 2 of the conversation is .*one of system, user, assistant",
        ),
        ({"conversation": [{"role": "user"}]}, "line 1: turn 1 of the conversation is"),
        ({"conversation": []}, "has no reply of the assistant to read"),
        (given(("assistant", "x"), ("user", "y")), "has no reply of the assistant to read"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        build(DriftConfig(path=jsonl(tmp_path, row)))
    assert "conversations.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_places_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no transcripts"):
        build(DriftConfig(path=str(tmp_path)))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="list.json is no transcript: it should be an object with a 'conversation'"):
        build(DriftConfig(path=str(tmp_path)))
    (tmp_path / "list.json").write_text('{"conversation": [')
    with pytest.raises(UserError, match="list.json is cut off"):
        build(DriftConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="choose among the town's roles: leave them out here"):
        build(DriftConfig(roles=["king"]))


def test_our_sample_and_unreadable_verdicts(tmp_path):
    built = build(DriftConfig())
    assert {s.metadata["domain"] for s in built.samples()} == {"coding", "writing", "therapy", "philosophy"}
    said = iter(range(1000))
    judge = ScriptedJudge("j", lambda r, slots: "<answer>human</answer>" if next(said) % 2 else "?")
    summary, rows = run(built, Cast(Stated(lambda request: "x"), [judge]), tmp_path)
    assert values(summary)["unjudged"] == 0.5 and values(summary)["away"] == 1 and summary.n_unscored == 0
    assert len(rows[0].verdicts) == 4
