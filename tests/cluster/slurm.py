"""A Slurm cluster of two nodes on this machine, from Debian's packages slurm-wlm and munge, for tests and for trying things out.

    python tests/cluster/slurm.py run COMMAND...    # sets it up, runs the command in it, tears it down; exits as the command does
    python tests/cluster/slurm.py up                # sets it up and prints what to put into the environment; does nothing if it is up
    python tests/cluster/slurm.py down              # tears it down; does nothing if nothing is there

Two node daemons (slurmd) and one controller (slurmctld), which trust each other by a munge daemon with a key of its own. Everything lies in
one folder under /tmp and listens on 127.0.0.1; nothing of an installed Slurm is read, nothing is registered with systemd, and `down` leaves
neither a process nor a file. The nodes are called 127.0.0.1 and 127.0.0.2: torchx has the ranks meet at the name of the first node,
so it must be one that resolves. Both are this machine, so each claims --cpus cores and --memory MB whether they are there or not.
There is no accounting (that takes a database): `torchx run` ends with what `sacct` says, after it has submitted; ask squeue and scontrol.
"""

from __future__ import annotations

import argparse
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")
DEFAULT_FOLDER = Path(f"/tmp/fae_slurm_{getpass.getuser()}")
_DAEMONS = (*NODES, "slurmctld", "munged")  # in the order in which they are stopped
_END_S = 10.0


class ClusterError(RuntimeError):
    """The cluster cannot be set up here; the message says what is missing or what the daemons logged."""


