"""A real Slurm of two nodes on this machine, as a context; `python tests/slurm/cluster.py install` gets its packages.

Its daemons are children of the process that starts them, and end with it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
HOST = socket.gethostname().split(".")[0]
NODES = (HOST, f"zz-{HOST}")
"""Two names of this machine. The first is also the address where the processes of a job meet, so it must resolve."""

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MailProg=/bin/true
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=zz-{host} NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class Cluster:
    """Starts on entering, ends on leaving: jobs are cancelled, daemons stopped."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: new; gets the configuration, logs and state.
        """
        self.folder = folder.resolve()
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *command: str, timeout: float = 60) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def _start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        ports = dict(zip(("controller", "first", "second"), free_ports(3), strict=True))
        text = CONFIG.format(folder=self.folder, host=HOST, **ports)
        (self.folder / "slurm.conf").write_text(text)
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "seed", "log")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._wait(lambda: (self.folder / "munge.socket").exists(), 10)
        conf = self.environment["SLURM_CONF"]
        self._daemon("slurmctld", "-D", "-i", "-f", conf)
        for node in NODES:
            self._daemon("slurmd", "-D", "-f", conf, "-N", node)
        self._wait(self._idle, 60)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{Path(command[0]).name}.out").open("ab") as out:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=out, stderr=out, preexec_fn=_end_with_parent)
            )

    def _idle(self) -> bool:
        try:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split()
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return states == ["idle"] * len(NODES)

    def _wait(self, ready: object, seconds: float) -> None:
        assert callable(ready)
        until = time.monotonic() + seconds
        while not ready():
            ended = [daemon for daemon in self.daemons if daemon.poll() is not None]
            if ended or time.monotonic() > until:
                logs = "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.out"))
                raise RuntimeError(f"Slurm does not start ({ended or 'time is up'})\n{logs}")
            time.sleep(0.2)

    def _stop(self) -> None:
        if len(self.daemons) > 1 and all(daemon.poll() is None for daemon in self.daemons):
            try:
                self.run("scancel", "--signal=KILL", "--full", "--user=root")
                self.run("scancel", "--user=root")
                self._wait(lambda: not self.run("squeue", "-h"), 20)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"jobs are left: {error}", file=sys.stderr)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons = []


def missing() -> str | None:
    """Why no cluster can be started here; None: one can."""
    if absent := [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]:
        return f"Slurm is not installed here ({absent[0]} is missing); `make test-slurm` installs it where it can"
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root, which this user is not"
    return None


def install() -> str | None:
    """Debian's packages; why they could not be had, or None."""
    if not [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]:
        return None
    if shutil.which("apt-get") is None:
        return "there is no apt-get here to install Slurm with"
    if os.geteuid() != 0:
        return f"only root can: apt-get install {' '.join(PACKAGES)}"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command)}: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    return None


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""Debian's daemons lie where a user's PATH may not look."""

if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit("usage: cluster.py install")
    if reason := install():
        print(f"Slurm was not installed: {reason}", file=sys.stderr)
