"""Measures one case of an operation: all that can compute it, in turn, within one process.

Knows the registry, clocks and caches; does not know which operations there are, files or plots.

1. Sets of random inputs are made: two for a warm cache; for a cold one so many that they exceed twice the last cache.
2. Every implementation of the operation's table that fits (but the reference) and every peer computes a set; what errs
   from the float64 truth by more than the case allows is refused, and is not timed.
3. In rounds, each takes a sample in turn, and the ceilings take theirs: a clock that slows down slows all of them.
     warm: a call that is not timed, then calls on the same set; the next round has the next set.
     cold: every call has the next set; before it comes around, all the others were read.
   A sample of short calls is the mean of several. The public function is called, the choice of implementation included.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from miss.benchmarks.ceilings import Ceilings, last_cache_bytes
from miss.benchmarks.load import Busy
from miss.kernels import registry

Cache = Literal["warm", "cold"]
Bound = Callable[[], Any]
# Of the truth's largest value; the error of sums that PyTorch itself rounds on the way (scores, halves) is within it.
_TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_KINDS = {torch.float64: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SAMPLE = 4e-4  # seconds that a sample of short calls lasts, so that the clock's own cost is below 0.1 %
_MOST_CALLS = 64
_MOST_SETS = 256
_SLOW = 0.3  # seconds: beyond it, fewer repeats
_SLOW_REPEATS = 7
_COPYING = 0.25  # the share of writes beyond which the bandwidth to compare with is that of copying


@dataclass(frozen=True)
class Peer:
    """A way to compute a case that is not in the operation's table, at its best settings.

    `bind` takes one set of inputs and returns the call: what a user does once (packing a weight) it does before.
    """

    name: str
    bind: Callable[..., Bound]
    missing: str | None = None  # why it cannot run here
    tolerance: float | None = None  # where its arithmetic is another


@dataclass(frozen=True)
class Case:
    """One shape of one operation.

    `make(generator)` gives one set of inputs, `call` takes it. `flops` and bytes are those of the formula: each input
    read once, each output written once, nothing between. `truth` is the table's reference in float64 where None.
    """

    op: str  # the table's name
    shape: str
    dtype: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    call: Callable[..., Any]
    flops: float
    reads: float
    writes: float
    peers: Sequence[Peer] = ()
    caches: Sequence[Cache] = ("warm",)
    kind: str | None = None  # the compute ceiling: fp32, bf16, fp16, int8; by the first tensor's dtype where None
    truth: Callable[..., Any] | None = None
    tolerance: float | None = None

    @property
    def label(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"


@dataclass
class Row:
    """What was measured of one implementation. Rates are in 1e9 a second, `share_of_ceiling` is of the nearer roof."""

    op: str
    implementation: str
    shape: str
    dtype: str
    cache: Cache
    median_ms: float
    spread: float  # (80th - 20th percentile) / median
    gflops: float
    gbps: float
    share_of_ceiling: float
    ceiling: str
    error: float  # largest, relative to the truth's largest value
    ratio_to_peer: float | None  # the fastest peer's time / this time: above 1 is faster than it
    error_absolute: float
    peer: str | None
    ratios: dict[str, float]  # the same to each peer
    ours: bool
    chosen: bool  # what runs by itself
    repeats: int
    calls: int  # of a sample
    flops: float
    bytes: float
    ceiling_gflops: float  # measured in the same rounds
    ceiling_gbps: float
    other_load: float  # what other processes took of all cores' time meanwhile


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)  # wrong answers, not timed
    skipped: list[dict[str, Any]] = field(default_factory=list)  # cannot run here, and why


@dataclass(frozen=True)
class Settings:
    device: torch.device
    repeats: int = 20


@dataclass
class Runner:
    """One that takes part in a case."""

    name: str
    ours: bool
    chosen: bool
    bind: Callable[..., Bound]
    choice: dict[str, str]
    tolerance: float
    error: float = math.nan
    error_absolute: float = math.nan
    calls: int = 1
    bound: list[Bound] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@torch.no_grad()
def measure(case: Case, cache: Cache, settings: Settings, ceilings: Ceilings) -> Result:
    """Checks, then times all that can compute `case`."""
    result, name = Result(), {"op": case.op, "shape": case.shape, "dtype": case.dtype}
    sets = _sets(case, cache, settings.device)
    runners = []
    for runner in _runners(case, sets[0], result):
        if reason := _check(case, runner, sets):
            result.refused.append({**name, "implementation": runner.name, "ours": runner.ours, "reason": reason})
        else:
            runner.bound = [runner.bind(*one) for one in sets]
            runners.append(runner)
    if runners:
        kind = case.kind or _KINDS[_first(sets[0]).dtype]
        warm_bytes = int(case.reads + case.writes) if cache == "warm" else None
        busy = Busy()
        rates = _rounds(runners, cache, settings, lambda: _roofs(case, kind, warm_bytes, ceilings))
        result.rows = _rows(case, cache, kind, runners, rates, busy.others())
    return result


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(v, change) for v in value))
    return type(value)(_mapped(v, change) for v in value) if isinstance(value, list | tuple) else value


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.clone()


def _first(inputs: Any) -> Tensor:
    return next(tensors(inputs))


def _sets(case: Case, cache: Cache, device: torch.device) -> list[tuple[Any, ...]]:
    generator = torch.Generator(device=device).manual_seed(0)
    sets = [case.make(generator)]
    count = 2
    if cache == "cold":
        each = sum(t.nbytes for t in tensors(sets[0]))
        count = min(_MOST_SETS, max(2, 1 + math.ceil(2 * last_cache_bytes(device) / each)))
    sets += [case.make(generator) for _ in range(count - 1)]
    for t in tensors(sets):
        assert t.numel() == 0 or t.dtype in (torch.int32, torch.int64) or t.any(), f"{case.label}: an input of zeros"
    return sets


def _runners(case: Case, inputs: tuple[Any, ...], result: Result) -> list[Runner]:
    """Every row of the operation's table but the reference, and the peers; what cannot run goes to `skipped`."""
    seen: list[tuple[registry.Op, tuple[Any, ...], registry.Impl | None]] = []
    with registry.watch(lambda *choice: seen.append(choice)):
        case.call(*_mapped(inputs, torch.clone))
    choices = [choice for choice in seen if choice[0].name == case.op]
    assert choices, f"{case.label}: its call chose {', '.join(c[0].name for c in seen) or 'nothing'}"
    op, args, chosen = choices[0]
    tolerance = case.tolerance or _TOLERANCES[_first(inputs).dtype]
    name = {"op": case.op, "shape": case.shape, "dtype": case.dtype}
    runners = []
    for impl in op.impls[:-1]:
        if reason := op.why_not(impl, *args):
            result.skipped.append({**name, "implementation": impl.name, "reason": reason})
            continue
        ours = impl.name != "torch"
        runners.append(Runner(impl.name, ours, impl is chosen, _binder(case.call), {case.op: impl.name}, tolerance))
    for peer in case.peers:
        if peer.missing:
            result.skipped.append({**name, "implementation": peer.name, "reason": peer.missing})
        else:
            runners.append(Runner(peer.name, False, False, peer.bind, {}, peer.tolerance or tolerance))
    return runners


