"""A peer's process seen from outside: starting it, asking it, its memory and its time on the cores.

Knows pipes and /proc; does not know what a peer answers. A process that waits for a line uses no core.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from miss.benchmarks.peers.catalogue import Entry

_LAST_WORDS = 20  # seconds
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class PeerError(RuntimeError):
    """A peer that could not be converted, loaded, or asked."""


def _command(entry: Entry, checkpoint: Path, work: Path) -> list[str]:
    return [sys.executable, "-m", "miss.benchmarks.peers.worker", entry.name, str(checkpoint), str(work)]


def _environment(threads: int) -> dict[str, str]:
    """Every library's threads, and nothing looked for on the network."""
    number = str(threads)
    return os.environ | {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "HF_HUB_OFFLINE": "1"}


def convert(entry: Entry, checkpoint: Path, work: Path, calibration: list[Path], threads: int) -> None:
    """Writes what the peer loads, where it is not there yet, in a process that ends with it.

    Raises:
        PeerError: it failed; the end of what it said.
    """
    work.mkdir(parents=True, exist_ok=True)
    done, log = work / f"{entry.name}-converted", work / f"{entry.name}-convert.log"
    if done.exists():
        return
    with log.open("w", encoding="utf-8") as file:
        command = [*_command(entry, checkpoint, work), "--convert", *map(str, calibration)]
        ended = subprocess.run(command, env=_environment(threads), stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if ended.returncode:
        raise PeerError(f"{entry.name}: its conversion failed: {_end(log)}")
    done.touch()


class PeerProcess:
    """A warm peer. A context manager: the process ends with it."""

    def __init__(
        self, entry: Entry, checkpoint: Path, work: Path, threads: int, dynamic: bool = False, device: str = "cpu"
    ) -> None:
        self.entry = entry
        work.mkdir(parents=True, exist_ok=True)
        self._log = work / f"{entry.name}.log"
        command = [*_command(entry, checkpoint, work), "--threads", str(threads), "--device", device]
        command += ["--dynamic"] if dynamic else []
        with self._log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command,
                env=_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        try:
            self.load_seconds = float(self._reply()["loaded"])
        except PeerError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, job: Path, **more: Any) -> dict[str, Any]:
        """One request and its reply.

        Raises:
            PeerError: the peer failed at it, or died.
        """
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps({"do": do, "job": str(job), **more}) + "\n")
            pipe.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise self._ended()
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self.entry.name}: {reply['error']}")
        return reply

    def _ended(self) -> PeerError:
        """Its pipe closes before its last words are written: they are waited for."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS)
        return PeerError(f"{self.entry.name} has ended: {_end(self._log)}")

    def memory(self) -> dict[str, float]:
        """Megabytes: resident now, of that its own (not mapped from files), and the most it ever had."""
        path = Path(f"/proc/{self.pid}/status")
        if not path.exists():
            return {}
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        names = {"resident_mb": "VmRSS", "anonymous_mb": "RssAnon", "peak_mb": "VmHWM"}
        return {ours: round(int(lines[theirs].split()[0]) / 1024, 1) for ours, theirs in names.items()}

    def cpu_seconds(self) -> float:
        """On all cores since it started; 0 where there is no /proc."""
        path = Path(f"/proc/{self.pid}/stat")
        if not path.exists():
            return 0.0
        fields = path.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _end(log: Path) -> str:
    """The last words of a log that are an error's."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"it said nothing ({log})"
