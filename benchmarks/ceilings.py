"""How fast this machine can be at all: multiply-add rates and bandwidths, in short bursts.

Knows the ceiling loops of csrc/ and what stands in for them where they are not built; does not know operations.

A burst takes a few milliseconds, so that it can stand between two measurements of an operation: a host's clock varies
by tens of percent within seconds, and a share is only worth something against a ceiling of the same moment.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.memory import huge_zeros

KINDS = ("fp32", "bf16", "int8")  # fp16 too on cuda
_TURNS = 400_000  # 1.5 to 3 ms of the loops in csrc/cpu/ceilings.inl.h
_BUFFER = 256 << 20  # eight times the 32 MB of L3 that this code was written on: what is read is never still there
_CACHES = 8  # last caches that a GPU's buffer is as large as: 400 MB on an H100 or H200 (50 MB), 1 GB on a B200 (126)
_PIECE = 64 << 20
_SETTLING = 0.3  # seconds
_GPU_REPEATS = 8  # of the whole buffer, which no L2 holds: 0.5 ms and more, where one piece takes as long as a launch
_BURST = 5e-4  # seconds that reading from a cache is repeated for
_SIDE = {"cpu": 1024, "cuda": 8192}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Ceilings:
    """The ceilings of one device. `source` says what measures them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.own = device.type == "cpu" and extension.missing() is None
        self._loops: Any = extension.ops() if self.own else None
        side = _SIDE[device.type]
        self.source = (
            f"loops of csrc/cpu ({extension.isa()}), reads and streaming copies of huge pages"
            if self.own
            else f"torch.matmul and torch._int_mm of {side} x {side}, torch.sum, torch.Tensor.copy_"
        )
        self.kinds = KINDS if device.type == "cpu" else ("fp32", "bf16", "fp16", "int8")
        self._buffers: dict[int, Tensor] = {}
        self._matrices: dict[str, Tensor] = {}
        self._place = 0
        self._bytes = _BUFFER if device.type == "cpu" else max(_BUFFER, _CACHES * last_cache_bytes(device)) & ~4095

    def rate(self, kind: str) -> float:
        """Operations a second (a multiply-add counts as two) of one burst on all threads."""
        if self.own:
            start = time.perf_counter()
            operations = float(self._loops.ceiling_rate(kind, _TURNS))
            return operations / (time.perf_counter() - start)
        matrix = self._matrix(kind)
        product = torch._int_mm if kind == "int8" else torch.mm
        return 2.0 * len(matrix) ** 3 / self._seconds(lambda: product(matrix, matrix.t()), 1)

    def bandwidth(self, kind: str, nbytes: int | None = None) -> float:
        """Bytes a second of reading (`read`) or of reading and writing (`copy`).

        Args:
            nbytes: from caches: a piece of memory of this size again and again. None: from memory.
        """
        half = 2 if kind == "copy" else 1
        if nbytes is None:
            whole = self.device.type == "cuda"
            piece, repeats = (self._buffer(0), _GPU_REPEATS) if whole else (self._next(_PIECE // half), 1)
        else:
            size = max(1 << 14, nbytes // half)
            piece = self._buffer(0)[: min(size // 4096 * 1024, self._bytes // 4)]
            rate = 6e10 if self.device.type == "cpu" else 6e12
            repeats = max(1, int(_BURST * rate / (piece.nbytes * half)))
        target = self._buffer(1)[: piece.numel()] if kind == "copy" else piece
        ways = self._ways(kind, piece, target, nbytes is not None)
        return max(piece.nbytes * half * repeats / self._seconds(way, repeats, nbytes is not None) for way in ways)

    def _ways(self, kind: str, piece: Tensor, target: Tensor, cached: bool) -> list[Callable[[], Any]]:
        """What reads or copies; the fastest counts."""
        if kind == "read":
            return [functools.partial(self._loops.ceiling_read, piece), piece.sum] if self.own else [piece.sum]
        plain = functools.partial(target.copy_, piece)
        if not self.own:
            return [plain]
        streamed = functools.partial(self._loops.ceiling_copy, piece, target)
        return [streamed, plain] if cached else [streamed]  # what is streamed never stays in a cache

    def _seconds(self, call: Callable[[], Any], repeats: int, warm: bool = False) -> float:
        if warm:
            call()
        if self.device.type == "cuda":
            return self._device_seconds(call, repeats)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    def _device_seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Between events, behind a burst that keeps the device busy while the host launches: never run on a GPU."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._buffer(0).sum()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _buffer(self, index: int) -> Tensor:
        if index not in self._buffers:
            size, cpu = self._bytes // 4, self.device.type == "cpu"
            self._buffers[index] = huge_zeros([size]) if cpu else torch.empty(size, device="cuda")
            self._buffers[index].fill_(1)
        return self._buffers[index]

    def _next(self, nbytes: int) -> Tensor:
        """The next piece of the buffer, so that none is read again before all others were."""
        count = nbytes // 4096 * 1024
        if self._place + count > self._bytes // 4:
            self._place = 0
        piece = self._buffer(0)[self._place : self._place + count]
        self._place += count
        return piece

    def _matrix(self, kind: str) -> Tensor:
        if kind not in self._matrices:
            side = _SIDE[self.device.type]
            full = torch.randn(side, side, device=self.device)
            self._matrices[kind] = (full * 40).to(torch.int8) if kind == "int8" else full.to(_DTYPES[kind])
        return self._matrices[kind]

    def record(self, repeats: int = 5) -> dict[str, Any]:
        """All ceilings, with all threads and (on CPU) with one: the median, and (largest - smallest) / median."""
        found: dict[str, Any] = {"source": self.source}
        threads = torch.get_num_threads()
        for count in sorted({1, threads}) if self.device.type == "cpu" else [threads]:
            self._set_threads(count)
            try:
                found[f"threads_{count}" if self.device.type == "cpu" else "device"] = self._all(repeats)
            finally:
                self._set_threads(threads)
        return found

    def _set_threads(self, count: int) -> None:
        """New threads may share one core for their first 0.1 s (half the rate on two): they are given time to part."""
        if count == torch.get_num_threads():
            return
        torch.set_num_threads(count)
        end = time.perf_counter() + _SETTLING
        while time.perf_counter() < end:
            self.rate("fp32")

    def _all(self, repeats: int) -> dict[str, Any]:
        bursts = {f"{kind}_gflops": functools.partial(self.rate, kind) for kind in self.kinds}
        bursts |= {
            "read_gbps": functools.partial(self.bandwidth, "read"),
            "copy_gbps": functools.partial(self.bandwidth, "copy"),
            "read_l2_gbps": functools.partial(self.bandwidth, "read", 512 << 10),
            "read_l3_gbps": functools.partial(self.bandwidth, "read", 8 << 20),
        }
        found = {}
        for name, burst in bursts.items():
            burst()
            values = [burst() / 1e9 for _ in range(repeats)]
            middle = statistics.median(values)
            found[name] = {"median": round(middle, 1), "spread": round((max(values) - min(values)) / middle, 3)}
        return found


def last_cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory; 32 MB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    found = [text for text in (path.read_text().strip() for path in sizes) if text[:-1].isdigit()]
    return max((int(t[:-1]) << {"K": 10, "M": 20, "G": 30}[t[-1]] for t in found), default=32 << 20)