class Cluster:
    """The cluster in a folder; what is there is looked up, never remembered.

    Args:
        folder: a path of at most 80 characters outside any folder that others cannot enter: munge checks both. Made by `up`.
        cpus: cores that each node claims.
        memory: megabytes that each node claims.
    """

    def __init__(self, folder: Path = DEFAULT_FOLDER, cpus: int = 2, memory: int = 16_000) -> None:
        if len(str(folder)) > 80:
            raise ClusterError(f"the folder's path must have at most 80 characters, for munge's socket; received {folder}")
        self.folder, self._cpus, self._memory = folder, cpus, memory

    @property
    def environment(self) -> dict[str, str]:
        """What the Slurm commands, and torchx, need in their environment to find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self, timeout_s: float = 30.0) -> None:
        """Starts the daemons and waits until both nodes are idle. A cluster that is up stays as it is; the rest of one is removed first.

        Raises:
            ClusterError: programs are missing, or the nodes were not ready in time; nothing is left then.
        """
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise ClusterError(f"{', '.join(missing)} not found; as root: apt-get install -y slurm-wlm munge")
        if self.is_up():
            return
        self.down()
        self.folder.mkdir(mode=0o755)
        try:
            self._write_files()
            self._start("munged", *(f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "pid", "log", "seed")), self._socket)
            self._start("slurmctld", "-f", f"{self.folder}/slurm.conf")
            for node in NODES:
                self._start("slurmd", "-f", f"{self.folder}/slurm.conf", "-N", node)
            if not _within(timeout_s, self.is_up):
                logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))
                raise ClusterError(f"the nodes were not idle after {timeout_s:.0f} s; the daemons' logs:\n{logs}")
        except BaseException:
            self.down()
            raise

    def is_up(self) -> bool:
        """Whether the controller answers and both nodes wait for work or have some."""
        if not (self.folder / "slurm.conf").is_file() or None in [self._pid(daemon) for daemon in _DAEMONS]:
            return False
        shown = self._slurm("sinfo", "-h", "-N", "-o", "%N %t", check=False)
        states = dict(line.split() for line in shown.splitlines())
        return set(states) == set(NODES) and set(states.values()) <= {"idle", "mix", "alloc", "comp"}

    def down(self) -> None:
        """Cancels the jobs, stops the daemons and removes the folder."""
        if not self.folder.exists():
            return
        if self._pid("slurmctld") and self._slurm("squeue", "-h", check=False):
            self._slurm("scancel", f"--user={getpass.getuser()}", check=False)
            _within(_END_S, lambda: not self._slurm("squeue", "-h", check=False))
        for daemon in _DAEMONS:
            self._end([pid] if (pid := self._pid(daemon)) else [])
        self._end(self._left())
        shutil.rmtree(self.folder)

    def job_states(self, job: str) -> dict[str, str]:
        """The state of each part of a job, such as {"train-0": "RUNNING", "train-1": "RUNNING"}.

        Raises:
            ClusterError: the controller knows no such job.
        """
        shown = self._slurm("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"JobName=(\S+).*?JobState=(\S+)", shown))

    def wait_for(self, job: str, timeout_s: float) -> dict[str, str]:
        """The states in which a job's parts have ended.

        Raises:
            TimeoutError: some part had not.
        """
        if not _within(timeout_s, lambda: not set(self.job_states(job).values()) & {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}):
            raise TimeoutError(f"job {job} had not ended after {timeout_s:.0f} s: {self.job_states(job)}")
        return self.job_states(job)

    @property
    def _socket(self) -> str:
        return f"--socket={self.folder}/munge.socket"

    def _write_files(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        with ExitStack() as opened:  # all at once, so that no port is given twice
            sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(1 + len(NODES))]
            controller, *ports = [found.getsockname()[1] for found in sockets]
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} RealMemory={self._memory}"
            for node, port in zip(NODES, ports, strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            _CONF.format(folder=self.folder, host=host, user=user, controller=controller, nodes=nodes, cpus=self._cpus)
        )

    def _start(self, program: str, *arguments: str) -> None:
        command = [shutil.which(program) or program, *arguments]
        environment = {**os.environ, **self.environment}
        # Daemons leave their standard streams open in between; a pipe would wait for their end.
        with (self.folder / f"{program}.start.log").open("w+") as log:
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=30, check=False)
            log.seek(0)
            if done.returncode:
                raise ClusterError(f"{program} did not start (exit code {done.returncode}): {log.read().strip()}")

    def _slurm(self, *command: str, check: bool = True) -> str:
        if not (self.folder / "slurm.conf").is_file():  # for which Slurm's commands would wait a minute
            raise ClusterError(f"the cluster in {self.folder} is not up; set it up: python tests/cluster/slurm.py up")
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout if done.returncode == 0 else ""

    def _pid(self, daemon: str) -> int | None:
        """The process of a daemon that lives."""
        path = self.folder / ("munge.pid" if daemon == "munged" else f"{daemon}.pid")
        try:
            pid = int(path.read_text())
        except (OSError, ValueError):
            return None
        return pid if _lives(pid) else None

    def _left(self) -> list[int]:
        """Living processes that were started in this cluster: a job's steps and what they started, which Slurm has lost."""
        entry = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                entries = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # ended, or another user's
                continue
            if entry in entries and int(folder.name) not in (os.getpid(), os.getppid()) and _lives(int(folder.name)):
                found.append(int(folder.name))
        return found

    @staticmethod
    def _end(pids: list[int]) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in filter(_lives, pids):
                os.kill(pid, number)
            if _within(_END_S, lambda: not any(map(_lives, pids))):
                return


@contextmanager
def cluster(folder: Path | None = None) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts; by default in a folder of its own, beside any other."""
    made = Cluster(folder or Path(tempfile.mkdtemp(prefix="fae_slurm_", dir="/tmp")))
    try:
        made.up()
        yield made
    finally:
        made.down()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _within(seconds: float, done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


_CONF = """\
ClusterName=fae
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
# No cgroups, which containers lack, and no database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def main(argv: list[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """The command line.

    Returns:
        0, the command's own exit code, or 2 where the cluster cannot be set up.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "up", "down"))
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the cluster lies (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=2, help="cores that each node claims (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=16_000, help="megabytes that each node claims (default: %(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="for run: what is run in it")
    arguments = parser.parse_args(argv)
    if (arguments.verb == "run") != bool(arguments.command):
        parser.error("run takes a command, up and down take none")
    try:
        found = Cluster(arguments.folder, arguments.cpus, arguments.memory)
        if arguments.verb == "up":
            found.up()
            print("\n".join(f"export {name}={value}" for name, value in found.environment.items()))
        elif arguments.verb == "down":
            found.down()
        else:
            try:
                found.up()
                return subprocess.run(arguments.command, env={**environment, **found.environment}, check=False).returncode
            finally:
                found.down()
    except ClusterError as error:
        print(f"slurm.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else `run` would leave the cluster
    sys.exit(main())
