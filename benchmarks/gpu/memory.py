"""What operations hold of a GPU's memory beside their inputs: ours against PyTorch's rows, both passes.

    python -m miss.benchmarks.gpu.memory --device cuda

Knows the allocator's peak; does not know time. Never run on a GPU; on a CPU it says so and measures nothing.
"""

import argparse
import json
from typing import Any

import torch

from miss.benchmarks.gpu import aims
from miss.benchmarks.gpu.machine import NEEDS_CUDA
from miss.kernels import registry

FOLDERS = ("contrastive", "cross_entropy", "attention")
_ROWS = ("triton", "torch")


def peaks(folder: str, sizes: aims.Sizes) -> dict[str, int | str]:
    """Bytes at the peak of the folder's first case with a gradient, by row, inputs excepted; or why there are none."""
    device = torch.device("cuda")
    cases = aims.cases(folder, (torch.bfloat16,), device, sizes)
    case = next(case for case in cases if case.shape.startswith("forward+backward"))
    inputs = case.make(torch.Generator(device).manual_seed(0))
    found: dict[str, int | str] = {}
    for row in _ROWS:
        try:
            with registry.use(**{case.op: row}):
                case.call(*inputs)  # what is compiled or tuned at first use is no part of it
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                case.call(*inputs)
                torch.cuda.synchronize()
            found[row] = torch.cuda.max_memory_allocated() - before
        except Exception as error:  # also what Triton raises of its own; it is written down, and the next row is tried
            found[row] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory held by operations on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    sizes = aims.SIZES[aims.TINY if args.quick else aims.NAME]
    found: dict[str, Any] = dict.fromkeys(FOLDERS, NEEDS_CUDA)
    if args.device == "cuda":
        registry.load_all()
        found = {folder: peaks(folder, sizes) for folder in FOLDERS}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
