"""What memory answering asks PyTorch's allocator for, by stage and operation.

Knows torch.profiler's record of allocations; does not know times or costs.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from miss.engine.runtime import stages
from miss.engine.runtime.profile import OUTSIDE
from miss.kernels import registry
from miss.kernels.registry import Impl, Op

_PREFIX = "miss/"  # of the marks among PyTorch's own records


@dataclass
class Allocated:
    """count: allocations. nbytes: what they asked for together."""

    count: int = 0
    nbytes: int = 0


@dataclass
class Allocations:
    """By (stage, operation); the operation is empty where it was none's. peak: the most bytes that were held at once
    beyond what was held before."""

    parts: dict[tuple[str, str], Allocated] = field(default_factory=dict)
    peak: int = 0


class _Marks:
    """Puts stages and operations among the profiler's records."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def begin(self, stage: str) -> None:
        self._open.append(record_function(f"{_PREFIX}{stage}/").__enter__())

    def end(self, stage: str) -> None:
        self._open.pop().__exit__(None, None, None)

    def run(self, op: Op, impl: Impl, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        with record_function(f"{_PREFIX}/{op.name}"):
            return run()


def allocations(call: Callable[[], object], device: torch.device) -> Allocations:
    """Of one run of `call`."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    marks = _Marks()
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as record,
        stages.observed(marks),
        registry.around(marks.run),
    ):
        call()
    assert record.profiler is not None
    found = list(_walk(record.profiler.kineto_results.experimental_event_tree(), (OUTSIDE, "")))
    result, live = Allocations(), 0
    for _, size, place in sorted(found, key=lambda event: event[0]):
        live += size
        result.peak = max(result.peak, live)
        if size > 0:
            part = result.parts.setdefault(place, Allocated())
            part.count, part.nbytes = part.count + 1, part.nbytes + size
    return result


def _walk(events: Any, place: tuple[str, str]) -> Iterator[tuple[int, int, tuple[str, str]]]:
    """(nanoseconds, bytes, where) of all allocations (below zero: given back) among records and what is within them."""
    for event in events:
        here = place
        if event.name.startswith(_PREFIX):
            stage, op = event.name.removeprefix(_PREFIX).split("/")
            here = (stage or place[0], op)
        with contextlib.suppress(AttributeError):  # only records of allocations have a size
            yield event.start_time_ns, int(event.extra_fields.alloc_size), here
        yield from _walk(event.children, here)
