"""A Slurm cluster of two nodes on this machine, with daemons, keys and ports of its own."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SBIN = "/usr/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for cred_expire, 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
SlurmdTimeout=5
GresTypes=gpu
NodeName=DEFAULT CPUs=2 Gres=gpu:8
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}]
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Return why no cluster can be started here, "" if one can."""
    lacking = [name for name in NEEDED if shutil.which(name, path=search_path()) is None]
    if lacking:
        return f"no {', '.join(lacking)}; apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd runs jobs only as root"


def search_path() -> str:
    """Return PATH with the folder of the daemons, which users often lack."""
    return f"{os.environ.get('PATH', '')}:{SBIN}"


def free_ports(count: int) -> list[int]:
    """Return ports nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def poll(what: str, true: Callable[[], bool], timeout_s: float = 400) -> None:
    """Wait until ``true()``; fail with ``what`` after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


class LocalSlurm:
    """The daemons, from entering to leaving; a context manager."""

    def __init__(self) -> None:
        """Write the configuration into a folder of its own."""
        # Not below pytest's folders: munge wants its socket reachable by all, and a short path.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o711)
        host = socket.gethostname().partition(".")[0]
        conf = CONF.format(host=host, folder=self.folder, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        for name in ("state", "n1", "n2"):
            (self.folder / name).mkdir()
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env = {
            **clean,
            "PATH": search_path(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "LocalSlurm":
        """Start the daemons and wait until both nodes take jobs."""
        files = [
            f"--{name}={self.folder}/munge.{kind}"
            for name, kind in (
                ("key-file", "key"),
                ("socket", "socket"),
                ("pid-file", "pid"),
                ("log-file", "log"),
                ("seed-file", "seed"),
            )
        ]
        try:
            self._start("munged", "--foreground", "--num-threads=10", *files)
            poll("munged listens", (self.folder / "munge.socket").exists)
            self._start("slurmctld", "-D", "-i")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            poll("both nodes are idle", lambda: self.run("sinfo", "-hN", "-o%T") == ["idle"] * 4)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every job, then every daemon that was started here, and remove the folder."""
        try:
            poll("no job is left", self._cancelled)
        finally:
            for daemon in reversed(self.daemons):
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _cancelled(self) -> bool:
        """Cancel every job, also one that came back, and return whether none is left."""
        jobs = self.run("squeue", "-h", "-o%A")
        for job in jobs:
            self.run("scancel", job)
        return not jobs

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{len(self.daemons)}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.env, stdout=out, stderr=out, start_new_session=True
                )
            )

    def run(self, *command: str, **env: str) -> list[str]:
        """Return the lines a command prints; none if it fails."""
        done = subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout.splitlines() if done.returncode == 0 else []

    def field(self, job: str, name: str) -> str:
        """Return a field of ``scontrol show job``, such as JobState or Restarts."""
        words = " ".join(self.run("scontrol", "show", "job", job)).split()
        return next((w.partition("=")[2] for w in words if w.startswith(f"{name}=")), "")
