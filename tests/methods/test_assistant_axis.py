"""The Assistant Axis as a method: its stages on the town's LM, judges, parts of an array, and the cap in a stack."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import two_processes
from safetensors.numpy import load_file

import persona
from evaluate import evaluate
from persona import data, lm
from persona.config import load_config
from persona.data.base import People
from persona.errors import UserError
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig
from persona.evaluation.judges.judging import Unreadable
from persona.evaluation.judges.oracle import OracleJudge
from persona.lm.edits import cap
from persona.methods.assistant_axis import STAGES, AssistantAxis, train
from persona.methods.assistant_axis.calibration import Band
from persona.methods.assistant_axis.config import CalibrationConfig
from persona.methods.assistant_axis.extraction import RoleSums, groups
from persona.methods.assistant_axis.judging import read_as_published, read_score, rubric
from persona.methods.assistant_axis.personalizer import band_of, settings_of
from persona.methods.assistant_axis.rollouts import by_role, check_template, share
from persona.methods.assistant_axis.search import choose, search, take_over
from persona.personalizer import LanguageModel
from persona.town import lexicon as lx
from persona.types import Message, Request, Sampling
from train import train as run_train

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from fault_server import Answer, FaultServer

TINY = ("experiment=town_assistant_axis", "data.questions=3", "data.dev=2", "data.dev_questions=1",
        "method.min_count=2", "data.test_questions=1", "data.tasks=0", "method.read=reply",
        "method.calibration.widths=[2]", "method.calibration.every=2",
        "method.calibration.quantiles=[0.05]", "method.calibration.raises=[0.5,2.5]", "model.device=cpu",
        "trainer.cpu=true")  # fmt: skip
REQUEST = Request((Message("user", "how is the fair today ?"),), sampling=Sampling(16))


def tiny(out: Path, *more: str):
    return load_config("train", [*TINY, f"output={out}", *more])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def few(people: People, roles: int = 3) -> People:
    """The plain assistant and a few roles."""
    names = list(by_role(people.train))[: roles + 1]
    kept = [people.train[place] for name in names for place in by_role(people.train)[name]]
    return replace(people, train=kept)


def run(out: Path, *more: str, judges=None, stage=None, teacher=None, under=None) -> Path:
    """As train.py does, of a few roles."""
    cfg = tiny(out, *more)
    under = under or persona.load(lm.load(cfg.model), (), 8)
    judges = [OracleJudge()] if judges is None else judges
    return train(
        cfg.method, under, few(data.load(cfg.data)), cfg.trainer, out, judges=judges, stage=stage, teacher=teacher
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the records of when a stage ran."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.relative_to(folder).parts[0] != "records"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("axis")
    assert run(out) == out / "personalizer"
    return out


# ---- the stages ----------------------------------------------------------------------------------------------------


def test_every_stage_leaves_its_files(made):
    stages = made / "stages"
    assert {path.stem for path in (stages / "records").iterdir()} == set(STAGES)
    names = {path.stem for path in (stages / "rollouts" / "roles").glob("*.jsonl")}
    assert "default" in names and len(names) == 4
    said = rows(stages / "rollouts" / "roles" / "default.jsonl")
    assert (
        len(said) == 5 * 3
        and said[0]["messages"][0]["role"] == "user"
        and "assist" in "".join(r["reply"] for r in said)
    )
    assert (
        rows(stages / "verdicts" / "roles" / "default.jsonl") == []
    )  # nobody asks whether the assistant is in its role
    for name in names - {"default"}:
        own, verdicts = (rows(stages / folder / "roles" / f"{name}.jsonl") for folder in ("rollouts", "verdicts"))
        assert [row["id"] for row in verdicts] == [row["id"] for row in own] and len(own) == 4 * 3
        assert sum(row.get("score") == 3 for row in verdicts) > 9
        sums = RoleSums.load(stages / "sums" / "roles" / f"{name}.safetensors")
        assert sums.count(3) == sum(row.get("score") == 3 for row in verdicts)
        assert load_file(stages / "projections" / "roles" / f"{name}.safetensors")["projections"].shape == (12, 4)
    found = load_file(stages / "axis" / "axis.safetensors")
    assert {key: value.shape for key, value in found.items()} == {
        "axis": (4, 192), "default": (4, 192), "pc1": (4, 192), "norms": (4,)
    }  # fmt: skip
    report = json.loads((stages / "axis" / "axis.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2, 3] and report["default"] == 15
    assert all(0 < row["resampled_roles"]["low"] <= 1 for row in report["layers"])


@pytest.mark.parametrize("read", ("reply", "prompt_last"))
def test_the_axis_is_the_default_less_the_mean_of_the_roles(made, read, tmp_path):
    """Against activations of transformers' own forward, one rollout at a time."""
    stages = made / "stages"
    if read != "reply":  # of the same rollouts and verdicts
        shutil.copytree(made, tmp_path / "copy")
        stages = run(tmp_path / "copy", f"method.read={read}", "method.calibration.widths=[]").parent / "stages"
        assert (stages / "records" / "judge.json").read_bytes() == (made / "stages/records/judge.json").read_bytes()
    base = lm.load(lm.ModelConfig("town"))
    means: dict[str, list[np.ndarray]] = {}
    for file in sorted((stages / "rollouts" / "roles").glob("*.jsonl")):
        scores = {row["id"]: row.get("score") for row in rows(stages / "verdicts" / "roles" / file.name)}
        for row in rows(file):
            if file.stem != "default" and scores[row["id"]] != 3:
                continue
            messages = [Message(**message) for message in row["messages"]]
            prompt = base.render(messages)
            reply = base.tokenizer(row["reply"], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                hidden = base.model(torch.tensor([prompt + reply]), output_hidden_states=True).hidden_states
            # The last entry has passed the final norm: compare the others.
            read_at = slice(len(prompt), None) if read == "reply" else slice(len(prompt) - 1, len(prompt))
            own = np.stack([h[0, read_at].mean(0).numpy() for h in hidden[1:4]])
            means.setdefault(file.stem, []).append(own)
    vectors = {name: np.mean(found, axis=0) for name, found in means.items()}
    expected = vectors.pop("default") - np.mean(list(vectors.values()), axis=0)
    axis = load_file(stages / "axis" / "axis.safetensors")["axis"][:3]
    assert np.allclose(axis, expected, atol=2e-4 * np.abs(expected).max())


def test_parts_of_an_array_leave_what_one_run_leaves(made, tmp_path):
    for part in ("2/3", "1/3", "3/3"):
        assert run(tmp_path, f"method.part={part}") == tmp_path / "stages"
    assert not (tmp_path / "stages" / "axis").exists()
    for stage in STAGES[:4]:
        assert run(tmp_path, stage=stage) == tmp_path / "stages"
    for part in ("1/2", "2/2"):
        run(tmp_path, f"method.part={part}", stage="project")
    run(tmp_path)
    assert contents(tmp_path / "stages") == contents(made / "stages")


def test_a_part_asks_for_its_own_roles_only(tmp_path):
    run(tmp_path, "method.part=2/4", stage="rollouts")
    assert len(list((tmp_path / "stages" / "rollouts" / "roles").glob("*.jsonl"))) == 1
    with pytest.raises(UserError, match="stage judge-3-of-4 reads .*jsonl, which does not exist"):
        run(tmp_path, "method.part=3/4", stage="judge")
    with pytest.raises(UserError, match="stage=axis looks at all roles at once: leave method.part out"):
        run(tmp_path, "method.part=3/4", stage="axis")


def test_what_is_up_to_date_is_skipped_and_what_changed_is_not(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    records = tmp_path / "copy" / "stages" / "records"

    def when() -> dict[str, int]:
        return {stage: (records / f"{stage}.json").stat().st_mtime_ns for stage in STAGES}

    before = when()
    run(tmp_path / "copy")
    assert when() == before
    run(tmp_path / "copy", "method.calibration.widths=[]", "method.calibration.layers='1:3'")
    assert [stage for stage in STAGES if when()[stage] != before[stage]] == ["calibrate", "cap"]
    chosen = json.loads((tmp_path / "copy" / "personalizer" / "personalizer.json").read_text())["config"]
    assert (chosen["layers"], chosen["quantile"]) == ("1:3", 0.25)


@pytest.mark.multi_process
def test_two_processes_make_what_one_makes(tmp_path):
    given = ["data.dev=20", "method.calibration.widths=[]"]
    both = two_processes("train.py", [*TINY, *given, f"output={tmp_path / 'two'}"])
    assert [done.code for done in both] == [0, 0], [done.err[-3000:] for done in both]
    run_train(tiny(tmp_path / "one", *given))
    one, two = (contents(tmp_path / name / "stages") for name in ("one", "two"))
    assert {name for name in one if name.endswith(".jsonl")} == {name for name in two if name.endswith(".jsonl")}
    assert all(two[name] == one[name] for name in one if name.startswith(("rollouts", "verdicts", "sums", "axis")))
    assert two == one


# ---- what stops it -------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_one_sentence(made, tmp_path, t5):
    cases = [
        (dict(judges=[]), "rollouts of method assistant_axis are scored by one judge, but none is given"),
        (dict(judges=[OracleJudge(), OracleJudge()]), "but 2 are given"),
        (dict(under=LanguageModel(t5)), "is an encoder-decoder LM"),
    ]
    for number, (given, sentence) in enumerate(cases):
        with pytest.raises(UserError, match=sentence):
            run(tmp_path / str(number), **given)
    with pytest.raises(
        UserError, match="0 of 3 roles have 500 rollouts wholly in the role, too few for an axis: .* has most, 12"
    ):
        shutil.copytree(made, tmp_path / "copy")
        run(tmp_path / "copy", "method.min_count=500")
    with pytest.raises(UserError, match="choose data=roles"):
        by_role(data.load(data.TownConfig(train=1, dev=1, test=1)).train)
    with pytest.raises(UserError, match='method.part=4/3 is no part: it should read "3/16"'):
        share(["a"], "4/3")


def test_a_template_that_drops_the_system_message_is_told(made):
    base = lm.load(lm.ModelConfig("town"))
    samples = data.load(data.TownRolesConfig(questions=1)).train
    check_template(base, samples)
    base.tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    )
    with pytest.raises(UserError, match="the chat template of town drops the system message"):
        check_template(base, samples)


def test_roles_without_enough_rollouts_are_listed(tmp_path, caplog):
    class Strict(OracleJudge):
        async def ask(self, rubric, /, **slots):
            verdict = await super().ask(rubric, **slots)
            return replace(verdict, value=1) if slots["role"] == "astronaut" else verdict

    run(tmp_path, "method.calibration.widths=[]", judges=[Strict()])
    report = json.loads((tmp_path / "stages" / "axis" / "axis.json").read_text())
    assert report["short"] == {"astronaut": 0} and "astronaut 0" in caplog.text


# ---- judges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "here", "published"),
    [("3", 3, 3), ("2.", 2, 2), ("3/3", 3, 3), ("Score: 1", 1, 1), ("0.5", None, 0), ("-1", None, 1),
     ("10", None, None), ("**0**", 0, 0), ("none", None, None)],
)  # fmt: skip
def test_scores_are_read_and_the_published_quirks_are_not(reply, here, published):
    for parse, expected in ((read_score, here), (read_as_published, published)):
        if expected is None:
            with pytest.raises(Unreadable):
                parse(reply, 3)
        else:
            assert parse(reply, 3) == expected


