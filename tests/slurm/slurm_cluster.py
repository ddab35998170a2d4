"""A real Slurm on this machine: one controller and two nodes with a core each, as root, without systemd."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONFIG = """
ClusterName=persona
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5,socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={port1}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
OverTimeLimit=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; "" where there can."""
    wanted = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
    if absent := [name for name in wanted if not shutil.which(name, path=PATH)]:
        return f"Slurm is not installed ({absent[0]} is missing): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "a Slurm of one's own needs root"


PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@dataclass
class Cluster:
    """`environment` is what Slurm's commands and jobs need; jobs see nothing else of the tests' own."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        key = munge / "key"
        self.run("mungekey", "--create", f"--keyfile={key}")
        self.daemon(
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}"),
            *(f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"),
        )
        wait_for(lambda: (munge / "socket").exists(), 10, "munged")
        self.daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for(lambda: self.states() == ["idle", "idle"], 60, f"two idle nodes: {self.states()}")

    def start_node(self, node: str) -> None:
        self.daemon("slurmd", "-D", "-N", node, name=node)

    def daemon(self, *command: str, name: str = "") -> None:
        log = (self.folder / f"{name or command[0]}.out").open("ab")
        self.daemons[name or command[0]] = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def kill_node(self, node: str) -> None:
        """As a node dies: everything at once, and nobody is left to tell the controller."""
        for pid in self.of_node(node):
            os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def of_node(self, node: str) -> list[int]:
        """The node's daemon, then the daemons of job steps, then the processes of jobs on it."""
        found: list[tuple[int, int]] = [(0, self.daemons[node].pid)]
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes()
            except OSError:  # no process, or not any more
                continue
            if f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() not in environment:
                continue
            if command.startswith(b"slurmstepd"):  # of either node: one job runs while a node is killed
                found.append((1, int(entry.name)))
            elif f"SLURMD_NODENAME={node}".encode() in environment:
                found.append((2, int(entry.name)))
        return [pid for _, pid in sorted(found)]

    def stop(self) -> None:
        if "slurmctld" in self.daemons:
            self.run("scancel", "--user=root", check=False)
            time.sleep(1)
        for node in ("n1", "n2"):
            if node in self.daemons:
                for pid in self.of_node(node)[1:]:
                    os.kill(pid, signal.SIGKILL)
        for process in reversed(self.daemons.values()):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    # ---- commands --------------------------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, seconds: float = 60) -> str:
        """The standard output of a command. Raises with its error output when it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=seconds, cwd=cwd)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
        return done.stdout.strip()

    def submit(self, cwd: Path, *arguments: str) -> str:
        """sbatch; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).partition(";")[0]

    def states(self) -> list[str]:
        return self.run("sinfo", "--Node", "--noheader", "--format=%t", check=False).split()

    def job(self, number: str) -> Mapping[str, str]:
        """What `scontrol show job` tells of it."""
        words = self.run("scontrol", "show", "job", number, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 180) -> Mapping[str, str]:
        """Until the job is in one of these states (default: at its end)."""
        ends = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.job(number).get("JobState") in ends, seconds, f"job {number}: {ends}")
        return self.job(number)


def make(folder: Path) -> Cluster:
    ports = free_ports(3)
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=socket.gethostname(), folder=folder, port=ports[0], port1=ports[1], port2=ports[2])
    )
    return Cluster(folder, {"PATH": PATH, "HOME": str(folder), "SLURM_CONF": str(config), "LANG": "C.UTF-8"})


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.3)
