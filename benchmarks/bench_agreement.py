"""Answers by the kernels that run here against answers by the reference rows, counted over a split.

    python -m miss.benchmarks.bench_agreement --dataset slake --split validate [--data DIR] [--limit N]

Every question of the split is answered greedily twice: by what the registry chooses, and by the float32 reference of
every operation. Says how many texts are equal, and how far the scores of equal answers are apart. The last line is one
JSON object.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from miss.engine.data.datasets import Sample, load_dataset
from miss.engine.runtime.engine import Answer, Engine
from miss.engine.runtime.sampler import SamplingParams
from miss.kernels import extension, registry


def answers(engine: Engine, samples: list[Sample], what: str) -> list[Answer]:
    pairs = ((s.image, s.question) for s in samples)
    greedy = SamplingParams(num_beams=1, num_alternatives=0)
    return list(tqdm(engine.answer_many(pairs, greedy, batch_size=32), total=len(samples), desc=what, mininterval=1))


def compare(got: list[Answer], wanted: list[Answer]) -> dict[str, float]:
    pairs = list(zip(got, wanted, strict=True))
    same = [abs(g.logprob - w.logprob) for g, w in pairs if g.token_ids == w.token_ids]
    return {
        "questions": len(pairs),
        "equal": len(same),
        "different": len(pairs) - len(same),
        "logprob_difference_median": statistics.median(same) if same else 0.0,
        "logprob_difference_max": max(same, default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers by the kernels against answers by the reference.")
    parser.add_argument("--dataset", default="slake")
    parser.add_argument("--split", default="validate")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoint", default="miss-small")
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    registry.load_all()
    samples = sorted(load_dataset(args.dataset, args.data, args.split, "en"), key=lambda s: str(s.image))[: args.limit]
    start = time.perf_counter()
    with registry.use(**{name: "reference" for name in registry.OPS}):
        wanted = answers(Engine.load(args.checkpoint, precision="fp32"), samples, "reference")
    seconds = {"reference": time.perf_counter() - start}
    results = {}
    for precision in args.precisions.split(","):
        start = time.perf_counter()
        engine = Engine.load(args.checkpoint, precision=precision)
        results[precision] = compare(answers(engine, samples, precision), wanted)
        seconds[precision] = time.perf_counter() - start
        r = results[precision]
        print(
            f"{precision}: {r['equal']} of {r['questions']} answers are the reference's, token for token; their "
            f"log-probabilities differ by {r['logprob_difference_median']:.1e} (median), "
            f"{r['logprob_difference_max']:.1e} (largest)"
        )
    print(
        json.dumps(
            {
                "benchmark": "agreement",
                "dataset": args.dataset,
                "split": args.split,
                "checkpoint": args.checkpoint,
                "isa": extension.isa(),
                "torch": torch.__version__,
                "results": results,
                "seconds": {name: round(value, 1) for name, value in seconds.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