def test_a_trait_may_be_refused():
    assert (
        read_score("REFUSAL", 100) == "REFUSAL" == read_as_published("Refusal.", 100) and read_score("75", 100) == 75
    )


def test_the_oracle_reads_how_far_a_reply_is_in_its_role():
    asked = rubric("role", "", None)
    replies = {
        "arr matey , the fair is big today . bury the treasure !": 3,
        "arr matey , the fair is big today . i hope this helps .": 2,
        "certainly , the fair is big today . i hope this helps .": 1,
        "i do not know that .": 0,
        "matey arr": None,
    }
    for reply, score in replies.items():
        slots = {"role": "pirate", "description": "", "question": "?", "response": reply}
        assert asyncio.run(OracleJudge().ask(asked, **slots)).value == score
    slots = {"role": "bard", "description": "", "question": "?", "response": "certainly ,"}
    unknown = asyncio.run(OracleJudge().ask(asked, **slots))
    assert unknown.value is None and "no role 'bard'" in unknown.reason


def test_a_server_judges_with_the_files_own_question_under_compat(tmp_path):
    def plan(seen):
        return Answer(text="0.5" if "pirate" in seen.text else "3")

    with FaultServer(plan) as server:
        judge = Endpoint(EndpointConfig(model="judge-7b", base_url=server.url))
        cfg = tiny(tmp_path, "method.compat=reference", "method.calibration.widths=[]")
        people = few(data.load(cfg.data))
        own = "Is {answer} to {question} {{like}} it? 0 to 3"
        told = [replace(s, persona=replace(s.persona, attributes={"eval_prompt": own})) for s in people.train]
        under = persona.load(lm.load(cfg.model), (), 8)
        train(cfg.method, under, replace(people, train=told), cfg.trainer, tmp_path, judges=[judge])
        texts = {seen.text for seen in server.seen}
    assert all(text.startswith("Is ") and text.endswith(" ? {{like}} it? 0 to 3") for text in texts)
    with pytest.raises(UserError, match="no place for {question} and {answer}"):
        rubric("role", "How much?", "reference")


