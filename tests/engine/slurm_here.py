"""A Slurm cluster of this one machine, while a test runs: munged, slurmctld and two slurmd in a folder of its own.

Knows Slurm's daemons and commands; does not know what runs under them. Nothing outside the folder is read or written,
so a cluster that the machine belongs to is left alone. Its two nodes have names that this machine answers to.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("srun", "sbatch", "scancel", "scontrol", "squeue")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0,requeue_delay=1
KillWait=30
FirstJobId={first}
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def what_is_missing() -> list[str]:
    """Programs that are not installed here; Debian's daemons lie outside a user's path."""
    return [name for name in DAEMONS + COMMANDS if find(name) is None]


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Cluster:
    """Two nodes of two processors. `run` runs a command of its user; `close` ends the daemons."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        self.nodes = (host, "localhost")
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir()
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        ports, first = [_free_port() for _ in range(3)], os.getpid() % 50000 + 1
        text = CONFIG.format(host=host, user=getpass.getuser(), folder=folder, ports=ports, first=first)
        (folder / "slurm.conf").write_text(text)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment = {**kept, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        names = {name: str(self.folder / f"munge.{name}") for name in ("socket", "key", "pid", "log", "seed")}
        words = [f"--{k}-file={names[k]}" for k in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={names['socket']}", *words)
        _until(lambda: Path(names["socket"]).exists(), self.told)
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node)
        states = ("sinfo", "--Node", "--noheader", "--format=%T")
        _until(lambda: self.run(*states, check=False).split() == ["idle", "idle"], self.told)

    def _daemon(self, name: str, *flags: str) -> None:
        program = find(name)
        assert program is not None
        with open(self.folder / f"{name}.out", "ab") as told:
            command = [program, *flags]
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=told, stderr=told))

    def run(
        self, *command: str, check: bool = True, seconds: float = 120, cwd: Path | None = None, **variables: str
    ) -> str:
        """What a command prints, errors included; `variables` go into its environment."""
        environment = {**self.environment, **variables}
        pipe, errors = subprocess.PIPE, subprocess.STDOUT
        done = subprocess.run(
            command, timeout=seconds, check=False, cwd=cwd, env=environment, stdout=pipe, stderr=errors, text=True
        )
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job, by name."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def told(self) -> str:
        """The ends of what the daemons said."""
        return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in self.folder.glob("*.out"))

    def close(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()


def _until(condition: Callable[[], bool], told: Callable[[], str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
