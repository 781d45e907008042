"""Starts ranks for `test_rank_faults.py` as fast as a fork: imports once, then for each line of its input forks a
process a rank with the environment that torchrun sets.

    python -m tests.engine.fault_launcher [--disk FOLDER BYTES] [--zero]

A line is `{"case", "world_size", "port", "folder", "arguments"}`. It answers with the ranks' process ids, then a line
for each that ended: `{"rank", "code", "seconds"}`. With --disk a file system of so many bytes is mounted at FOLDER.
"""

import json
import os
import subprocess
import sys
import time
import traceback

from tests.engine import fault_cases


def in_rank(work, rank):
    """One rank, in its own process: the exit code is the command line's, as if Python had ended by itself."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": work["world_size"], "MASTER_PORT": work["port"]}
    os.environ.update({k: str(v) for k, v in places.items()} | {"MASTER_ADDR": "127.0.0.1"})
    for number, name in ((1, "out"), (2, "err")):
        path = os.path.join(work["folder"], f"rank{rank}.{name}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        code = getattr(fault_cases, work["case"])(rank, *work["arguments"]) or 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def main() -> None:
    if "--disk" in sys.argv:
        folder, size = sys.argv[sys.argv.index("--disk") + 1 :][:2]
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    if "--zero" in sys.argv:
        import deepspeed  # noqa: F401
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        work, started, ranks = json.loads(line), time.monotonic(), {}
        for rank in range(work["world_size"]):
            child = os.fork()
            if child == 0:
                in_rank(work, rank)
            ranks[child] = rank
        print(json.dumps(list(ranks)), file=answers, flush=True)
        while ranks:
            child, status = os.wait()
            told = {"rank": ranks.pop(child), "code": os.waitstatus_to_exitcode(status)}
            print(json.dumps({**told, "seconds": time.monotonic() - started}), file=answers, flush=True)


if __name__ == "__main__":
    main()
