"""Entry points, and what a run writes about itself.

if __name__ == "__main__":
    entry(train, "train")        # train(cfg: TrainConfig); tests call train(load_config("train", [...]))
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
import psutil
import torch
import yaml
from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from persona.config import launch
from persona.config.compose import CONFIGS, bind, check_overrides, same_config, unswept
from persona.config.rates import PlanRates
from persona.config.schemas import TrainConfig
from persona.config.together import first_to_say, left_alone, said
from persona.errors import UserError
from persona.files import atomic_write, write_json
from persona.heartbeat import beating
from persona.training.signals import Stopped, stoppable

# ---- entry points --------------------------------------------------------------------------------------------------


# What a disk, and the rights on it, can do to any write of any library: the user's to mend.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def _one_line(error: UserError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} could not be written or read: {error.strerror}"
    return str(error)


@contextmanager
def sentences(everywhere: bool = True, sweep: bool = False) -> Iterator[None]:
    """A UserError becomes one line on stderr and exit status 2, and so does a disk that is full or closed to us
    wherever a library meets it; a stopped training says how to go on (143).

    Of several processes the first to fail says why, and the others end in silence. Not `everywhere`: they have not
    found each other yet, all meet the same error, and rank zero says it. In a `sweep` it stays an error, which Hydra
    keeps until the other members are done; an exit would end them too.
    """
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"[process {rank}] "
    try:
        yield
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and error.errno not in _DISK:
            raise
        sentence = _one_line(error)
        if first_to_say(sentence) if everywhere else rank == "0":
            print(f"{who}error: {sentence}", file=sys.stderr, flush=True)
        if sweep:
            raise
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(f"{who}{stopped.message}", file=sys.stderr, flush=True)
        raise
    except RuntimeError as error:
        if sweep or not left_alone(error):
            raise
        if said() == "":  # it was ended from outside, which whoever started it says
            print(f"{who}ends, as another process of this run has gone", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def entry(function: Callable[[Any], Any], config_name: str) -> None:
    """The body of an entry point: check the command line, let Hydra compose, bind, and call `function(cfg)`, in as
    many processes as `cfg.launch` wants.

    In a multirun every job gets a folder of its own below `output`, named after what is swept over, and starts its
    processes itself.
    """
    with sentences(everywhere=False):
        check_overrides(sys.argv[1:], config_name)
        if alike := unswept(sys.argv[1:]):
            sys.argv.append(f"hydra.job.config.override_dirname.exclude_keys={json.dumps(alike)}")

    @hydra.main(version_base=None, config_path=str(CONFIGS), config_name=config_name)
    def job(cfg: DictConfig) -> None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            with sentences(sweep=sweep):
                bound = bind(cfg)
                if sweep:
                    bound.output = f"{bound.output}/{HydraConfig.get().job.override_dirname.replace('/', '_')}"
                if launch.wants_processes(bound.launch) and not getattr(bound, "plan", False):
                    script = str(inspect.getsourcefile(function))
                    again = sys.argv[1:]
                    if sweep:
                        again = [*same_config(again), *HydraConfig.get().overrides.task, f"output='{bound.output}'"]
                    ended = launch.start(bound.launch, [sys.executable, script, *again], on_cpu(bound))
                    if sweep and 0 < ended < 128:  # not a signal: the others go on
                        raise UserError(f"the processes of {bound.output} ended with status {ended}")
                    if ended:
                        raise SystemExit(ended)
                    return
                if launch.started():
                    launch.take_back_end(bound.launch)
                function(bound)
        finally:
            # A process that ends without this aborts now and then, after all work is done.
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    job()


# ---- what a run writes about itself --------------------------------------------------------------------------------

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "deepspeed", "hydra-core", "numpy")


# What may change between a run and the command that goes on with it: nothing here moves a weight.
RESUMABLE = {
    *("name", "output", "stage", "model.batch_size", "model.device", "model.device_map"),
    *("plan", *(f"plan_rates.{part.name}" for part in fields(PlanRates))),
    *(f"trainer.{key}" for key in ("resume", "wandb", "workers", "keep_checkpoints", "log_every", "cpu")),
    *("trainer.eval_every", "trainer.save_every", "trainer.weights", "trainer.grace_seconds"),
    *("trainer.batch_size", "trainer.gradient_accumulation"),  # their product with the processes has to stay
    *(f"launch.{part.name}" for part in fields(launch.LaunchConfig)),
}


def on_cpu(cfg: Any) -> bool:
    """Whether a run stays on the CPU, by its config or because there is nothing else."""
    return (isinstance(cfg, TrainConfig) and cfg.trainer.cpu) or not torch.cuda.is_available()


def start_processes(cpu: bool = False) -> PartialState:
    """This process's place among those of the launch, and its GPU; to be called before a model is loaded.

    Without a GPU every process that torchrun starts would take itself for the only one unless told that the CPU is
    meant. They wait a day for each other (NCCL would give up after 10 minutes): one may have hours of a stage or an
    evaluation left when the others are done, and when one dies its launcher ends them all.
    """
    cpu = cpu or not torch.cuda.is_available()
    if cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # gloo does without the op that DeepSpeed would compile first, for two minutes.
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def check_same_run(output: Path | str, cfg: TrainConfig) -> None:
    """Before a run goes on from the checkpoints in `output`: they have to be of the same configuration.

    Raises UserError that names what differs. Without checkpoints, or with trainer.resume=false, anything goes.
    """
    path = Path(output) / "config.yaml"
    if not cfg.trainer.resume or not path.is_file() or not any((Path(output) / "checkpoints").glob("checkpoint-*")):
        return
    try:
        there = dict(_flat(yaml.safe_load(path.read_text())))
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read, so it is unknown what its checkpoints are of: delete {output}"
        ) from error
    here = dict(_flat(asdict(cfg)))
    same = (key for key in here if key not in RESUMABLE and ".".join(key.split(".")[:2]) not in RESUMABLE)
    differ = [key for key in same if here[key] != there.get(key)]
    if differ:
        shown = ", ".join(f"{key} ({there.get(key)} there, {here[key]} here)" for key in differ[:5])
        raise UserError(
            f"{output} holds checkpoints of another configuration: {shown}{', …' if len(differ) > 5 else ''}; "
            "give this run another name=…, or trainer.resume=false to start over there"
        )


def _flat(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def save_run_files(output: Path | str, cfg: Any) -> None:
    """`config.yaml` (resolved) and `meta.json` (code, versions, seed, hardware, command) in `output`; rank zero only.

    Nothing of the environment is written. Raises UserError when the folder cannot be written, or as `check_same_run`.
    """
    if isinstance(cfg, TrainConfig):
        check_same_run(output, cfg)
    if os.environ.get("RANK", "0") != "0":
        return
    with atomic_write(Path(output) / "config.yaml") as path:
        path.write_text(yaml.safe_dump(asdict(cfg), sort_keys=False, allow_unicode=True))
    with atomic_write(Path(output) / "meta.json") as path:
        path.write_text(json.dumps(run_meta(cfg), indent=2) + "\n")


@contextmanager
def run_state(output: Path | str) -> Iterator[None]:
    """Around a run: `state.json` in `output` says where it is running, and in the end how it ended. Rank zero writes.

    "running" while it does (also once it has been killed: whoever reads it looks for the process); "done"; "stopped"
    on request (SIGTERM or SIGUSR1), to go on with the same command; "failed", with the error's first line. Meanwhile
    every process says what it is doing (persona/heartbeat.py).
    """
    job = os.environ.get("SLURM_JOB_ID")
    where = {"host": platform.node(), "pid": os.getpid(), **({"slurm_job": job} if job else {})}

    def write(state: str, message: str = "") -> None:
        if os.environ.get("RANK", "0") == "0":
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            write_json(Path(output) / "state.json", {"state": state, "at": now, **where, "message": message})

    with stoppable(output):
        write("running")
        try:
            with beating(output):
                yield
        except Stopped as stopped:
            with suppress(UserError):
                write("stopped", stopped.message)
            raise
        except BaseException as error:
            lines = ((said() if left_alone(error) else "") or str(error)).strip().splitlines()
            kind = "" if isinstance(error, UserError) or left_alone(error) else type(error).__name__
            with suppress(UserError):  # on a full disk: what was raised first is what the user has to know
                write("failed", ": ".join(part for part in (kind, *lines[:1]) if part))
            raise
        write("done")


def run_meta(cfg: Any) -> dict[str, Any]:
    """Code state, versions, seed, hardware and command line of this run, as JSON values."""
    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": _git(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "seed": cfg.trainer.seed if isinstance(cfg, TrainConfig) else cfg.benchmark.seed,
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        },
    }


def _git() -> dict[str, Any]:
    def ask(*arguments: str) -> str | None:
        command = ["git", "-C", str(CONFIGS.parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None  # no git, or no repository

    status = ask("status", "--porcelain")
    return {"sha": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