def _binder(call: Callable[..., Any]) -> Callable[..., Bound]:
    return lambda *inputs: lambda: call(*inputs)


def _check(case: Case, runner: Runner, sets: list[tuple[Any, ...]]) -> str | None:
    """Computes the first and the last set; why the answer is refused, None where it is right."""
    worst = worst_absolute = 0.0
    for inputs in (sets[0], sets[-1]):
        with registry.use(**{case.op: "reference"}):
            wanted = list(tensors((case.truth or case.call)(*_mapped(inputs, _double))))
        try:
            with registry.use(**runner.choice):
                got = list(tensors(runner.bind(*_mapped(inputs, torch.clone))()))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if len(got) < len(wanted):
            return f"{len(got)} results; wanted {len(wanted)}"
        for g, w in zip(got, wanted, strict=False):
            if g.shape != w.shape:
                return f"shape {tuple(g.shape)}; wanted {tuple(w.shape)}"
            if w.numel() == 0:
                continue
            absolute = (g.double() - w.double()).abs().max().item()
            relative = absolute / max(w.double().abs().max().item(), 1e-30)
            if not relative <= runner.tolerance:  # NaN is refused too
                return f"wrong: error {relative:.2e} of the truth's largest value, allowed are {runner.tolerance:.0e}"
            worst, worst_absolute = max(worst, relative), max(worst_absolute, absolute)
    runner.error, runner.error_absolute = worst, worst_absolute
    return None


