"""A Slurm of our own on this machine: munged, slurmctld and one slurmd per node name, in a folder of their own.

    with PrivateSlurm(("a", "b")) as slurm:
        slurm.run("sbatch", "job.sh")

Nothing of an installed Slurm is used but its programs: other ports, another key, another configuration. All "nodes" are
this host. Partition "low" can be preempted, with requeue, by partition "high".
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
INSTALL = "make test-slurm installs them (Debian: apt-get install slurm-wlm munge)"
USER = "root"  # slurmd starts the processes of a job with setuid
CONFIG = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
SlurmdTimeout=10
OverTimeLimit=0
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=2 RealMemory=1000
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes={nodes} PriorityTier=10 MaxTime=INFINITE State=UP PreemptMode=OFF
"""


class PrivateSlurm:
    """Context manager; see the module.

    Args:
        nodes: names of the nodes.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self.nodes = tuple(nodes)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> PrivateSlurm:
        check_programs()
        self.folder = Path(tempfile.mkdtemp(prefix="private-slurm-"))
        self.folder.chmod(0o755)  # munged refuses a folder that others cannot pass through
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(self.nodes))
        for name in ("munge", "state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        nodes, node_ports = ",".join(self.nodes), ",".join(str(port) for port in ports[1:])
        text = CONFIG.format(host=host, ports=ports, folder=self.folder, nodes=nodes, node_ports=node_ports, user=USER)
        (self.folder / "slurm.conf").write_text(text)
        try:
            self._start_all()
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_all()

    @property
    def environment(self) -> Mapping[str, str]:
        """With it, Slurm's commands talk to this Slurm."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**ours, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *words: str) -> str:
        """Standard output of one of Slurm's commands; AssertionError when it fails."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: {"JobState": "RUNNING", ...}."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job_id)))

    def wait_for(self, job_id: str, *states: str, within_s: float = 60.0) -> dict[str, str]:
        """Wait until the job is in one of `states`, and return what is known of it."""
        seen: dict[str, str] = {}

        def is_there() -> bool:
            seen.update(self.job(job_id))
            return seen["JobState"] in states

        wait(is_there, f"job {job_id} in {states}", within_s)
        return seen

    def start_now(self, job_id: str) -> None:
        """Spare a requeued job the two minutes that Slurm lets it wait so that what is left of it can end.

        A slurmstepd that still reports the end of the start before would end the new one, and slurmd refuses a job that
        comes back within the second in which it was killed.
        """
        self.wait_for(job_id, "PENDING")
        wait(lambda: not _steps_of(job_id), f"the steps of job {job_id} to end", 60)
        wait(self._is_ready, "idle nodes", 60)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+3")

    def start_node(self, node: str) -> None:
        self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """As if its power failed: slurmd and all that runs on the node are gone at once, and nobody says so."""
        self._daemons[f"slurmd-{node}"].kill()
        self._daemons.pop(f"slurmd-{node}").wait()
        for pid in self._processes_of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes_of(self, node: str) -> list[int]:
        """What jobs run on a node, and the slurmstepd above each."""
        marks = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.folder / 'slurm.conf'}"}
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if marks <= set((folder / "environ").read_text("utf-8", "replace").split("\0")):
                    found.add(int(folder.name))
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                    if Path("/proc", parent, "cmdline").read_text().startswith("slurmstepd"):
                        found.add(int(parent))
        return sorted(found)

    def _start_all(self) -> None:
        munge = self.folder / "munge"
        self._start(
            "munged", "munged", "--foreground", "--force", "--num-threads=2", f"--key-file={munge / 'key'}",
            f"--socket={munge / 'socket'}", f"--pid-file={munge / 'pid'}", f"--seed-file={munge / 'seed'}",
            f"--log-file={munge / 'log'}",
        )  # fmt: skip
        wait((munge / "socket").exists, "munged", 20)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        wait(self._is_ready, f"idle nodes {self.nodes}", 60)

    def _is_ready(self) -> bool:
        """Does every node that has not been lost wait for work?"""
        words = ["sinfo", "-h", "-N", "-p", "low", "-o", "%T"]
        asked = subprocess.run(words, env=self.environment, capture_output=True, check=False)
        running = sum(name.startswith("slurmd-") for name in self._daemons)
        return asked.stdout.decode().split().count("idle") == running

    def _start(self, name: str, *words: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(words, env=self.environment, stdout=log, stderr=log)

    def _stop_all(self) -> None:
        """Jobs first, so that no process of theirs is left behind."""
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", "--user", USER], env=self.environment, capture_output=True, check=False)
            asked = ["squeue", "-h", "-t", "running,completing"]
            deadline_s = time.monotonic() + 30
            while time.monotonic() < deadline_s:
                if not subprocess.run(asked, env=self.environment, capture_output=True, check=False).stdout:
                    break
                time.sleep(0.5)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def check_programs() -> None:
    """AssertionError that says how to install what is missing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    assert not missing, f"not installed: {', '.join(missing)}; {INSTALL}"
    assert os.geteuid() == 0, "a private Slurm runs as root: its slurmd starts jobs as their users"


def wait(is_done: Callable[[], bool], what: str, within_s: float) -> None:
    """Ask until it is so; AssertionError naming `what` when it does not come."""
    deadline_s = time.monotonic() + within_s
    while not is_done():
        assert time.monotonic() < deadline_s, f"waited {within_s:.0f} s in vain for {what}"
        time.sleep(0.2)


def _steps_of(job_id: str) -> list[str]:
    """The slurmstepd processes of a job, as they call themselves."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(file.read_text("utf-8", "replace"))
    return [words for words in found if words.startswith(f"slurmstepd: [{job_id}.")]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
