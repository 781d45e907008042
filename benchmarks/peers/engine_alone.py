"""Our engine without a server: the body of a `/v1/vqa` a line, the answer and its seconds back.

    python -m miss.benchmarks.peers.engine_alone CHECKPOINT PRECISION --threads 2

Knows the engine's public API; does not know HTTP. What it times is `Engine.answer` of the encoded image, decoding
included. Of an image it holds no more than the engine's own cache does.
"""

import argparse
import base64
import json
import sys
import time

import torch

from miss.engine.runtime.engine import Engine
from miss.engine.runtime.sampler import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("precision")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = Engine.load(args.checkpoint, args.precision)
    for line in sys.stdin:
        asked = json.loads(line)
        image, params = base64.b64decode(asked["image"]), SamplingParams(num_alternatives=asked["alternatives"])
        start = time.perf_counter()
        answer = engine.answer(image, asked["question"], params)
        print(json.dumps({"answer": answer.text, "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