def _timed(calls: Sequence[Bound], device: torch.device) -> float:
    """Mean seconds of a call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)
    began = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began) / len(calls)


def _rounds(runners: list[Runner], cache: Cache, settings: Settings, roofs: Callable[[], Any]) -> list[Any]:
    """Takes the samples of all runners in turn; returns the ceilings of each round."""
    for runner in runners:
        with registry.use(**runner.choice):
            runner.bound[-1]()
            once = min(_timed(runner.bound[:1], settings.device) for _ in range(2))
        runner.calls = max(1, min(_MOST_CALLS, math.ceil(_SAMPLE / max(once, 1e-7))))
        runner.seconds = [once]
    slowest = max(r.seconds.pop() for r in runners)
    repeats = min(settings.repeats, _SLOW_REPEATS) if slowest > _SLOW else settings.repeats
    roofs()
    rates, places = [], dict.fromkeys((r.name for r in runners), 0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            rates.append(roofs())
            for i in range(len(runners)):  # each goes first once
                runner = runners[(turn + i) % len(runners)]
                runner.seconds.append(_sample(runner, cache, turn, places, settings.device))
    finally:
        if collecting:
            gc.enable()
    return rates


def _sample(runner: Runner, cache: Cache, turn: int, places: dict[str, int], device: torch.device) -> float:
    bound, count = runner.bound, runner.calls
    if cache == "warm":
        calls = [bound[turn % len(bound)]] * count
    else:
        calls = [bound[(places[runner.name] + i) % len(bound)] for i in range(count)]
        places[runner.name] += count
    with registry.use(**runner.choice):
        if cache == "warm":
            calls[0]()
        return _timed(calls, device)


def _roofs(case: Case, kind: str, warm_bytes: int | None, ceilings: Ceilings) -> tuple[float, float]:
    return ceilings.rate(kind), ceilings.bandwidth(_traffic(case), warm_bytes)


def _traffic(case: Case) -> str:
    return "copy" if case.writes > _COPYING * (case.reads + case.writes) else "read"


def _rows(
    case: Case, cache: Cache, kind: str, runners: list[Runner], rates: list[tuple[float, float]], load: float
) -> list[Row]:
    rate, bandwidth = (statistics.median(values) for values in zip(*rates, strict=True))
    moved = case.reads + case.writes
    peers = {r.name: statistics.median(r.seconds) for r in runners if not r.ours}
    best = min(peers, key=lambda name: peers[name], default=None)
    rows = []
    for r in runners:
        seconds = statistics.median(r.seconds)
        low, high = quantile(r.seconds, 0.2), quantile(r.seconds, 0.8)
        shares = {kind: case.flops / seconds / rate, _traffic(case): moved / seconds / bandwidth}
        roof = max(shares, key=lambda name: shares[name])
        rows.append(
            Row(
                case.op, r.name, case.shape, case.dtype, cache,
                median_ms=_round(seconds * 1e3), spread=_round((high - low) / seconds, 3),
                gflops=_round(case.flops / seconds / 1e9), gbps=_round(moved / seconds / 1e9),
                share_of_ceiling=_round(shares[roof], 3), ceiling=roof,
                error=_round(r.error, 3), error_absolute=_round(r.error_absolute, 3),
                ratio_to_peer=None if best is None else _round(peers[best] / seconds, 4), peer=best,
                ratios={name: _round(other / seconds, 4) for name, other in peers.items()},
                ours=r.ours, chosen=r.chosen, repeats=len(r.seconds), calls=r.calls, flops=case.flops, bytes=moved,
                ceiling_gflops=_round(rate / 1e9), ceiling_gbps=_round(bandwidth / 1e9), other_load=round(load, 3),
            )
        )  # fmt: skip
    return rows


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _round(value: float, digits: int = 5) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")


def as_json(row: Row) -> dict[str, Any]:
    return asdict(row)
