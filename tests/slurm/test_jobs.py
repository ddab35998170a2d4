"""The job scripts on a real Slurm: requeued, cancelled, on two nodes, as arrays and sweeps, beside a server."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, wait_for

from persona.files import read_lines
from persona.lm import scratch
from persona.status import runs

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slurm
# 60 steps of about a tenth of a second, and a checkpoint at the end and when asked to stop.
LONG = (
    *("data=town", "data.train=6", "data.dev=2", "data.test=1", "method=finetune_lora", "method.r=2"),
    *("trainer.epochs=1", "trainer.batch_size=1", "trainer.log_every=1", "trainer.eval_every=1000"),
    *("trainer.save_every=1000", "trainer.cpu=true", "trainer.wandb=disabled", "model.device=cpu"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model directory that knows the town's words; wide enough for a step to take a while."""
    from persona.town.grammar import vocabulary
    from persona.town.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("base")
    return str(scratch.make(folder / "lm", build_tokenizer(vocabulary()), "llama", 128, 4, 4, max_positions=512))


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, base: str):
    """Submits a script of slurm/; its log goes to `log`."""

    def go(script: str, *arguments: str, sbatch: tuple[str, ...] = ()) -> str:
        log = f"--output={tmp_path / 'log'}-%j"
        return cluster.submit(ROOT, *sbatch, log, f"slurm/{script}.sbatch", *arguments)

    return go


def steps(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_lines(folder / "metrics.jsonl") if "loss" in row}


def logs(folder: Path) -> str:
    return "\n".join(file.read_text(errors="replace") for file in sorted(folder.glob("log-*")))


def train_here(base: str, out: Path) -> dict[int, float]:
    """The same training, never interrupted, in this process."""
    from persona.config import load_config
    from train import train

    train(load_config("train", [*LONG, f"model.path={base}", f"output={out}"]))
    return steps(out)


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory) -> dict[int, float]:
    return train_here(base, tmp_path_factory.mktemp("whole"))


def test_a_job_whose_time_is_up_goes_on_where_it_was(cluster, submit, base, whole, tmp_path):
    """USR1 to the batch shell is what --signal=B:USR1@300 sends before the time limit."""
    out = tmp_path / "run"
    job = submit("train", *LONG, f"model.path={base}", f"output={out}")
    wait_for(lambda: len(steps(out)) >= 5, 120, f"a few steps\n{logs(tmp_path)}")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.job(job).get("Restarts") == "1", 60, "a requeue")
    assert list((out / "checkpoints").glob("checkpoint-*"))
    ended = cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", logs(tmp_path)
    assert "the time is up" in logs(tmp_path) and "going on from" in logs(tmp_path)
    assert steps(out) == whole and len(whole) == 60
    assert json.loads((out / "meta.json").read_text())["git"]["sha"]


def test_a_requeued_job_goes_on_where_it_was(cluster, submit, base, whole, tmp_path):
    """As preemption does: Slurm ends the job with SIGTERM and puts it back itself."""
    out = tmp_path / "run"
    job = submit("train", *LONG, f"model.path={base}", f"output={out}")
    wait_for(lambda: len(steps(out)) >= 5, 120, f"a few steps\n{logs(tmp_path)}")
    cluster.run("scontrol", "requeue", job)
    ended = cluster.wait(job, seconds=240)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    assert steps(out) == whole


def test_a_cancelled_job_is_not_put_back_and_leaves_a_checkpoint(cluster, submit, base, tmp_path):
    out = tmp_path / "run"
    job = submit("train", *LONG, f"model.path={base}", f"output={out}")
    wait_for(lambda: len(steps(out)) >= 5, 120, f"a few steps\n{logs(tmp_path)}")
    cluster.run("scancel", job)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert list((out / "checkpoints").glob("checkpoint-*")), logs(tmp_path)
    (run,) = runs(tmp_path)
    assert run.state == "stopped" and "goes on from" in run.message


def test_a_job_outlives_its_node(cluster, submit, base, whole, tmp_path):
    """The node dies without a word; Slurm puts the job back, and it begins anew on the other one."""
    out = tmp_path / "run"
    job = submit("train", *LONG, f"model.path={base}", f"output={out}")
    wait_for(lambda: len(steps(out)) >= 3, 120, f"a few steps\n{logs(tmp_path)}")
    node = cluster.job(job)["NodeList"]
    cluster.kill_node(node)
    try:
        ended = cluster.wait(job, seconds=300)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
        assert ended["NodeList"] != node and steps(out) == whole
    finally:
        cluster.start_node(node)
        wait_for(lambda: cluster.states() == ["idle", "idle"], 60, "both nodes back")


def test_two_nodes_train_together_and_are_put_back_together(cluster, submit, base, tmp_path):
    losses = []
    for number, interrupted in enumerate((False, True)):
        out = tmp_path / f"run{number}"
        job = submit(
            "train", *LONG, f"model.path={base}", f"output={out}", sbatch=("--nodes=2", "--ntasks-per-node=1")
        )
        if interrupted:
            wait_for(lambda out=out: len(steps(out)) >= 5, 180, f"a few steps\n{logs(tmp_path)}")
            cluster.run("scancel", "--batch", "--signal=USR1", job)
        ended = cluster.wait(job, seconds=300)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", str(int(interrupted))), logs(tmp_path)
        assert json.loads((out / "meta.json").read_text())["hardware"]["processes"] == 2
        losses.append(steps(out))
    assert losses[0] == losses[1] and len(losses[0]) == 30  # each takes half of the samples


