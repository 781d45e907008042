"""What happens while something is answered: every operation, in its stage, with its time and what it costs at least.

Knows stages and the registry's runs; does not know ceilings, files, or how results are shown.

Times and costs come from different passes: counting bytes while a clock runs would be part of what is measured. Both
see the same calls in the same order, so that the n-th run of one is the n-th of the other.
"""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from miss.engine.runtime import stages
from miss.kernels import registry
from miss.kernels.cost import Cost, cost, known
from miss.kernels.registry import Impl, Op

OUTSIDE = "outside"  # what belongs to no stage


@dataclass
class Span:
    """One stage (`op` is empty) or one run of an operation. Times are seconds since the pass began."""

    stage: str
    op: str
    implementation: str
    start: float
    end: float = 0.0
    inner: float = 0.0  # seconds of the operations within it

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def own(self) -> float:
        """Seconds that no operation within it has."""
        return self.seconds - self.inner


class Timeline:
    """The spans of one pass in the thread that records it, in the order in which they began."""

    def __init__(self, device: torch.device) -> None:
        self.spans: list[Span] = []
        self.seconds = 0.0
        self._device, self._thread = device, threading.get_ident()
        self._open: list[Span] = []
        self._origin = 0.0

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        with stages.observed(self), registry.around(self._run):
            self._origin = time.perf_counter()
            yield
            self.seconds = self._now()

    def begin(self, stage: str) -> None:
        if threading.get_ident() == self._thread:
            self._begin(Span(stage, "", "", self._now()))

    def end(self, stage: str) -> None:
        if threading.get_ident() == self._thread:
            self._end()

    def _run(self, op: Op, impl: Impl, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        if threading.get_ident() != self._thread:
            return run()
        stage = self._open[-1].stage if self._open else OUTSIDE
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.nvtx.range_push(op.name)
        self._begin(Span(stage, op.name, impl.name, self._now()))
        try:
            return run()
        finally:
            self._end()
            if on_cuda:
                torch.cuda.nvtx.range_pop()

    def _begin(self, span: Span) -> None:
        self.spans.append(span)
        self._open.append(span)

    def _end(self) -> None:
        span = self._open.pop()
        span.end = self._now()
        if self._open:
            self._open[-1].inner += span.seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._origin


@dataclass(frozen=True)
class Counted:
    """A run's cost (None where its table has none), and the bytes that it allocated, what it gave back included."""

    op: str
    cost: Cost | None


def count(call: Callable[[], object]) -> list[Counted]:
    """The cost of every run inside `call()`, in the order in which they began."""
    found: list[Counted] = []

    def wrap(op: Op, impl: Impl, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        place = len(found)
        found.append(Counted(op.name, None))
        result = run()
        made_of_others = impl.composite and len(found) > place + 1  # and costs what they do
        if known(op.name) and not made_of_others:
            found[place] = Counted(op.name, cost(op.name, args, result))
        return result

    with registry.around(wrap):
        call()
    return found


@dataclass
class Part:
    """What all runs of one operation by one implementation took within one stage, or (`op` empty) what of the stage no
    operation had: Python, and PyTorch's own operations. Seconds are the medians over the passes."""

    stage: str
    op: str
    implementation: str
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    nbytes: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)  # the flops by kind of arithmetic


@dataclass
class Profile:
    """Parts in the order in which they first began. seconds: the median of the passes that were recorded; plain: of
    those that were not, in turn with them. spans: of the pass nearest to the median."""

    parts: list[Part]
    seconds: float
    plain: float
    spans: list[Span]
    costs: list[Counted]

    @property
    def recorded(self) -> float:
        """What the parts add up to."""
        return sum(part.seconds for part in self.parts)


def profile(call: Callable[[], object], device: torch.device, repeats: int = 7, warmups: int = 2) -> Profile:
    """Runs `call` plainly and recorded in turn, `repeats` times each.

    Raises:
        ValueError: its passes do not run the same operations in the same order.
    """
    for _ in range(warmups):
        call()
    costs = count(call)
    timelines, plain = [], []
    for _ in range(repeats):
        plain.append(_seconds(call, device))
        timeline = Timeline(device)
        with timeline.record():
            call()
        timelines.append(timeline)
    names = [[(s.stage, s.op, s.implementation) for s in t.spans] for t in timelines]
    if any(other != names[0] for other in names) or [c.op for c in costs] != [n[1] for n in names[0] if n[1]]:
        raise ValueError("profile: the passes differ in what they run; what is profiled must be the same every time")
    middle = statistics.median(t.seconds for t in timelines)
    nearest = min(timelines, key=lambda t: abs(t.seconds - middle))
    return Profile(_parts(timelines, costs), middle, statistics.median(plain), nearest.spans, costs)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _parts(timelines: Sequence[Timeline], costs: Sequence[Counted]) -> list[Part]:
    parts: dict[tuple[str, str, str], Part] = {}
    remaining = iter(costs)
    for spans in zip(*(t.spans for t in timelines), strict=True):
        first = spans[0]
        key = (first.stage, first.op, first.implementation)
        part = parts.setdefault(key, Part(*key))
        part.calls += 1
        part.seconds += statistics.median(s.own for s in spans)
        if not first.op:
            continue
        if (spent := next(remaining).cost) is not None:
            part.flops += spent.flops
            part.nbytes += spent.reads + spent.writes
            part.kinds[spent.kind] = part.kinds.get(spent.kind, 0.0) + spent.flops
    outside = Part(OUTSIDE, "", "", 1)
    outside.seconds = statistics.median(t.seconds - _covered(t.spans) for t in timelines)
    return [*parts.values(), outside]


def _covered(spans: Sequence[Span]) -> float:
    """Seconds of the spans that lie within no other."""
    total, end = 0.0, 0.0
    for span in spans:
        if span.start >= end:
            total, end = total + span.seconds, span.end
    return total
