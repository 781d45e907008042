"""Measures one case of an operation: all that can compute it, in turn, within one process.

Knows the registry, clocks and caches; does not know which operations there are, files or plots.

1. Sets of random inputs are made: two for a warm cache; for a cold one so many that they exceed twice the last cache.
2. Every implementation of the operation's table that fits (but the reference) and every peer computes a set; what errs
   from the float64 truth by more than the case allows is refused, and is not timed.
3. In rounds, each takes a sample in turn, and the ceilings take theirs: a clock that slows down slows all of them.
     warm: a call that is not timed (unless memory is too small a part of the time to matter, or the inputs are larger
     than the last cache), then calls on the same set; the next round has the next set.
     cold: every call has the next set; before it comes around, all the others were read.
   A sample of short calls is the mean of several. The public function is called, the choice of implementation included.
"""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Bound, Cache, Case, Result, Row, Settings
from miss.benchmarks.ceilings import Ceilings, last_cache_bytes
from miss.benchmarks.check import Runner, check, mapped, one_line, tensors, truths_of
from miss.benchmarks.load import Busy
from miss.kernels import registry
from miss.kernels.validation import sound

# Of the truth's largest value; the error of sums that PyTorch itself rounds on the way (scores, halves) is within it.
_TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_KINDS = {torch.float64: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SAMPLE = 4e-4  # seconds that a sample of short calls lasts, so that the clock's own cost is below 0.1 %
_MOST_CALLS = 64
_SLOW_MEMORY, _FELT = 2e10, 0.03  # bytes a second; the share of a call's time that reading its inputs must have
_MOST_SETS = 256
_SLOW = 0.3  # seconds: beyond it, fewer repeats
_SLOW_REPEATS = 7
_COPYING = 0.25  # the share of writes beyond which the bandwidth to compare with is that of copying


class DeviceLost(Exception):
    """The CUDA context of this process went with an implementation: whatever is asked next fails too."""

    def __init__(self, runner: Runner, reason: str) -> None:
        super().__init__(reason)
        self.implementation, self.ours = runner.name, runner.ours


@contextlib.contextmanager
def _blamed(runner: Runner, device: torch.device) -> Iterator[None]:
    """What fails inside is `runner`'s fault where the device is lost with it."""
    try:
        yield
    except Exception as error:
        if sound(device):
            raise
        raise DeviceLost(runner, one_line(error)) from error


@torch.no_grad()
def measure(case: Case, cache: Cache, settings: Settings, ceilings: Ceilings) -> Result:
    """Checks, then times all that can compute `case`.

    Raises:
        DeviceLost: an implementation took the CUDA context with it.
    """
    result, name = Result(), {"op": case.op, "shape": case.shape, "dtype": case.dtype}
    sets = _sets(case, cache, settings.device)
    runners, truths = [], truths_of(case, sets)
    for runner in _runners(case, sets[0], result):
        settings.heard()
        if reason := check(runner, truths):
            if not sound(settings.device):
                raise DeviceLost(runner, reason)
            result.refused.append({**name, "implementation": runner.name, "ours": runner.ours, "reason": reason})
        else:
            with _blamed(runner, settings.device):
                runner.bound = [runner.bind(*one) for one in sets]
            runners.append(runner)
    settings.heard()
    if runners:
        kind = case.kind or _KINDS[_first(sets[0]).dtype]
        warm_bytes = int(case.reads + case.writes) if cache == "warm" else None
        busy = Busy()
        _calibrate(case, runners, settings.device)
        rates = _rounds(runners, cache, settings, lambda: _roofs(case, kind, warm_bytes, ceilings))
        result.rows = _rows(case, cache, kind, runners, rates, busy.others())
    return result


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
    bind = case.bind or _binder(case.call)
    with registry.watch(lambda *choice: seen.append(choice)):
        bind(*mapped(inputs, torch.clone))()
    choices = [choice for choice in seen if choice[0].name == case.op]
    assert choices, f"{case.label}: its call chose {', '.join(c[0].name for c in seen) or 'nothing'}"
    op, args, chosen = choices[0]
    tolerance = case.tolerance or _TOLERANCES[_first(inputs).dtype]
    name = {"op": case.op, "shape": case.shape, "dtype": case.dtype}
    runners = []
    for impl in op.impls[:-1]:
        if reason := op.cannot(impl, *args):
            result.skipped.append({**name, "implementation": impl.name, "reason": reason})
            continue
        ours = impl.device == "cpu" or bool(impl.sources) or impl.name == "composed"  # the rest are libraries
        runners.append(Runner(impl.name, ours, impl is chosen, bind, {case.op: impl.name}, tolerance))
    for peer in case.peers:
        if peer.missing:
            result.skipped.append({**name, "implementation": peer.name, "reason": peer.missing})
        else:
            allowed = peer.tolerance or tolerance
            runners.append(Runner(peer.name, False, False, peer.bind, {}, allowed, peer.results, peer.skips))
    return runners


def _binder(call: Callable[..., Any]) -> Callable[..., Bound]:
    return lambda *inputs: lambda: call(*inputs)


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


def _calibrate(case: Case, runners: list[Runner], device: torch.device) -> None:
    """Warms up; how many calls make a sample, and whether one goes before it."""
    moved = case.reads + case.writes
    for runner in runners:
        with _blamed(runner, device), registry.use(**runner.choice):
            runner.bound[-1]()
            once = min(_timed(runner.bound[:1], device) for _ in range(2))
        runner.calls = max(1, min(_MOST_CALLS, math.ceil(_SAMPLE / max(once, 1e-7))))
        runner.warms = moved <= last_cache_bytes(device) and moved / _SLOW_MEMORY > _FELT * once
        runner.seconds = [once]


def _rounds(runners: list[Runner], cache: Cache, settings: Settings, roofs: Callable[[], Any]) -> list[Any]:
    """Takes the samples of all runners in turn; returns the ceilings of each round."""
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
    with _blamed(runner, device), registry.use(**runner.choice):
        if cache == "warm" and runner.warms:
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
