"""A part that is made of several commands: each its own process with its own share of the time, results as they come.

    python -m miss.benchmarks.gpu.jobs kernels --device cuda --out DIR --work DIR --seconds 120

Knows processes and what is said last; does not know which commands there are (work.py). A job that crashes or hangs is
recorded with the end of its log, and the next goes on; one that an earlier run has done is not run again. A job that
can go on (`resume`) is started again behind the case that ended it, and in the next run where its time was over.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.benchmarks import going_on
from miss.benchmarks.gpu import process
from miss.benchmarks.gpu.plan import Plan
from miss.benchmarks.gpu.state import ROOT, write_json

_LEAST = 5.0  # seconds below which no job is begun
_STARTS = 8  # of one job in one run
_UNFINISHED = ("partial", "running")


def last_object(log: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else None
    return None


@dataclass(frozen=True)
class Job:
    """read: what of its output is the result, also where it did not end well. weight: of its share of the time.

    fine: exit codes beside 0 with which it has done all that it should. resume: words added to the command where the
    job was begun before: it goes on then. A result whose `complete` is false is not all: the job is `partial`.
    """

    name: str
    command: Callable[[float], list[str]]  # of the seconds it may take
    weight: float = 1.0
    read: Callable[[str], Any] = last_object
    fine: tuple[int, ...] = ()
    resume: tuple[str, ...] = ()


class Board:
    """The results of all jobs, in a file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["jobs"]
        except (OSError, ValueError, KeyError, TypeError):
            before = {}
        self.jobs: dict[str, dict[str, Any]] = before

    def done(self, name: str) -> bool:
        return self.jobs.get(name, {}).get("status") == "done"

    def begun(self, name: str) -> bool:
        """Whether an earlier run has begun it: one for which no time was left was not."""
        return "exit_code" in self.jobs.get(name, {}) or self.jobs.get(name, {}).get("status") == "running"

    def put(self, name: str, job: dict[str, Any], names: list[str]) -> None:
        with self._lock:
            self.jobs[name] = job
            complete = all(name in self.jobs and self.jobs[name]["status"] not in _UNFINISHED for name in names)
            write_json(self.path, {"complete": complete, "jobs": self.jobs})


def run_all(jobs: list[Job], plan: Plan, board: Board, logs: str, parallel: int = 1) -> list[str]:
    """Runs what is not done yet; the names of those that did not end well. One for which no time was left, or not
    enough, is not among them: the board says `partial`, and the next run begins or goes on with it."""
    deadline, names = time.monotonic() + plan.seconds, [job.name for job in jobs]
    waiting = [job for job in jobs if not board.done(job.name)]
    shares = {job.name: job.weight / sum(other.weight for other in waiting[i:]) for i, job in enumerate(waiting)}
    bad: list[str] = []

    def one(job: Job) -> None:
        left = deadline - time.monotonic()
        if left < _LEAST:
            board.put(job.name, {**board.jobs.get(job.name, {}), "status": "partial", "why": "no time was left"}, names)
            return
        # Jobs that run beside each other have one end; those in a row share what is left.
        limit = left if parallel > 1 else max(_LEAST, min(left, 2 * left * shares[job.name]))
        begun = board.begun(job.name)
        board.put(job.name, {**board.jobs.get(job.name, {}), "status": "running"}, names)
        entry = _run(job, plan, limit, f"{logs}.{job.name}", begun)
        print(f"{job.name}: {entry['status']}, {entry['seconds']:.1f} s", flush=True)
        if entry["status"] not in ("done", "partial"):
            bad.append(job.name)
        board.put(job.name, entry, names)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(one, waiting))
    return bad


def _run(job: Job, plan: Plan, limit: float, name: str, begun: bool) -> dict[str, Any]:
    log = plan.logs / f"{name}.log"
    start = log.stat().st_size if log.exists() else 0

    def command(left: float) -> list[str]:
        nonlocal begun
        words, begun = (job.resume if begun else ()), True
        return [*job.command(max(_LEAST, 0.85 * left)), *words]

    ended, starts = process.until_over(
        command,
        lambda words, left: process.run(words, plan.environment(), ROOT, log, left, _say, nested=True),
        # A signal: a fault in a library's code. Whatever else ends it would end it again.
        lambda code: bool(job.resume) and (code == going_on.AGAIN or code < 0),
        limit,
        _LEAST,
        _STARTS,
    )
    with log.open("rb") as file:
        file.seek(start)
        said = file.read().decode("utf-8", "replace")
    result = job.read(said)
    entry = {"status": _status(job, ended, result), "seconds": round(ended.seconds, 1), "exit_code": ended.code}
    entry |= {"result": result, **({"starts": starts} if starts > 1 else {})}
    return entry if entry["status"] == "done" else {**entry, "limit": round(limit, 1), "tail": process.tail(log)}


def _say(text: str) -> None:
    print(text, flush=True)


def _status(job: Job, ended: process.Ended, result: Any) -> str:
    if ended.hung:
        return "hung"
    if ended.code == going_on.AGAIN and job.resume:  # no time was left for one more start
        return "partial"
    # Python ends with 1 too where it falls over: a result says that the command came to its end.
    well = ended.code == 0 or (ended.code in job.fine and (result is not None or ended.code != 1))
    if not well:
        return "failed"
    return "partial" if isinstance(result, dict) and result.get("complete") is False else "done"


def main() -> int:
    from miss.benchmarks.gpu import work

    parser = argparse.ArgumentParser(description="One part of the suite that is made of several commands.")
    parser.add_argument("part", choices=list(work.PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = Plan(args.device, args.quick, args.out, args.work, args.seconds)
    jobs, parallel = work.PARTS[args.part](plan)
    bad = run_all(jobs, plan, Board(plan.result(args.part)), args.part, parallel)
    if bad:
        print(f"did not end well: {', '.join(bad)}", flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
