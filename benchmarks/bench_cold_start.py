"""A process from nothing to an answer: seconds and peak memory (`python -m miss.benchmarks.bench_cold_start`).

Measures whole processes from outside (wall clock, and the kernel's own account of peak memory), the file cache warm.
`--checkpoint DIR --precision int8` does so for another checkpoint, such as one that `miss quantize` wrote.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

IMAGE = Path(__file__).resolve().parents[1] / "examples" / "chest-xray.jpg"
ANSWER = ["-m", "miss", "answer", "--image", str(IMAGE), "--question", "is there a fracture?", "--json"]
COMMANDS = {"python": ["-c", "pass"], "import miss": ["-c", "import miss"], "import torch": ["-c", "import torch"]}


def measure(argv: list[str]) -> tuple[float, float]:
    """(seconds, peak megabytes) of one process.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    actions = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(sys.executable, [sys.executable, *argv], os.environ, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(argv)} exited with {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--checkpoint", default="miss-small", help="a checkpoint folder, or the name of one that ships")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    commands = COMMANDS | {"miss answer": [*ANSWER, "--checkpoint", args.checkpoint, "--precision", args.precision]}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    count = args.runs
    for round_number in range(count + 1):  # the first round warms the file cache and is not counted
        for name, argv in commands.items():
            result = measure(argv)
            if round_number:
                runs[name].append(result)
    rows = []
    print(f"{'command':<14} {'median s':>9} {'min':>7} {'max':>7} {'peak MB':>8}")
    for name, results in runs.items():
        seconds, memory = [s for s, _ in results], max(m for _, m in results)
        row = {
            "command": name,
            "median_s": round(statistics.median(seconds), 4),
            "min_s": round(min(seconds), 4),
            "max_s": round(max(seconds), 4),
            "peak_mb": round(memory, 1),
        }
        rows.append(row)
        print(f"{name:<14} {row['median_s']:>9} {row['min_s']:>7} {row['max_s']:>7} {row['peak_mb']:>8}")
    environment = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "runs": count,
        "checkpoint": args.checkpoint,
        "precision": args.precision,
    }
    print(json.dumps({"benchmark": "cold_start", "rows": rows, "environment": environment}))


if __name__ == "__main__":
    main()
