"""Starting the processes of a run, and telling them their back end."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import started

from persona.config import CONFIGS, launch, load_config
from persona.config.launch import LaunchConfig
from persona.errors import UserError

ROOT = CONFIGS.parent
FILES = sorted(path.stem for path in (CONFIGS / "launch").glob("*.yaml"))


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


# ---- the back end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_the_back_end_is_the_one_that_accelerates_launcher_tells_from_the_same_file(name, monkeypatch) -> None:
    """srun with launch=NAME, and accelerate launch --config_file configs/launch/NAME.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "x")  # accelerate changes the environment; put back in the end
    given = ["--config_file", f"configs/launch/{name}.yaml", "--main_process_port", "0", "train.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert isinstance(arguments, argparse.Namespace)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, theirs = prepare_deepspeed_cmd_env(arguments)
        theirs["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ROOT / theirs["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    else:
        theirs = prepare_multi_gpu_env(arguments)
    ours = launch.environment(load_config("train", [f"launch={name}"]).launch)
    assert ours == {key: theirs[key] for key in ours}
    told = {key for key in theirs if key.startswith(("ACCELERATE_USE_", "FSDP_VERSION")) and key not in os.environ}
    assert told <= ours.keys()


def test_another_back_end_than_that_of_accelerates_launcher_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="launch is DEEPSPEED, but accelerate's launcher has started FSDP: name one"):
        launch.take_back_end(load_config("train", ["launch=zero2"]).launch)
    bare = LaunchConfig()
    launch.take_back_end(bare)
    assert (bare.distributed_type, bare.num_processes) == ("FSDP", 8)  # what a run writes about itself


def test_a_missing_file_of_deepspeed_is_one_sentence() -> None:
    cfg = load_config("train", ["launch=zero2", "launch.deepspeed_config.deepspeed_config_file=nowhere.json"])
    with pytest.raises(UserError, match="deepspeed_config_file=nowhere.json: there is no such file"):
        launch.environment(cfg.launch)


# ---- processes -----------------------------------------------------------------------------------------------------


def test_a_run_of_one_process_starts_none(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not launch.wants_processes(LaunchConfig())
    assert launch.wants_processes(LaunchConfig(distributed_type="MULTI_GPU", num_processes=2))
    assert launch.wants_processes(LaunchConfig(distributed_type="DEEPSPEED"))
    monkeypatch.setenv("RANK", "0")
    assert not launch.wants_processes(LaunchConfig(distributed_type="MULTI_GPU", num_processes=2))


def test_every_process_knows_its_place(tmp_path: Path) -> None:
    code = (
        "import os; e = os.environ; open(e['RANK'], 'w').write(' '.join("
        "e[k] for k in ('LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
    )
    two = LaunchConfig(
        num_processes=4, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1", main_process_port=9
    )
    command = python(f"import os; os.chdir({str(tmp_path)!r}); {code}")
    assert launch.start(two, command, cpu=True) == 0
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {"2": "0 4 2 10.0.0.1 9", "3": "1 4 2 10.0.0.1 9"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_processes": 3, "num_machines": 2}, "num_processes=3 has to be a multiple of launch.num_machines=2"),
        ({"num_processes": 4, "num_machines": 2}, "needs launch.main_process_ip and launch.main_process_port"),
    ],
)
def test_a_number_of_processes_that_cannot_be_is_one_sentence(given, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        launch.start(LaunchConfig(**given), python("pass"), cpu=True)


def test_the_first_failure_is_the_status_and_the_others_are_ended(monkeypatch, capfd) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    two = LaunchConfig(num_processes=2)
    hang = "import os, sys, time; sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(60)"
    started = time.monotonic()
    assert launch.start(two, python(hang), cpu=True) == 5
    killed = "import os, sys, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)"
    assert launch.start(two, python(killed), cpu=True) == 137
    assert time.monotonic() - started < 20
    assert capfd.readouterr().err == "error: process 1 was ended by SIGKILL; the others end\n"


LAUNCHER = """
import sys
from persona.config import launch
sys.exit(launch.start(launch.LaunchConfig(num_processes=2), [sys.executable, "-S", "-c", sys.argv[1]], cpu=True))
"""
STOPS = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))
open(f"{FOLDER}/{os.environ['RANK']}", "w").write(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_signals_reach_every_process_and_none_is_left(tmp_path: Path, number: int) -> None:
    """SIGUSR1 goes on to the processes, whose status comes back; SIGKILL cannot, and the kernel ends them."""
    script, folder = tmp_path / "launcher.py", tmp_path / "children"
    script.write_text(LAUNCHER)
    folder.mkdir()
    code = STOPS.replace("{FOLDER}", str(folder))
    parent = started(str(script), [code], None, tmp_path / "out", tmp_path / "err")
    deadline = time.monotonic() + 120
    while len([path for path in folder.iterdir() if path.read_text()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(path.read_text()) for path in folder.iterdir()]
    os.kill(parent.pid, number)
    parent.join(30)
    assert parent.exitcode == (143 if number == signal.SIGUSR1 else -number)
    deadline = time.monotonic() + 10
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) == 2 and not any(alive(child) for child in children)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bf16_is_autocast_under_deepspeed_too(tmp_path: Path, monkeypatch) -> None:
    """Its own bf16 would cast the base LM for good."""
    from persona.training.trainer import TrainerConfig, arguments

    for key, value in launch.environment(load_config("train", ["launch=zero2"]).launch).items():
        monkeypatch.setenv(key, value)
    made = arguments(TrainerConfig(precision="bf16", wandb="disabled", cpu=True), tmp_path, evaluates=False)
    config = made.deepspeed_plugin.deepspeed_config
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert not made.bf16 and config["bf16"]["enabled"] is False
    made = arguments(TrainerConfig(wandb="disabled", cpu=True), tmp_path, evaluates=False)
    assert "torch_autocast" not in made.deepspeed_plugin.deepspeed_config


SMALL = ["method=finetune_lora", "data=town", "data.train=3", "data.dev=1", "data.test=1", "trainer.max_steps=1",
         "trainer.cpu=true", "model.device=cpu", "trainer.wandb=disabled"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("given", "folders", "processes"),
    [
        (["--multirun", "launch=ddp", "launch.num_processes=2", "trainer.seed=1,2"], ["seed=1", "seed=2"], 2),
        (["launch=zero2", "launch.num_processes=1"], [""], 1),
    ],
)
def test_members_of_a_multirun_are_launches_and_deepspeed_is_one_of_one(given, folders, processes, tmp_path) -> None:
    told = [f"output={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep"]
    command = [sys.executable, "train.py", *given, *SMALL, *told]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=400).returncode == 0
    for folder in folders:
        out = tmp_path / "run" / (f"trainer.{folder}" if folder else "")
        assert json.loads((out / "state.json").read_text())["state"] == "done"
        assert json.loads((out / "meta.json").read_text())["hardware"]["processes"] == processes
        assert (out / "personalizer").is_dir()