def test_an_array_runs_every_value_and_one_that_fails_leaves_the_others_alone(cluster, submit, base, tmp_path):
    command = ("--values", "0,x,2", "train.py", *LONG, f"model.path={base}", "trainer.max_steps=2")
    command = (*command, "trainer.seed={}", f"output={tmp_path}/seed_{{}}")
    job = submit("array", *command, sbatch=("--array=0-2",))
    wait_for(lambda: not cluster.run("squeue", "--noheader", "--job", job, check=False), 240, "the array's end")
    assert {run.name: run.state for run in runs(tmp_path)} == {"seed_0": "done", "seed_2": "done"}
    assert "trainer.seed=x" in logs(tmp_path)
    alone = submit("array", *command[:1], "0,1,2", *command[2:], sbatch=("--array=1",))
    assert cluster.wait(alone)["JobState"] == "COMPLETED"
    assert [run.name for run in runs(tmp_path)] == ["seed_0", "seed_1", "seed_2"]


def test_a_part_for_every_task_of_an_array(cluster, submit, tmp_path):
    """Without values {} is k/N; the command itself is refused, in a sentence that shows it."""
    job = submit("array", "train.py", "method.part={}", sbatch=("--array=3-4",))
    wait_for(lambda: not cluster.run("squeue", "--noheader", "--job", job, check=False), 120, "the array's end")
    assert "method.part=1/2" in logs(tmp_path) and "method.part=2/2" in logs(tmp_path)


def test_a_sweep_is_gathered_in_one_table(cluster, base, tmp_path):
    """One member's learning rate makes its loss NaN: it fails alone."""
    sweep = (
        "--multirun",
        "hydra/launcher=slurm",
        "hydra.launcher.cpus_per_task=1",
        f"hydra.sweep.dir={tmp_path}/jobs",
    )
    members = ("trainer.max_steps=4", "trainer.learning_rate=1e-3,1e30", f"output={tmp_path}/sweep")
    done = cluster.run(
        *("bash", "-c", '"$@" || echo "exit $?"', "-", sys.executable, "train.py", *sweep, *LONG),
        *(f"model.path={base}", *members),
        cwd=ROOT,
        seconds=300,
    )
    assert "exit" in done
    good, bad = (f"trainer.learning_rate={value}" for value in ("0.001", "1e+30"))
    found = {run.name: run for run in runs(tmp_path / "sweep")}
    assert {name: run.state for name, run in found.items()} == {good: "done", bad: "failed"}
    assert "loss" in found[good].last and "nan" in found[bad].message


def test_a_server_beside_a_job_is_found_and_stopped_with_it(cluster, submit, tmp_path):
    address, out = tmp_path / "judge.url", tmp_path / "out"
    judged = (
        *(
            "benchmark=personagym",
            "benchmark.limit=1",
            "benchmark.max_new_tokens=8",
            "model.device=cpu",
            "trivial=false",
        ),
        *("judge=endpoint", "judge.endpoint.endpoint.model=judge", f"output={out}"),
        f"judge.endpoint.endpoint.base_url=file:{address}",
    )
    job = submit("evaluate", "--server", str(address), *judged)
    server = cluster.submit(
        ROOT, f"--output={tmp_path / 'log'}-%j", "slurm/serve.sbatch", "--address", str(address), "--beside", job,
        "--", sys.executable, str(Path(__file__).with_name("judge_server.py")), "{port}",
    )  # fmt: skip
    assert cluster.wait(job, seconds=240)["JobState"] == "COMPLETED", logs(tmp_path)
    assert cluster.wait(server, seconds=60)["JobState"] == "COMPLETED", logs(tmp_path)
    assert not address.exists()
    assert list(out.glob("evaluation/personagym/*/summary.json"))


def test_a_server_that_never_answers_is_said_in_a_sentence(cluster, submit, tmp_path):
    job = submit("train", "--server", str(tmp_path / "nobody.url"), "--wait", "1", *LONG)
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "no server wrote its address to" in logs(tmp_path)
    server = submit("serve", "--address", str(tmp_path / "x.url"), "--", "false")
    assert cluster.wait(server)["JobState"] == "FAILED"
    assert "ended with exit status 1 before it answered" in logs(tmp_path)


def test_the_status_of_a_running_job(cluster, submit, base, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    out = tmp_path / "run"
    job = submit("train", *LONG, f"model.path={base}", f"output={out}")
    wait_for(lambda: len(steps(out)) >= 2, 120, f"a few steps\n{logs(tmp_path)}")
    (run,) = runs(tmp_path)
    assert (run.name, run.what, run.state) == ("run", "finetune", "running") and "loss" in run.last
    os.kill(json.loads((out / "state.json").read_text())["pid"], signal.SIGKILL)
    cluster.wait(job)
    wait_for(lambda: not cluster.run("squeue", "--noheader", "--job", job, check=False), 60, "out of the queue")
    (run,) = runs(tmp_path)
    assert run.state == "died"
