"""How many processes a run has and how they share its weights: the `launch` group, whose files are accelerate's too.

    python train.py launch=zero2 launch.num_processes=8 …                    starts the processes itself
    accelerate launch --config_file configs/launch/zero2.yaml train.py …     accelerate's launcher does
    srun / torchrun … train.py launch=zero2 …                                they are there: only the back end is told

In all three the back end reaches the Trainer the way accelerate hands it over, by variables of the environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from persona.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
BACK_ENDS = {"ACCELERATE_USE_DEEPSPEED": "DEEPSPEED", "ACCELERATE_USE_FSDP": "FSDP"}
GRACE_S = 30.0  # for the others, once a process has failed; then for their end after SIGTERM
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class DeepSpeedFile:
    """accelerate's names. A relative path starts at the working directory or else at the repository."""

    deepspeed_config_file: str | None = None
    zero3_init_flag: bool = False  # the base LM is loaded whole and divided afterwards


@dataclass
class FSDPSettings:
    """accelerate's names; all of FSDP2 that there is a reason to set."""

    fsdp_version: int | None = None
    fsdp_auto_wrap_policy: str | None = None
    fsdp_reshard_after_forward: bool | None = None
    fsdp_state_dict_type: str | None = None
    fsdp_cpu_ram_efficient_loading: bool | None = None
    fsdp_offload_params: bool | None = None


@dataclass
class LaunchConfig:
    """accelerate's names. `distributed_type`: NO, MULTI_GPU (data parallel, on CPUs as well), DEEPSPEED or FSDP.

    `num_processes` counts those of all machines. Whoever starts the processes from outside (srun, torchrun) says how
    many there are; of this config only the back end counts then.
    """

    compute_environment: str = "LOCAL_MACHINE"
    distributed_type: str = "NO"
    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None  # null: a free one (of several machines all need the same)
    deepspeed_config: DeepSpeedFile = field(default_factory=DeepSpeedFile)
    fsdp_config: FSDPSettings = field(default_factory=FSDPSettings)


# ---- the back end --------------------------------------------------------------------------------------------------


def environment(launch: LaunchConfig) -> dict[str, str]:
    """The variables by which accelerate's own launcher tells a process its back end; none for data parallel.

    Raises UserError when the DeepSpeed file is not there.
    """
    if launch.distributed_type == "DEEPSPEED":
        given = launch.deepspeed_config.deepspeed_config_file
        if given is None:
            raise UserError("launch.deepspeed_config.deepspeed_config_file has no value: it should name a JSON file")
        path = next((path for path in (Path(given).absolute(), ROOT / given) if path.is_file()), None)
        if path is None:
            raise UserError(f"launch.deepspeed_config.deepspeed_config_file={given}: there is no such file")
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(launch.deepspeed_config.zero3_init_flag).lower(),
        }
    if launch.distributed_type == "FSDP":
        values = {part.name.upper(): getattr(launch.fsdp_config, part.name) for part in fields(launch.fsdp_config)}
        texts = {
            name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in values.items() if v is not None
        }
        return {"ACCELERATE_USE_FSDP": "true", **texts}
    return {}


def take_back_end(launch: LaunchConfig) -> None:
    """In one of the processes of a launch: set what `environment` says, for the Trainer.

    Raises UserError when accelerate's launcher has chosen another back end than `launch`.
    """
    wanted = environment(launch)
    used = [name for name in BACK_ENDS if os.environ.get(name) == "true"]
    if used and wanted and used[0] not in wanted:
        raise UserError(
            f"launch is {launch.distributed_type}, but accelerate's launcher has started {BACK_ENDS[used[0]]}: "
            "name one of the two"
        )
    if used:
        launch.distributed_type = BACK_ENDS[used[0]]
    os.environ.update(wanted)
    launch.num_processes = int(os.environ.get("WORLD_SIZE", "1"))


# ---- processes -----------------------------------------------------------------------------------------------------


def started() -> bool:
    """Whether somebody has started this process as one of several."""
    return "RANK" in os.environ


def wants_processes(launch: LaunchConfig) -> bool:
    """Whether processes have to be started; DeepSpeed and FSDP want a group of processes even where it is one."""
    return not started() and (launch.num_processes > 1 or launch.distributed_type in ("DEEPSPEED", "FSDP"))


def start(launch: LaunchConfig, command: Sequence[str], cpu: bool) -> int:
    """Run `command` once per process of this machine and wait; returns the status of the first that failed, else 0.

    Signals go on to all of them. When one fails the others have half a minute to end by themselves. None outlives
    this process, however it ends. (torchrun would exit with 1 and a traceback of its own whatever the processes said,
    dies of SIGUSR1, and gives half a minute to save.) Raises UserError for a number of processes that cannot be.
    """
    local, odd = divmod(launch.num_processes, launch.num_machines)
    if odd or local < 1:
        raise UserError(
            f"launch.num_processes={launch.num_processes} has to be a multiple of launch.num_machines="
            f"{launch.num_machines}"
        )
    gpus = 0 if cpu else torch.cuda.device_count()
    if gpus and local > gpus:
        raise UserError(
            f"launch.num_processes={launch.num_processes} makes {local} processes on this machine, which has "
            f"{gpus} GPUs: there should be one for each"
        )
    if launch.num_machines > 1 and not (launch.main_process_ip and launch.main_process_port):
        raise UserError(
            f"launch.num_machines={launch.num_machines} needs launch.main_process_ip and launch.main_process_port, "
            "the address of the first machine"
        )
    common = {
        "WORLD_SIZE": str(launch.num_processes),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": launch.main_process_ip or "127.0.0.1",
        "MASTER_PORT": str(launch.main_process_port or _free_port()),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // local))}
    environments = [
        {**threads, **os.environ, **common, "RANK": str(launch.machine_rank * local + i), "LOCAL_RANK": str(i)}
        for i in range(local)
    ]
    before = {number: signal.getsignal(number) for number in FORWARDED}
    children: list[subprocess.Popen] = []

    def forward(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    try:
        for number in FORWARDED:
            signal.signal(number, forward)
        # A group of their own: a terminal's Ctrl-C reaches each of them once, through `forward`.
        children += [
            subprocess.Popen(command, env=env, preexec_fn=_dies_with_parent(), process_group=0) for env in environments
        ]
        return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """Until all have ended; the others of one that failed are ended in the end."""
    first, since, told = 0, 0.0, False
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed and not first:
            first, since = failed[0], time.monotonic()
            if first < 0:
                print(
                    f"error: process {codes.index(first)} was ended by {signal.Signals(-first).name}; the others end",
                    file=sys.stderr,
                    flush=True,
                )
        if None not in codes:
            return 128 - first if first < 0 else first
        if first and time.monotonic() - since > 2 * GRACE_S:
            return 128 - first if first < 0 else first
        if first and not told and time.monotonic() - since > GRACE_S:
            told = True
            for child in children:
                if child.poll() is None:
                    child.terminate()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _dies_with_parent() -> Callable[[], None] | None:
    """What a new process is to do first, so that the kernel ends it with its parent; Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL) and None
