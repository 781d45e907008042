"""Servers under load as processes: ours and the peers', started, waited for, stopped in between and ended; the client.

Knows commands, ports and signals; does not know what is asked, or what is made of the times. A server that has no turn
is stopped (SIGSTOP), so that its waiting costs the others nothing.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READY_SECONDS = 120.0


class ServerError(RuntimeError):
    """A server or a client that did not start, or ended."""


@dataclass(frozen=True)
class Kind:
    """A server that can be measured. flags: its settings. module: what `python -m` starts. packages: its imports."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    precision: str = "fp32"
    packages: tuple[str, ...] = ()
    ready: str = "/health"
    path: str = "/answer"

    @property
    def ours(self) -> bool:
        return self.module == "miss"

    def missing(self) -> str | None:
        """What to install where it cannot run here; None where it can."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}; pip install 'miss-engine[peers]'" if absent else None

    def command(self, checkpoint: Path, work: Path, port: int, threads: int) -> list[str]:
        start = [sys.executable, "-m", self.module]
        if self.ours:
            start += ["serve", "--checkpoint", str(checkpoint), "--precision", self.precision]
        else:
            start += [str(checkpoint), str(work)]
        own = [] if "--threads" in self.flags else ["--threads", str(threads)]
        return [*start, "--port", str(port), *own, *self.flags]


def ours(precision: str) -> Kind:
    return Kind(f"miss-{precision}", "miss", (), precision, ("fastapi", "uvicorn"), "/ready", "/v1/vqa")


PLAIN = Kind(
    "hf-fastapi", "miss.benchmarks.peers.fastapi_server", ("--at-once", "1"), packages=("transformers", "fastapi")
)
LITSERVE = Kind(
    "litserve",
    "miss.benchmarks.peers.litserve_server",
    ("--batch", "8", "--wait", "0.01"),
    packages=("transformers", "litserve"),
    path="/predict",
)
TRIED: dict[str, list[tuple[str, ...]]] = {  # of which the best is taken where peers are tuned
    "hf-fastapi": [("--at-once", "1"), ("--at-once", "2", "--threads", "1"), ("--at-once", "40")],
    "litserve": [
        ("--batch", "8", "--wait", "0.01"),
        ("--batch", "32", "--wait", "0.05"),
        ("--batch", "16", "--wait", "0.02", "--fast-queue"),
        ("--batch", "8", "--wait", "0.01", "--workers", "2", "--threads", "1"),
    ],
}
PEERS = {kind.name: kind for kind in (PLAIN, LITSERVE)}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Running:
    """A started process and all that it starts. A context manager: all of it ends with it."""

    name: str
    process: "subprocess.Popen[str]"
    log: Path
    target: dict[str, Any] = field(default_factory=dict)

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """A JSON line each way.

        Raises:
            ServerError: it has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ServerError(f"{self.name} has ended: {self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"it said nothing ({self.log})"

    def wait_ready(self, url: str) -> None:
        """
        Raises:
            ServerError: it ended first, or takes too long.
        """
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"{self.name} has ended: {self._last_words()}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                with urllib.request.urlopen(url, timeout=5) as response:
                    if response.status == 200:
                        return
            time.sleep(0.05)
        raise ServerError(f"{self.name} was not ready within {READY_SECONDS:.0f} s: {self._last_words()}")

    def close(self) -> None:
        """SIGTERM to all, and after ten seconds SIGKILL to what is left of them."""
        for sent in (signal.SIGCONT, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what it never read
                    pipe.close()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def spawn(name: str, command: list[str], folder: Path, threads: int) -> Running:
    """A process in a group of its own, its errors in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"serve-{name}.log"
    own = {name: value for name, value in os.environ.items() if name != "MISS_API_KEY"}
    env = {**own, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=file, text=True, env=env, start_new_session=True
        )
    return Running(name, process, log)


def start(kind: Kind, checkpoint: Path, work: Path, threads: int) -> Running:
    """A server that is ready.

    Raises:
        ServerError: it did not get so far.
    """
    port = free_port()
    found = spawn(kind.name, kind.command(checkpoint, work, port, threads), work, threads)
    url = f"http://127.0.0.1:{port}"
    found.target = {"url": url, "path": kind.path, "together": kind.ours, "fields": {}}
    if kind.ours:
        found.target["fields"] = {"alternatives": 0}  # as the peers: the answer alone
    try:
        found.wait_ready(url + kind.ready)
    except BaseException:
        found.close()
        raise
    return found


def client(paths: list[str], questions: list[str], work: Path) -> Running:
    """The process of all clients."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / "serve-pictures.json"
    file.write_text(json.dumps({"paths": paths, "questions": questions}), encoding="utf-8")
    return spawn("client", [sys.executable, "-m", "miss.benchmarks.serve_client", str(file)], work, 1)


def alone(checkpoint: Path, precision: str, work: Path, threads: int) -> Running:
    """The engine without a server."""
    command = [sys.executable, "-m", "miss.benchmarks.peers.engine_alone", str(checkpoint), precision]
    return spawn(f"alone-{precision}", [*command, "--threads", str(threads)], work, threads)
