"""One part's process: started in a session of its own, watched, and ended with all its children at its limit.

Knows processes, logs and clocks; does not know what a part does.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_GRACE = 3.0  # seconds between asking a part to end and ending it
_LOOK = 0.2
_TELL = 20.0  # seconds between two words about a part that runs
TAIL = 40  # lines


@dataclass(frozen=True)
class Ended:
    """code: the exit status, negative for a signal. hung: it was ended at its limit."""

    code: int
    seconds: float
    hung: bool


def run(
    command: list[str],
    env: dict[str, str],
    cwd: Path,
    log: Path,
    limit: float,
    say: Callable[[str], None],
    nested: bool = False,
) -> Ended:
    """Runs a command to its end, at most `limit` seconds; all it prints goes to `log`.

    nested: the caller is itself such a process: the command stays in its session, in a group of its own, so that it
    ends with the caller.
    """
    start, told = time.monotonic(), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=not nested,
            process_group=0 if nested else None,
        )
    hung = False
    try:
        while process.poll() is None:
            passed = time.monotonic() - start
            if passed > limit:
                hung = True
                break
            if time.monotonic() - told > _TELL:
                told = time.monotonic()
                say(f"  … {passed:.0f} s of at most {limit:.0f}: {last_line(log)}")
            time.sleep(_LOOK)
    finally:
        end(process, nested)
    return Ended(process.returncode, time.monotonic() - start, hung)


def until_over(
    command: Callable[[float], list[str]],
    start: Callable[[list[str], float], Ended],
    again: Callable[[int], bool],
    limit: float,
    least: float,
    most: int,
) -> tuple[Ended, int]:
    """Starts a command (of the seconds that are left) again where `again` says so of its exit code, while at least
    `least` seconds are left, `most` times; how the last ended, all seconds together, and how many were started."""
    begun, passed, starts = time.monotonic(), 0.0, 0
    while True:
        left = limit - passed
        ended, starts = start(command(left), left), starts + 1
        passed = time.monotonic() - begun
        if ended.hung or not again(ended.code) or limit - passed < least or starts == most:
            return Ended(ended.code, passed, ended.hung), starts


def end(process: "subprocess.Popen[bytes]", nested: bool = False) -> None:
    """Ends a process and whatever it has started, politely first."""
    started = members(process.pid, nested)  # while their parents still say so
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    for pid in {*started, *members(process.pid, nested)}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()


def members(leader: int, nested: bool = False) -> list[int]:
    """All processes of a leader's session, itself excepted; of a nested one all that it has started or that are of its
    group (what has left both, ends with the session)."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent, group, session, *_ = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid] = int(parent)
            if state != "Z" and pid != leader and int(group if nested else session) == leader:
                found.append(pid)
    return found if not nested else list({*found, *_below(leader, parents)})


def _below(leader: int, parents: dict[int, int]) -> list[int]:
    """All descendants."""
    children = [pid for pid, parent in parents.items() if parent == leader]
    return children + [pid for child in children for pid in _below(child, parents)]


def last_line(log: Path) -> str:
    lines = [line.strip() for line in tail(log, 5).splitlines() if line.strip()]
    return lines[-1][-100:] if lines else "nothing said yet"


def tail(log: Path, lines: int = TAIL) -> str:
    """The end of a log, at most 8 KB of it."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
