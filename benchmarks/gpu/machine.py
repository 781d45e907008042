"""What the machine is and can do at all: the ceilings that every aim is a share of.

    python -m miss.benchmarks.gpu.machine --device cuda --result machine.json

Knows the device, events and graphs; does not know operations. On a CPU the first ceilings are those of ceilings.py, and
what only a GPU has is `not measured: needs CUDA`. A ceiling that cannot be measured says why; the others go on. What is
measured on CUDA was never run.
"""

import argparse
import functools
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks import record
from miss.benchmarks.ceilings import Ceilings, last_cache_bytes
from miss.benchmarks.gpu.state import write_json

NEEDS_CUDA = "not measured: needs CUDA"
_SIDE, _QUICK_SIDE = 8192, 1024  # of the products
_COPY, _QUICK_COPY = 1 << 30, 1 << 26  # bytes at least
_CACHES = 8  # last caches that what is copied or read is as large as: 50 MB on an H100 or H200, 126 MB on a B200
_NODES = 1000  # of a graph
_ROUNDS = 2000  # of the barrier
_CEILINGS = ("copy_gbps", "read_gbps", "bf16_tflops", "fp16_tflops", "fp8_tflops", "int8_tops", "l2_gbps")
_COSTS = ("graph_node_us", "launch_us", "grid_barrier_us", "synchronize_us")
NAMES = (*_CEILINGS, *_COSTS)