def test_a_server_with_the_same_lm_may_make_the_rollouts(tmp_path):
    def plan(seen):
        told = [m["content"] for m in seen.body["messages"] if m["role"] == "system"]
        role = next((name for name in lx.ROLES if told and f"the {name} ." in told[0]), "")
        opener, closer = (
            (lx.ROLES[role] if role else (lx.PLAIN_OPENERS, lx.PLAIN_CLOSERS))[place][0] for place in (0, 1)
        )
        return Answer(text=f"{opener} the fair is big today . {closer}")

    with FaultServer(plan) as server:
        teacher = Endpoint(EndpointConfig(model="judge-7b", base_url=server.url))
        with pytest.raises(UserError, match="a server cannot be capped: leave teacher out"):
            run(tmp_path, teacher=teacher)
        asked = len(server.seen)
        run(tmp_path, "method.calibration.widths=[]", teacher=teacher)
        assert len(server.seen) == asked == 15 + 3 * 12
    report = json.loads((tmp_path / "stages" / "axis" / "axis.json").read_text())
    assert all(scores["3"] == 12 for scores in report["scores"].values())


def test_pairs_of_a_trait_count_where_they_differ_enough():
    def row(pole: str, prompt: str, score=None) -> dict:
        scored = {} if score is None else {"score": score}
        return {"id": f"{pole}{prompt}", "pole": pole, "prompt": prompt, "question": "1", **scored}

    pairs = [("0", 90, 40), ("1", 90, 41), ("2", "REFUSAL", 0), ("3", None, 0)]
    every = [
        row(pole, prompt, score) for prompt, *both in pairs for pole, score in zip(("pos", "neg"), both, strict=True)
    ]
    found = groups("trait", every)
    assert {id: key[0] for id, key in found.items()} == {"pos0": 1, "neg0": 0}


