"""Holds `miss pretrain --dry-run`'s memory of a rank against runs: the most that each had in memory, engine by engine.

    python -m miss.benchmarks.pretrain_memory --init checkpoints/miss-small [--engines plain 2 3] [--ranks 1 2]

Each engine and number of ranks takes two steps, validates and saves, in processes of its own (gloo, CPU); an estimate
is made once for each number of ranks. Without --data the pairs are noise with made-up captions. Knows commands and what
they print; does not know what memory is made of. Linux.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINES = ("plain", "0", "1", "2", "3")
WORDS = (
    "a the chest brain ct mri image shows no normal left right lung liver mass fluid small large and of with".split()
)
SECONDS = 900


@dataclass(frozen=True)
class Case:
    """measured: of each rank. estimate: of the first, which saves; by what it is for."""

    engine: str
    ranks: int
    measured: tuple[int, ...]
    estimate: dict[str, int]
    when: str

    @property
    def error(self) -> float:
        """Of the estimate, as a share of what was measured on the first rank."""
        return sum(self.estimate.values()) / self.measured[0] - 1


def write_pairs(folder: Path, count: int = 96, side: int = 224) -> Path:
    """Images of noise, each with a caption of 6 to 24 words: the same for the same numbers."""
    import numpy as np
    from PIL import Image

    drawn, rng = random.Random(0), np.random.default_rng(0)
    lines = []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
        caption = " ".join(drawn.choices(WORDS, k=drawn.randint(6, 24)))
        lines.append(json.dumps({"image": f"{i}.jpg", "captions": [caption]}) + "\n")
    path = folder / "captions.jsonl"
    path.write_text("".join(lines))
    return path


def flags(args: argparse.Namespace, data: str) -> list[str]:
    """The run that is measured, and estimated."""
    words = ["--init", str(args.init), "--data", data, "--data.exclude-held-out", "false"]
    words += ["--data.pairs-per-step", str(args.pairs_per_step), "--bf16", "true" if args.bf16 else "false"]
    words += ["--schedule.total-steps", "2", "--schedule.warmup-steps", "1", "--losses.queue-size", "1024"]
    words += ["--validation.pairs", "8", "--validation.batch-pairs", "8", "--checkpoint.every", "0"]
    return [*words, "--log.every", "1", "--log.ceiling", "false", "--log.tensorboard", "false", "--device", "cpu"]


def engine_flags(engine: str) -> list[str]:
    return ["--engine", "plain"] if engine == "plain" else ["--zero", engine]


def on_ranks(words: Sequence[str], ranks: int) -> list[str]:
    """The last line that each rank prints, empty where it prints none.

    Raises:
        SystemExit: one failed; what it said is shown, and the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            own = {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            with open(Path(folder) / str(rank), "wb") as file:
                command = [sys.executable, "-m", "miss.benchmarks.pretrain_memory", "--rank-runs", *words]
                environment = {**os.environ, **(own if ranks > 1 else {})}
                started.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
        try:
            codes = [process.wait(SECONDS) for process in started]
        finally:
            for process in started:
                process.kill()
        said = [(Path(folder) / str(rank)).read_text() for rank in range(ranks)]
    if any(codes):
        told = said[codes.index(max(codes))][-3000:]
        sys.exit(f"pretrain_memory: exit codes {codes} of miss {' '.join(words)}\n{told}")
    return [(text.splitlines() or [""])[-1] for text in said]


def rank_runs(words: list[str]) -> int:
    """One rank: the command, then the most that this process had in memory."""
    from miss.cli import run
    from miss.engine.training.pretrain_pass import most_resident_bytes

    code = run(words)
    if "--dry-run" not in words:
        print(f"\n{most_resident_bytes()}", flush=True)
    return code


def held_against(args: argparse.Namespace, data: str) -> list[Case]:
    """All cases, each shown as it is there."""
    cases = []
    for ranks in args.ranks:
        dry = json.loads(on_ranks(["pretrain", *flags(args, data), "--dry-run", "--json"], ranks)[0])
        for engine in args.engines:
            with tempfile.TemporaryDirectory() as folder:
                words = ["pretrain", *flags(args, data), *engine_flags(engine), "--output", f"{folder}/run"]
                measured = tuple(int(line) for line in on_ranks(words, ranks))
            name = "plain" if engine == "plain" else f"zero {engine}"
            case = Case(name, ranks, measured, dry["memory"][name], dry["fullest"][name])
            cases.append(case)
            print(row(case), flush=True)
    return cases


def row(case: Case) -> str:
    """A line of the table."""
    terms = ", ".join(f"{name} {value / 1e6:,.0f}" for name, value in case.estimate.items() if value)
    said = f"{sum(case.estimate.values()) / 1e6:,.0f} | {case.when} | {case.measured[0] / 1e6:,.0f} | {case.error:+.1%}"
    return f"| {case.engine} | {case.ranks} | {said} | {terms} |"


def main() -> None:
    if sys.argv[1:2] == ["--rank-runs"]:
        sys.exit(rank_runs(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        prog="python -m miss.benchmarks.pretrain_memory", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--init", type=Path, required=True, help="checkpoint folder to start from")
    parser.add_argument("--data", help="pairs (default: 96 made-up ones)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="plain, or ZeRO's stage")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--pairs-per-step", type=int, default=16, help="of all ranks together")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    print("| engine | ranks | estimate, MB | fullest at | measured, MB | error | of what, MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cases = held_against(args, args.data or str(write_pairs(Path(folder))))
    found: list[dict[str, Any]] = [{**vars(case), "error": round(case.error, 4)} for case in cases]
    print(json.dumps({"worst": max(abs(case.error) for case in cases), "cases": found}))


if __name__ == "__main__":
    main()