def main() -> int:
    parser = argparse.ArgumentParser(description="The machine and its ceilings.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0, help="(every ceiling takes well under a second)")
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    found: dict[str, Any] = {"complete": False, "environment": environment(device), "ceilings": {}, "how": {}}
    measures = (_on_cuda if device.type == "cuda" else _on_cpu)(args.quick, found["how"])
    for name in NAMES:
        found["ceilings"][name] = value = _guarded(measures.get(name))
        print(f"{name:<16} {value} {found['how'].get(name, '')}", flush=True)
        write_json(args.result, found)
    found["complete"] = True
    write_json(args.result, found)
    return int(any(str(value).startswith("failed") for value in found["ceilings"].values()))


def environment(device: torch.device) -> dict[str, Any]:
    """Of the machine, the versions, and what of the GPU bounds what runs on it."""
    from importlib import metadata, util

    found = record.environment(device)
    for package in ("triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "architecture": f"sm_{about.major}{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "memory_gb": round(about.total_memory / 1e9, 1),
            "capability": [about.major, about.minor],
        }
    libraries = ("flash_attn", "flash_attn_interface", "xformers", "bitsandbytes", "liger_kernel")
    present = [name for name in libraries if util.find_spec(name) is not None]
    return {**found, "libraries": present, "host": platform.machine()}


def _guarded(measure: Callable[[], float] | None) -> float | str:
    if measure is None:
        return NEEDS_CUDA
    try:
        return float(f"{measure():.5g}")
    except Exception as error:  # whatever a library, a compiler or a driver raises: the next ceiling is another matter
        text = " ".join(str(error).split())[:200]
        unfit = isinstance(error, NotImplementedError)
        return f"not measured: {text}" if unfit else f"failed: {type(error).__name__}: {text}"


def _on_cpu(quick: bool, how: dict[str, str]) -> dict[str, Callable[[], float]]:
    ceilings = Ceilings(torch.device("cpu"))

    def best(burst: Callable[[], float], unit: float) -> float:
        return max(burst() for _ in range(3 if quick else 9)) / unit

    return {
        "copy_gbps": lambda: best(lambda: ceilings.bandwidth("copy"), 1e9),
        "read_gbps": lambda: best(lambda: ceilings.bandwidth("read"), 1e9),
        "bf16_tflops": lambda: best(lambda: ceilings.rate("bf16"), 1e12),
        "int8_tops": lambda: best(lambda: ceilings.rate("int8"), 1e12),
    }


def _on_cuda(quick: bool, how: dict[str, str]) -> dict[str, Callable[[], float]]:
    """how: what was measured, in words, where a figure does not say it; filled as the measures are called."""
    side, least = (_QUICK_SIDE, _QUICK_COPY) if quick else (_SIDE, _COPY)
    cache = last_cache_bytes(torch.device("cuda"))
    nbytes = max(least, _CACHES * cache) & ~4095
    how["copy_gbps"] = how["read_gbps"] = f"({nbytes >> 20} MiB; the last cache holds {cache >> 20} MiB)"
    return {
        "copy_gbps": functools.partial(_copying, nbytes),
        "read_gbps": functools.partial(_reading, nbytes),
        "bf16_tflops": functools.partial(_product, side, torch.bfloat16),
        "fp16_tflops": functools.partial(_product, side, torch.float16),
        "fp8_tflops": functools.partial(_fp8, side, how),
        "int8_tops": functools.partial(_int8, side),
        "l2_gbps": _last_cache,
        "graph_node_us": _graph_node,
        "launch_us": _launch,
        "grid_barrier_us": _barrier,
        "synchronize_us": _synchronize,
    }


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """Least seconds of a call, by events: a ceiling is what the device can do, not what it mostly does."""
    for _ in range(3):
        call()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return min(seconds)


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of the call, warmed up on a stream of its own first, as capture wants it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _copying(nbytes: int) -> float:
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * nbytes / timed(lambda: target.copy_(source)) / 1e9


def _reading(nbytes: int) -> float:
    source = torch.zeros(nbytes // 4, device="cuda")
    return nbytes / timed(source.sum) / 1e9


def _product(side: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b.t()) / 1e12


def _fp8(side: int, how: dict[str, str]) -> float:
    """With sums in float32, and with the shorter ones that the tensor cores are faster with where they have them."""
    if torch.cuda.get_device_capability() < (8, 9):
        raise NotImplementedError("fp8 products need sm_89 or later")
    a, b = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    product = functools.partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    rates: dict[str, float] = {}
    refused: list[str] = []
    for name, fast in (("exact sums", False), ("fast sums", True)):
        try:
            rates[name] = 2 * side**3 / timed(functools.partial(product, use_fast_accum=fast)) / 1e12
        except (RuntimeError, NotImplementedError) as error:  # some devices and versions have one of them alone
            refused.append(f"{name}: {' '.join(str(error).split())[:100]}")
    if not rates:
        raise RuntimeError("; ".join(refused))
    how["fp8_tflops"] = f"({', '.join([*(f'{name} {rate:.5g}' for name, rate in rates.items()), *refused])})"
    return max(rates.values())


def _int8(side: int) -> float:
    a, b = (torch.randint(-127, 128, (side, side), device="cuda").to(torch.int8) for _ in range(2))
    return 2 * side**3 / timed(lambda: torch._int_mm(a, b.t())) / 1e12


def _last_cache() -> float:
    """Copies within the last cache, many in one graph so that launching them costs nothing. The best of three sizes."""
    rates = []
    for share in (3, 4, 8):
        half = last_cache_bytes(torch.device("cuda")) // (2 * share) & ~4095
        source, target = (torch.zeros(half, dtype=torch.uint8, device="cuda") for _ in range(2))
        graph = captured(functools.partial(_repeat, functools.partial(target.copy_, source), 100))
        rates.append(100 * 2 * half / timed(graph.replay) / 1e9)
    return max(rates)


def _repeat(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def _chain(number: Tensor, nodes: int) -> None:
    for _ in range(nodes):
        number.add_(1)


def _graph_node() -> float:
    """Microseconds that one more kernel in a row costs inside a graph, the smallest kernel's own time included."""
    number = torch.zeros(1, device="cuda")
    one, two = (captured(functools.partial(_chain, number, n * _NODES)) for n in (1, 2))
    return (timed(two.replay) - timed(one.replay)) / _NODES * 1e6


def _launch() -> float:
    """The same outside of a graph, from Python through PyTorch."""
    number = torch.zeros(1, device="cuda")
    return (timed(lambda: _chain(number, 2 * _NODES)) - timed(lambda: _chain(number, _NODES))) / _NODES * 1e6


def _barrier() -> float:
    """Microseconds of one barrier of as many programs as the device has multiprocessors."""
    from miss.benchmarks.gpu import barrier

    programs = torch.cuda.get_device_properties(0).multi_processor_count
    barrier.seconds(programs, 4)  # compiles, once for every number of rounds
    pairs = [(barrier.seconds(programs, 2 * _ROUNDS), barrier.seconds(programs, _ROUNDS)) for _ in range(5)]
    return statistics.median((more - less) / _ROUNDS * 1e6 for more, less in pairs)


def _synchronize() -> float:
    """Microseconds until the host knows that a device with nothing to do is done."""
    import time

    torch.cuda.synchronize()
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


if __name__ == "__main__":
    raise SystemExit(main())
