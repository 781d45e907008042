"""What one part's forward and backward pass takes on this machine, measured: blocks of memory as they come and go, what
the C library keeps of them, and what the process takes beside.

Knows a model's gradients, PyTorch's record of allocations and this process's pages (Linux); does not know engines.

On the CPU memory comes from the C library. glibc maps a block of more than 32 MB by itself and returns it at once;
smaller ones come from its heap, which keeps what is freed: from the first backward pass on, what a pass needed of small
blocks at once, and the gaps between them, stay for the next pass. PyTorch's CUDA allocator keeps everything.
"""

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

LARGE = 32 << 20  # bytes: glibc's DEFAULT_MMAP_THRESHOLD_MAX, which its threshold has risen to by then


@dataclass(frozen=True)
class Pass:
    """Bytes.

    curve: (states, gradients) of large blocks after each allocation of the two passes: those that were not there
        before, and which of them are gradients that stay. On CUDA of all blocks.
    heap: what a pass leaves in the C library's hands once its gradients are gone, too: small blocks and gaps.
    process: interpreter, libraries and their tables, tensors left out (CUDA: 0).
    """

    curve: tuple[tuple[int, int], ...]
    heap: int
    process: int

    def large(self, share: float) -> int:
        """The most of states and that share of gradients at once."""
        return round(max(states + share * gradients for states, gradients in self.curve))


def measured(run: Callable[[], Tensor], model: nn.Module) -> Pass:
    """Goes through the model's passes twice: once recorded, once as a run does. `run` gives the loss."""
    give_back()  # as a run does before its first step
    device = next(model.parameters()).device
    kept = LARGE if device.type == "cpu" else 0
    times: list[tuple[int, int]] = []

    def note(p: Tensor) -> None:
        times.append((time.time_ns(), p.numel() * p.element_size()))

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on the standard error when it starts and stops
    activity = torch.profiler.ProfilerActivity.CPU
    with _after_gradients(model, note), torch.profiler.profile(activities=[activity], profile_memory=True) as record:
        run().backward()  # type: ignore[no-untyped-call]
    curve = _curve(record, times, device, kept)
    model.zero_grad(set_to_none=True)
    if device.type != "cpu":
        return Pass(curve, 0, 0)
    del record
    give_back()  # of what recording took
    run().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    after = resident_bytes()
    give_back()
    base = resident_bytes()
    return Pass(curve, after - base, base - _tensor_bytes())


@contextlib.contextmanager
def _after_gradients(model: nn.Module, call: Callable[[Tensor], None]) -> Iterator[None]:
    hooks = [p.register_post_accumulate_grad_hook(call) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _curve(
    record: torch.profiler.profile, gradients: list[tuple[int, int]], device: torch.device, least: int
) -> tuple[tuple[int, int], ...]:
    """From the allocations of a record and the times at which gradients were there, those above so many bytes."""
    kind = DeviceType.CPU if device.type == "cpu" else DeviceType.CUDA
    assert record.profiler is not None and record.profiler.kineto_results is not None
    recorded: list[Any] = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = [(e.start_ns(), e.nbytes(), 0) for e in recorded if e.device_type() == kind and abs(e.nbytes()) > least]
    events += [(when, 0, size) for when, size in gradients if size > least]
    live = arrived = 0
    curve = [(0, 0)]
    for _, size, gradient in sorted(events):
        live, arrived = live + size, arrived + gradient
        curve.append((live - arrived, arrived))
    return tuple(curve)


def resident_bytes() -> int:
    """What this process has in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def most_resident_bytes() -> int:
    """The most that this process had in memory (Linux); a parent's, as `getrusage` may say, does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def give_back() -> None:
    """Has the C library (glibc) return what it keeps for later: after loading `small`, 230 MB."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _tensor_bytes() -> int:
    """Of all distinct tensors in this memory that Python can see."""
    sizes: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor) and one.device.type == "cpu" and one.layout == torch.strided:
            storage = one.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
