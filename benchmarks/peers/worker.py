"""The process of one peer: converts, or loads and then answers what it is asked, a JSON line each way.

    python -m miss.benchmarks.peers.worker openvino-int8 CHECKPOINT WORK --threads 2
    python -m miss.benchmarks.peers.worker openvino-int8 CHECKPOINT WORK --convert JOB.npz …

Knows the protocol; does not know who asks. Requests (on standard input) and what comes back on standard output:
  {"do": "prepare", "job": FILE}               {}
  {"do": "run", "job": FILE, "stamp": N|null}  {"tokens": [[…]], "seconds": {…, "total": …}}
  {"do": "first", "job": FILE}                 {"ids": [[…]], "logprobs": [[…]]}
A first line {"loaded": seconds} says that it is there; {"error": text} stands for an answer that failed. Whatever a
library prints goes to standard error.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from miss.benchmarks.peers.catalogue import ENTRIES
from miss.benchmarks.peers.job import Job, Peer


class Worker:
    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._jobs: dict[str, Job] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        job = self._job(request["job"])
        if request["do"] == "prepare":
            self.peer.prepare(job)
            return {}
        if request["do"] == "first":
            ids, logprobs = self.peer.first(job)
            return {"ids": ids.tolist(), "logprobs": logprobs.tolist()}
        if request.get("stamp") is not None:
            job = job.stamped(request["stamp"])
        start = time.perf_counter()
        output = self.peer.run(job)
        total = time.perf_counter() - start
        return {"tokens": output.tokens, "seconds": output.seconds | {"total": total}}

    def _job(self, path: str) -> Job:
        if path not in self._jobs:
            self._jobs = {path: Job.load(Path(path))}  # the last one alone: memory is the peer's
        return self._jobs[path]


def serve(worker: Worker, requests: TextIO, replies: TextIO) -> None:
    for line in requests:
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:  # whatever a peer raises: it is told, and the peer's row is left out
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="The process of one peer.")
    parser.add_argument("name", choices=list(ENTRIES))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dynamic", action="store_true", help="every job may have other shapes")
    parser.add_argument("--convert", type=Path, nargs="*", help="only write what loading reads; calibrate on these")
    args = parser.parse_args()
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        entry = ENTRIES[args.name]
        module = entry.load_module()
        if args.convert is not None:
            module.convert(entry.variant, args.checkpoint, args.work, args.convert)
            return
        import torch

        torch.set_num_threads(args.threads or torch.get_num_threads())
        start = time.perf_counter()
        there = {} if args.device == "cpu" else {"device": args.device}  # most peers know the CPU alone
        threads = torch.get_num_threads()
        peer = module.load(entry.variant, args.checkpoint, args.work, threads, args.dynamic, **there)
        gc.collect()
        replies.write(json.dumps({"loaded": time.perf_counter() - start}) + "\n")
        replies.flush()
        serve(Worker(peer), sys.stdin, replies)


if __name__ == "__main__":
    main()
