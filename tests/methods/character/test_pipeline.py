"""The stages from a constitution to a personalizer, on the town's LM; what stops them is one sentence; they go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import two_processes

import persona
from persona import data, lm
from persona.config import load_config
from persona.errors import UserError
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig
from persona.methods.character import STAGES, CharacterLoRA, train
from persona.types import Message, Request, Sampling
from train import train as run_train

sys.path.append(str(Path(__file__).parents[2] / "evaluation"))
from fault_server import Answer, FaultServer

TINY = ("experiment=town_character", "debug=tiny", "model.device=cpu", "trainer.cpu=true", "data.limit=8",
        "method.extra_prompts=null", "method.distill.repeats=1", "method.introspect.reflections=1",
        "method.introspect.interactions=1", "method.introspect.turns=2")  # fmt: skip


def tiny(out: Path, *more: str):
    return load_config("train", [*TINY, f"output={out}", *more])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(out: Path, *more: str, teacher=None, stage=None) -> Path:
    """As train.py does, with a teacher of the test's own."""
    cfg = tiny(out, *more)
    under = persona.load(lm.load(cfg.model), (), 8)
    return train(cfg.method, under, data.load(cfg.data), cfg.trainer, out, teacher=teacher, stage=stage)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One whole run by the experiment's command, for two steps in each training."""
    out = tmp_path_factory.mktemp("character")
    assert run_train(tiny(out)) == out / "personalizer"
    return out


def test_the_experiment_leaves_every_artefact(made):
    stages = made / "stages"
    assert {path.stem for path in (stages / "records").iterdir()} == set(STAGES)
    prompts = rows(stages / "prompts.jsonl")
    assert [row["prompt"] for row in prompts] == [s.messages[0].content for s in data.load(tiny(made).data).train]
    assert [row["source"] for row in prompts] == ["trait 1"] * 5 + ["trait 2"] * 3
    answers, pairs, dropped = (rows(stages / f"{name}.jsonl") for name in ("answers", "pairs", "dropped"))
    assert (
        len(answers) == 8 == len(pairs) + len(dropped) and len(pairs) > 4 and all("reason" in row for row in dropped)
    )
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    speech, transcripts = rows(stages / "speech.jsonl"), rows(stages / "transcripts.jsonl")
    assert len(speech) == 10 + 2 and len(transcripts) > 9
    assert transcripts[0]["messages"][0]["role"] == "user" and transcripts[-1]["messages"][0]["role"] == "system"
    for name in ("dpo", "sft"):
        logged = rows(stages / name / "metrics.jsonl")
        assert sum("loss" in row for row in logged) == 2
    assert {"dpo", "nll", "kl"} <= rows(stages / "dpo" / "metrics.jsonl")[0].keys()


def test_the_manifest_says_of_what_and_how_it_was_merged(made):
    manifest = json.loads((made / "personalizer" / "personalizer.json").read_text())
    config = manifest["config"]
    assert manifest["method"] == "character" and config["constitution"] == "town_sunny"
    assert (config["mode"], config["weights"]) == ("cat", [1.0, 0.25])
    assert config["difference"] == config["difference_by_mode"]["cat"] < 1e-5 < config["difference_by_mode"]["linear"]


