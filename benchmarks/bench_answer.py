"""One answer by the operations' rows that run here against the same engine on PyTorch's rows, in turn.

    python -m miss.benchmarks.bench_answer [--image FILE] [--questions 1] [--repeats 15]

The engine is warm and keeps no image: every answer encodes its image. Medians with the spread of the middle half, by
precision. The last line is one JSON object. Knows no other engine: those are compared where serving is.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from miss.engine.runtime.engine import Engine
from miss.kernels import extension, registry

QUESTIONS = ("what modality is this image?", "is there a fracture?", "which organ is shown?", "is this image normal?")


def measure(precision: str, args: argparse.Namespace) -> dict[str, Any]:
    engine = Engine.load(args.checkpoint, precision=precision)
    pairs = [(args.image, QUESTIONS[i % len(QUESTIONS)]) for i in range(args.questions)]
    rows = ("torch", "composed", "reference")  # the plainest that each table has
    plain = {op.name: next(row for row in rows if row in op.names) for op in registry.OPS.values()}
    times: dict[str, list[float]] = {"chosen": [], "torch": []}
    stages: dict[str, list[dict[str, float]]] = {"chosen": [], "torch": []}
    for repeat in range(args.repeats + 2):
        for name in times:
            with registry.use(**(plain if name == "torch" else {})):
                start = time.perf_counter()
                answers = list(engine.answer_many(pairs))
                seconds = time.perf_counter() - start
            if repeat > 1:  # the first two warm up
                times[name].append(seconds)
                stages[name].append(answers[0].seconds)
    result: dict[str, Any] = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        parts = {
            k: round(1e3 * args.questions * statistics.median(s[k] for s in stages[name]), 1) for k in stages[name][0]
        }
        result[name] = {"ms": round(1e3 * middle, 1), "spread": round((high - low) / middle, 3), "stages_ms": parts}
    result["ratio"] = round(result["torch"]["ms"] / result["chosen"]["ms"], 2)
    print(f"{precision:>5}  " + "  ".join(f"{k} {v}" for k, v in result.items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="An answer by our rows against PyTorch's rows.")
    parser.add_argument("--image", default="examples/chest-xray.jpg")
    parser.add_argument("--checkpoint", default="miss-small")
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    args = parser.parse_args()
    registry.load_all()
    results = {precision: measure(precision, args) for precision in args.precisions.split(",")}
    print(
        json.dumps(
            {
                "benchmark": "answer",
                "isa": extension.isa(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "questions": args.questions,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