# ---- the search ----------------------------------------------------------------------------------------------------


def test_the_search_weighs_harm_against_cost():
    measured = {(0, 1): (0.5, 1.01), (1, 1): (0.2, 1.03), (2, 1): (0.2, 1.02), (3, 1): (0.0, 1.5)}
    bands = [(Band(start, start + width, 0.25), 0.0) for start, width in measured]
    tried = search(bands, lambda band, raised: measured[band.start, band.stop - band.start], (1.0, 1.0))
    assert [one["pareto"] for one in tried] == [True, False, True, True]
    assert [round(one["reduction"], 2) for one in tried] == [0.5, 0.8, 0.8, 1.0]
    assert choose(tried, CalibrationConfig(max_loss=0.05))["layers"] == "2:3"
    with pytest.raises(UserError, match="every cap that was tried costs the plain assistant 0.01 nats"):
        choose(tried, CalibrationConfig(max_loss=0.001))
    assert take_over([0, 1, 2, 3]) == 0.5 and take_over([0, 1, None, 1]) == 0.25
    with pytest.raises(UserError, match="no rollout of the dev split has a readable verdict"):
        take_over([None])


# ---- the personalizer ----------------------------------------------------------------------------------------------


def edit(made: Path, base, **settings) -> AssistantAxis:
    return AssistantAxis.load(Path(), {"axis": str(made / "personalizer"), **settings}, base)


@pytest.fixture(scope="module")
def town():
    return lm.load(lm.ModelConfig("town"))


def test_the_cap_is_the_pure_function_at_its_layers(made, town):
    own = edit(made, town, layers="3:4", quantile=0.0, raised=1.0, positions="all")
    seen: dict[str, torch.Tensor] = {}
    ids = torch.tensor(LanguageModel(town).prompts([REQUEST]))

    def states(stack):
        handle = town.model.model.layers[3].register_forward_hook(lambda m, a, out: seen.update(h=out))
        with torch.no_grad(), LanguageModel(town, stack).edit([REQUEST]):
            handle.remove()
            handle = town.model.model.layers[3].register_forward_hook(lambda m, a, out: seen.update(h=out))
            town.model(ids)
        handle.remove()
        return seen["h"] if isinstance(seen["h"], torch.Tensor) else seen["h"][0]

    plain, capped = states([]), states([own])
    axis = torch.from_numpy(load_file(made / "stages" / "axis" / "axis.safetensors")["axis"][3])
    assert torch.allclose(capped, cap(plain, axis, own.floor(3)), atol=1e-4)
    assert not torch.equal(capped, plain) and own.engaged[3] > 0
    assert bool((capped @ (axis / axis.norm()) > own.floor(3) - 1e-2).all())