def test_a_character_is_an_ordinary_peft_adapter(made):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = persona.load("town", [str(made / "personalizer")])
    assert isinstance(model.personalizers[0], CharacterLoRA) and model.personalizers[0].config()["mode"] == "cat"
    request = Request((Message("user", "how is the fair today ?"),), sampling=Sampling(8))
    ids = torch.tensor(model.prompts([request]))
    with torch.no_grad(), model.edit([request]):
        ours = model.base.model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(lm.load.__globals__["SHIPPED"]["town"], dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, made / "personalizer" / "adapter")(ids).logits
        untouched = model.base.model(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(ours, untouched, atol=1e-4)


def test_what_is_up_to_date_is_skipped_and_what_changed_is_not(made):
    def when(stage: str) -> int:
        return (made / "stages" / "records" / f"{stage}.json").stat().st_mtime_ns

    before = {stage: when(stage) for stage in STAGES}
    adapter = (made / "personalizer" / "adapter" / "adapter_model.safetensors").read_bytes()
    run_train(tiny(made, "method.merge=linear"))
    assert [stage for stage in STAGES if when(stage) != before[stage]] == ["merge"]
    assert (made / "personalizer" / "adapter" / "adapter_model.safetensors").read_bytes() != adapter
    run_train(tiny(made))
    assert (made / "personalizer" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.multi_process
def test_two_processes_make_what_one_makes(made, tmp_path):
    both = two_processes("train.py", [*TINY, "trainer.batch_size=1", f"output={tmp_path}"])
    assert [done.code for done in both] == [0, 0], [done.err[-3000:] for done in both]
    for name in ("prompts", "answers", "pairs", "dropped"):
        assert (tmp_path / "stages" / f"{name}.jsonl").read_bytes() == (made / "stages" / f"{name}.jsonl").read_bytes()
    one, two = (
        [row["loss"] for row in rows(out / "stages" / "dpo" / "metrics.jsonl") if "loss" in row]
        for out in (made, tmp_path)
    )
    assert two == pytest.approx(one, rel=1e-5) and len(one) == 2


def test_a_stage_alone(tmp_path):
    with pytest.raises(UserError, match="stage=distill builds on stage expand, but .*: run stage=expand first"):
        run(tmp_path, stage="distill")
    assert run(tmp_path, stage="expand") == tmp_path / "stages"
    assert not (tmp_path / "personalizer").exists() and (tmp_path / "stages" / "prompts.jsonl").is_file()


def test_people_and_stacks_that_do_not_fit_are_one_sentence(tmp_path):
    cfg = tiny(tmp_path)
    under = persona.load(lm.load(cfg.model), ["description"])
    people = data.load(cfg.data)
    with pytest.raises(UserError, match="trained on the base LM itself: leave personalizers"):
        train(cfg.method, under, people, cfg.trainer, tmp_path)
    town = data.load(data.TownConfig(train=1, dev=1, test=1))
    with pytest.raises(UserError, match="trained from a constitution: choose data=constitution"):
        train(cfg.method, persona.load(under.base), town, cfg.trainer, tmp_path)


# ---- a teacher over HTTP -------------------------------------------------------------------------------------------


def endpoint(server: FaultServer) -> Endpoint:
    return Endpoint(EndpointConfig(model="judge-7b", base_url=server.url, retries=0, concurrency=1), backoff=0.01)


def test_no_pair_left_is_one_sentence(tmp_path):
    with FaultServer(lambda seen: Answer(text="no end")) as server:
        with pytest.raises(
            UserError,
            match="no pair of answers is left to train on: all 8 were dropped, most because the teacher's answer does "
            "not end in punctuation",
        ):
            run(tmp_path, teacher=endpoint(server))
    assert not (tmp_path / "stages" / "records" / "distill.json").exists()


def test_a_teacher_that_dies_half_way_is_asked_for_the_rest(tmp_path, caplog):
    more = ("data.limit=15", "method.distill.repeats=2")
    with FaultServer(lambda seen: Answer(text="well .") if len(server.seen) <= 6 else Answer("500")) as server:
        with pytest.raises(UserError, match="is down: 20 questions in a row had no reply"):
            run(tmp_path, *more, teacher=endpoint(server))
        failed = len(server.seen)
        server.plan = lambda seen: Answer(text="well .")
        run(tmp_path, *more, teacher=endpoint(server), stage="distill")
        again = len(server.seen) - failed
    answers = rows(tmp_path / "stages" / "answers.jsonl")
    assert len(answers) == 30 and again == 24 and {row["chosen"] for row in answers} == {"well ."}
    assert [row["id"] for row in answers] == [f"{n}/{k}" for k in range(2) for n in range(1, 16)]


# ---- as published --------------------------------------------------------------------------------------------------


def test_as_published(tmp_path):
    out = run(tmp_path, "method.compat=reference", "method.merge=linear", "method.introspect.turns=4")
    transcripts = {row["id"]: row["messages"] for row in rows(tmp_path / "stages" / "transcripts.jsonl")}
    speech = {row["id"]: row for row in rows(tmp_path / "stages" / "speech.jsonl")}
    messages, said = transcripts["free-0"], speech["free-0"]
    # Four turns: the prompt of the fourth, whose last message, turn 2, is the target.
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "assistant",
    ]
    assert said["turns"][2].endswith(messages[-1]["content"]) and messages[4]["content"] == said["turns"][1]
    assert json.loads((out / "personalizer.json").read_text())["config"]["difference"] > 0.01
