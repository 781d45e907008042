"""LitServe with its dynamic batching over the same model.

    python -m miss.benchmarks.peers.litserve_server CHECKPOINT WORK --port 8002 --threads 2 --batch 8 --wait 0.01

Knows LitServe's hooks; does not know who asks. `--batch`, `--wait` (seconds): its max_batch_size and batch_timeout.
`--workers`: its workers_per_device, each with so many threads.
"""

import argparse
import base64
from pathlib import Path
from typing import Any

import litserve

from miss.benchmarks.peers.served_blip import Asked, ServedBlip


class Api(litserve.LitAPI):
    """Read in the worker, answered as batches."""

    def __init__(self, checkpoint: Path, work: Path, threads: int, **batching: Any) -> None:
        super().__init__(**batching)
        self._given = checkpoint, work, threads

    def setup(self, device: str) -> None:
        self.model = ServedBlip(*self._given)

    def decode_request(self, request: dict[str, str], **_: Any) -> Asked:
        return self.model.read(base64.b64decode(request["image"]), request["question"])

    def batch(self, inputs: list[Asked]) -> list[Asked]:
        return inputs

    def predict(self, x: Any, **_: Any) -> Any:
        return self.model.answer(x if isinstance(x, list) else [x])

    def unbatch(self, output: list[str]) -> list[str]:
        return output

    def encode_response(self, output: Any, **_: Any) -> dict[str, str]:
        return {"answer": output if isinstance(output, str) else output[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--wait", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fast-queue", action="store_true", help="its ZeroMQ transport")
    args = parser.parse_args()
    batching = {"max_batch_size": args.batch, "batch_timeout": args.wait if args.batch > 1 else 0.0}
    api = Api(args.checkpoint, args.work, args.threads, **batching)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=args.workers, timeout=False, fast_queue=args.fast_queue
    )
    server.run(host="127.0.0.1", port=args.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
