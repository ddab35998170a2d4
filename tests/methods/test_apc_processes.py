"""APC's stages on two processes, and killed in the middle of each: the same rows, losses and adapter as one that ran
through."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.fault_server import Answer, FaultServer
from safetensors.torch import load_file
from test_apc_method import RAG, TINY, TRAINER, people, under

from persona import lm
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig
from persona.evaluation.judges.oracle import OracleJudge
from persona.methods.apc import train

sys.path.append(str(Path(__file__).parents[1] / "training"))
from training_toys import in_two

# Queries by a teacher over HTTP, so that every stage there is has work. Checkpoints at every step.
CONFIG = replace(
    TINY, queries="teacher", queries_per_statement=1, max_queries=8, other_responses=2, gap=0.0, natural=3,
    discriminator=replace(TINY.discriminator, held_out=0.2, dev=0.1, batch_size=32, learning_rate=1e-4),
)  # fmt: skip
# Fewer steps than an epoch has: its last one has rows left over, and is filled up to as many for each process.
STEPS = replace(TRAINER, batch_size=2, max_steps=3, save_every=1, log_every=1)
QUESTIONS = ("how is the fair today ?", "what is your pet ?", "do you like old things ?", "what is your job ?",
             "do you like sweet things ?", "what is your street ?", "where is the fair ?")  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return lm.load(lm.ModelConfig(path="town", device="cpu"))


@pytest.fixture(scope="module")
def teacher():
    """Answers by what it is asked, so that everybody who asks the same is told the same."""

    def plan(seen):
        return Answer(text=f'"{QUESTIONS[len(seen.text) % len(QUESTIONS)]}"')

    with FaultServer(plan) as server:
        yield server


def run(base, server, out: Path, config=CONFIG, trainer=STEPS) -> Path:
    endpoint = Endpoint(EndpointConfig(model="judge-7b", base_url=server.url, concurrency=2))
    return train(config, under(base, RAG), people(), trainer, out, teacher=endpoint, judges=[OracleJudge()])


@pytest.fixture(scope="module")
def whole(base, teacher, tmp_path_factory) -> Path:
    return run(base, teacher, tmp_path_factory.mktemp("whole")).parent


EU = replace(CONFIG, mode="experience")
EU_STEPS = replace(STEPS, max_steps=2)  # there are five replies to learn


@pytest.fixture(scope="module")
def uploaded(base, teacher, tmp_path_factory) -> Path:
    return run(base, teacher, tmp_path_factory.mktemp("uploaded"), EU, EU_STEPS).parent


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(out: Path) -> dict[str, list[float]]:
    """By training, the logged losses."""
    found = {}
    for path in sorted((out / "stages").rglob("metrics.jsonl")):
        found[path.parent.relative_to(out / "stages").as_posix()] = [r["loss"] for r in rows(path) if "loss" in r]
    return found


def texts(out: Path, *stages: str) -> dict[str, bytes]:
    """What the stages wrote in text, byte by byte."""
    files = (path for stage in stages for path in (out / "stages" / stage).rglob("*.json*"))
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files if path.name != "metrics.jsonl"}


# ---- two processes -------------------------------------------------------------------------------------------------


@pytest.mark.multi_process
def test_two_processes_make_what_one_makes(whole, base, teacher, tmp_path):
    """gloo; of each step either process has half of the rows. The last steps of the discriminators' epochs, filled up
    with rows of their beginning, are not compared."""
    halved = replace(CONFIG, discriminator=replace(CONFIG.discriminator, batch_size=16))
    assert in_two(lambda: run(base, teacher, tmp_path, halved, replace(STEPS, batch_size=1))) == [0, 0]
    given = ("statements", "queries", "labels")
    assert texts(tmp_path, *given) == texts(whole, *given) and texts(whole, *given)
    one, two = (rows(out / "stages" / "pairs" / "pairs.jsonl") for out in (whole, tmp_path))
    assert [(row["query"], row["chosen"], row["rejected"]) for row in two] == [
        (row["query"], row["chosen"], row["rejected"]) for row in one
    ]
    assert [row["gap"] for row in two] == pytest.approx([row["gap"] for row in one], abs=1e-2)
    one, two = losses(whole), losses(tmp_path)
    assert one.keys() == two.keys() == {"discriminators/relevance", "discriminators/nli", "dpo"}
    assert two.pop("dpo") == pytest.approx(one.pop("dpo"), abs=1e-4)
    for name, logged in one.items():
        assert two[name][:-1] == pytest.approx(logged[:-1], abs=1e-3) and len(logged) > 2, name
    ours, theirs = (load_file(out / "personalizer" / "adapter" / "adapter_model.safetensors")
                    for out in (tmp_path, whole))  # fmt: skip
    assert ours.keys() == theirs.keys()
    # Adam's first step has one size: where a gradient is rounding alone, its sign may differ.
    assert max((ours[name] - theirs[name]).abs().mean() for name in ours) < 5e-5


@pytest.mark.multi_process
def test_experience_is_uploaded_by_two_as_by_one(uploaded, base, teacher, tmp_path):
    assert in_two(lambda: run(base, teacher, tmp_path, EU, replace(EU_STEPS, batch_size=1))) == [0, 0]
    assert losses(tmp_path)["experience"] == pytest.approx(losses(uploaded)["experience"], abs=1e-4)


# ---- killed --------------------------------------------------------------------------------------------------------


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


WORK = ("queries/queries", "labels/relevance", "labels/responses", "labels/inference", "labels/natural",
        "discriminators/relevance", "discriminators/nli", "pairs/replies", "dpo")  # fmt: skip
TRAINED = ("discriminators/relevance", "discriminators/nli", "dpo", "experience")


def in_the_middle_of(what: str, work: Path) -> bool:
    """Some of the rows, or a checkpoint, are on disk."""
    if what in TRAINED:
        return any((work / what).glob("checkpoints/*/*"))
    return any(lines(path) > 2 for path in work.glob(f"{what}.part*.jsonl"))


def killed(stages, out: Path, act) -> list[str]:
    """Run `act` in a process that is killed in the middle of each of `stages`, then let it end. Those it was caught
    in: one that passes unseen on a busy machine leaves the ones after it to be met."""
    caught, left = [], list(stages)
    while True:
        child = os.fork()
        if not child:
            status = 1
            try:
                act()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        ended, status, where = 0, 0, ""
        while left and not ended and not where:
            where = next((stage for stage in left if in_the_middle_of(stage, out / "stages" / "work")), "")
            if not where:
                time.sleep(0.002)
                ended, status = os.waitpid(child, os.WNOHANG)
        if where:
            os.kill(child, signal.SIGKILL)
            caught.append(where)
            left = left[left.index(where) + 1 :]
        code = os.waitstatus_to_exitcode(status if ended else os.waitpid(child, 0)[1])
        assert code == (-signal.SIGKILL if where else 0), where
        if not where:
            return caught


def same_adapters(one: Path, two: Path, stage: str) -> bool:
    name = Path("stages") / stage / "adapter_model.safetensors"
    return (one / name).read_bytes() == (two / name).read_bytes()


def test_killed_in_every_stage_it_ends_as_one_that_ran_through(whole, base, teacher, tmp_path):
    caught = killed(WORK, tmp_path, lambda: run(base, teacher, tmp_path))
    assert len(caught) >= len(WORK) - 2  # on a busy machine a moment may pass unseen
    assert texts(tmp_path, "statements", "queries", "labels", "pairs") == texts(
        whole, "statements", "queries", "labels", "pairs"
    )
    assert losses(tmp_path) == losses(whole) and same_adapters(whole, tmp_path, "dpo")
    for task in ("relevance", "nli"):
        name = Path("stages") / "discriminators" / task / "model.safetensors"
        assert (whole / name).read_bytes() == (tmp_path / name).read_bytes()


def test_killed_while_experience_is_uploaded(uploaded, base, teacher, tmp_path):
    assert killed(("experience",), tmp_path, lambda: run(base, teacher, tmp_path, EU, EU_STEPS)) == ["experience"]
    assert losses(tmp_path) == losses(uploaded) and same_adapters(uploaded, tmp_path, "experience")