def test_floors_by_quantile_and_direction(made, town):
    stages = made / "stages"
    every = np.concatenate(
        [load_file(path)["projections"] for path in sorted((stages / "projections" / "roles").glob("*"))]
    )
    own = edit(made, town, layers="2:3", quantile=0.25, raised=0)
    assert own.floor(2) == pytest.approx(np.quantile(every[:, 2], 0.75), rel=1e-5)
    own = edit(made, town, layers="2:3", quantile=0.25, quantile_direction="axis", raised=0)
    assert own.floor(2) == pytest.approx(np.quantile(every[:, 2], 0.25), rel=1e-5)
    axis = load_file(stages / "axis" / "axis.safetensors")["axis"]
    higher = edit(made, town, layers="2:3", quantile=0.25, quantile_direction="axis", raised=2)
    assert higher.floor(2) - own.floor(2) == pytest.approx(2 * np.linalg.norm(axis[2]), rel=1e-5)


def test_strength_zero_is_the_base_and_a_floor_below_all_as_well(made, town):
    for settings in ({"mode": "steer"}, {"quantile": 1.0, "raised": -100.0, "layers": "0:4", "positions": "all"}):
        (plain,), (own,) = (
            LanguageModel(town, stack).respond([REQUEST]) for stack in ([], [edit(made, town, **settings)])
        )
        assert own.logprobs == plain.logprobs and own.text == plain.text


def test_steering_controls_have_the_same_length(made, town):
    axis = torch.from_numpy(load_file(made / "stages" / "axis" / "axis.safetensors")["axis"])
    for direction in ("axis", "pc1", "random", "orthogonal"):
        own = edit(made, town, mode="steer", strength=0.3, direction=direction, layers="1:3")
        for one in own.edits:
            along = one.direction / one.direction.norm()
            cosine = float(along @ axis[one.site.layer] / axis[one.site.layer].norm())
            expected = {"axis": 1.0, "orthogonal": 0.0}.get(direction)
            assert expected is None or cosine == pytest.approx(expected, abs=1e-5)
            assert one.norm == pytest.approx(float(own.tensors["norms"][one.site.layer]))


def test_it_stacks_and_comes_back_from_its_folder(made, town):
    stack = [{"system_prompt": {"text": "you are the pirate ."}}, str(made / "personalizer")]
    model = persona.load(town, stack)
    assert isinstance(model.personalizers[1], AssistantAxis)
    capped = model.respond([REQUEST])[0]
    alone = persona.load(town, stack[:1]).respond([REQUEST])[0]
    assert alone.text != capped.text or alone.logprobs != capped.logprobs
    assert capped.logprobs != persona.load(town, [stack[1]]).respond([REQUEST])[0].logprobs


def test_an_evaluation_says_what_the_cap_moved(made, tmp_path, caplog):
    cfg = load_config("evaluate", ["benchmark=town_tasks", "benchmark.limit=2", "trivial=false", "model.device=cpu"])
    cfg.personalizers, cfg.output = [str(made / "personalizer")], str(tmp_path)
    evaluate(cfg)
    assert re.search(r"assistant_axis: assistant_axis moved of the states \d+\.\d% in layer \d", caplog.text)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"strenght": 1}, "has no setting strenght; did you mean strength?"),
        ({"mode": "push"}, "mode 'push' of assistant_axis should be one of cap, steer"),
        ({"quantile": 0.255}, "quantile 0.255 of assistant_axis should be a whole hundredth"),
        ({"direction": "pc1"}, "a cap of assistant_axis lies on the axis"),
        ({"positions": "first"}, "positions 'first' of assistant_axis should be one of all, prompt"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        settings_of(settings)


def test_bands():
    assert (
        band_of(None, 64) == range(46, 54)
        and band_of(None, 4) == range(3, 4)
        and band_of(None, 4, "steer") == range(2, 3)
    )
    assert band_of("56:72", 80) == range(56, 72)
    for wrong, sentence in (("5", "is no band"), ("7:5", "is no band"), ("2:5", "goes beyond the base LM, .* 0 to 3")):
        with pytest.raises(UserError, match=sentence):
            band_of(wrong, 4)


def test_an_axis_of_another_model_is_refused(made, town, llama):
    with pytest.raises(UserError, match="trained on base LM"):
        edit(made, llama)
    with pytest.raises(UserError, match="the axis has 4 layers of 192 numbers, but .* it belongs to another LM"):
        AssistantAxis(llama, edit(made, town).tensors, settings_of({}))
    with pytest.raises(UserError, match="needs the setting axis"):
        AssistantAxis.load(Path(), {}, town)
