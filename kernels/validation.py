"""Measures a row of a table against the truth and against the row that would run in its place: one call, one record.

Knows tables, clocks and records; does not know which operations there are, where their arguments come from, or files.

1. The reference computes the call in float64, the plain PyTorch row and the row in question in the call's own dtypes;
   the error rule is asked of every result, of what is changed in place, and, where wanted, of every gradient.
2. In rounds the row and the next candidate take a sample in turn: several calls between two CUDA events (on a CPU, a
   clock), on the same inputs, so caches are warm; the launch from Python is part of a call. Medians are compared.
"""

import contextlib
import dataclasses
import functools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from miss.kernels import evidence
from miss.kernels.evidence import SLACK
from miss.kernels.launches import Asked, Pick, trial, watched
from miss.kernels.records import Record, now
from miss.kernels.registry import BACKWARD, OPS, Impl, Op, use, watch
from miss.kernels.shape_classes import shape_class, signature, with_gradient

# Of a result's largest value: what two right kernels may differ by beyond the rule, one place of a half dtype.
_FLOORS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_UNEQUAL = 0.01  # the share of whole numbers (codes, drawn indices) that may differ where scores tie
_PACKAGES = ("torch", "triton")
WHOLE = "whole call"  # in place of a row's name


@dataclass(frozen=True)
class Pace:
    """How long is measured."""

    rounds: int = 15
    sample: float = 1e-3  # seconds of calls between two events
    most_calls: int = 100


QUICK = Pace(rounds=3, sample=1e-4, most_calls=5)


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of a table as a public function gave them; `wanted`: which of them ask for a gradient."""

    op: Op
    args: tuple[Any, ...]
    wanted: tuple[int, ...] = ()

    @property
    def shape_class(self) -> str:
        name = shape_class(self.op.name, signature(self.args))
        return with_gradient(name) if self.wanted else name

    @property
    def device(self) -> torch.device:
        return next(tensors(self.args)).device


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, change) for v in value))
    return type(value)(mapped(v, change) for v in value) if isinstance(value, list | tuple) else value


def _copy(t: Tensor) -> Tensor:
    """A copy with the same strides, as views of a packed projection have them; contiguous where elements coincide."""
    if 0 in t.stride() or t.numel() == 0:
        return t.clone()
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _changes_arguments(op: Op) -> bool:
    custom = getattr(torch.ops.miss, op.name, None)
    return custom is not None and bool(custom.default._schema.is_mutable)


def _custom(op: Op) -> Callable[..., Any] | None:
    return getattr(torch.ops.miss, op.name, None) if op.name + BACKWARD in OPS else None


def gather(call: Callable[[], Any]) -> list[Call]:
    """Every choice that `call` makes, with its arguments, and those of its gradient; each with and without it.

    A backward table is asked by way of the custom operator: what autograd sees through asks none.
    """
    seen: list[Call] = []

    def watcher(op: Op, args: tuple[Any, ...], _: Impl | None) -> None:
        asks = torch.is_grad_enabled() and _custom(op) is not None
        wanted = [i for i, a in enumerate(args) if asks and isinstance(a, Tensor) and a.requires_grad]
        before = mapped(args, _copy if _changes_arguments(op) else Tensor.detach)
        seen.append(Call(op, before, tuple(wanted)))

    with watch(watcher):
        call()
        for one in [c for c in seen if c.wanted]:
            _passes(one, None)()
    return [*(dataclasses.replace(c, wanted=()) for c in seen), *(c for c in seen if c.wanted)]


def _passes(call: Call, implementation: str | None) -> Callable[[], list[Tensor | None]]:
    """Both passes by that row, or by way of the custom operator: the first result and the gradients."""
    custom, op = _custom(call.op), call.op
    assert custom is not None
    args = list(call.args)
    for i in call.wanted:
        args[i] = args[i].detach().requires_grad_()
    leaves = [args[i] for i in call.wanted]

    @torch.enable_grad()
    def run() -> list[Tensor | None]:
        if implementation is None:
            result = custom(*args)
        else:
            with use(**{op.name: implementation}):
                result = op.call(custom, *args)
        first = next(tensors(result))
        with use(**({} if implementation is None else {op.name: implementation})):
            grads = torch.autograd.grad(first, leaves, torch.ones_like(first), allow_unused=True)
        return [first.detach(), *grads]

    return run


def _bound(call: Call, impl: Impl) -> Callable[[], Any]:
    if call.wanted:
        return _passes(call, impl.name)

    @torch.no_grad()
    def run() -> Any:
        return impl.run(*call.args)

    return run


def ours(op: Op, device: torch.device) -> list[Impl]:
    """The rows that are measured on a device, the plainest first: on a GPU those that need evidence."""
    rows = [i for i in op.impls if (i.sources if device.type == "cuda" else i.device == "cpu")]
    return rows[::-1]


def blank(call: Call, impl: Impl) -> Record:
    """A record before anything is measured."""
    return _blank(call.op.name, impl.name, call.shape_class, impl.sources, call.device)


def blank_call(op: Op, label: str, device: torch.device) -> Record:
    """What stands for a whole call of a public function, before any of its rows is measured: that it ends its process
    is a finding too, of no row in particular, and the call is not made again with the same sources."""
    modules = tuple(dict.fromkeys(module for impl in op.impls for module in impl.sources))
    return _blank(op.name, WHOLE, label, modules, device)


def _blank(op: str, implementation: str, shape: str, modules: tuple[str, ...], device: torch.device) -> Record:
    gpu, architecture = "cpu", "cpu"
    if device.type == "cuda":
        target = evidence.Target(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
        gpu, architecture = str(target.name), target.architecture
    return Record(
        op=op,
        implementation=implementation,
        gpu=gpu,
        architecture=architecture,
        shape_class=shape,
        sources=evidence.sources_hash(modules),
        launches={},
        correct=False,
        error=None,
        plain_error=None,
        candidate=None,
        speedup=None,
        microseconds=None,
        failure=None,
        versions=_versions(),
        date=now(),
    )


def sound(device: torch.device) -> bool:
    """Whether the process can still use its device: an access beyond memory ends that, for all that comes after."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def measure(call: Call, impl: Impl, pace: Pace, against: Pick | None = None) -> Record:
    """The record of a row at a call. What the row raises is its failure; what the others raise is raised.

    against: launches of the row itself, whose time is taken in turn in place of the next candidate's.

    Raises:
        torch.OutOfMemoryError: the inputs, in float64 once, do not fit: nothing is said of the row.
    """
    record, op = blank(call, impl), call.op
    asked: Asked = record.launches
    below = op.impls[op.impls.index(impl) + 1 :]
    candidate = next(i for i in below if op.why_not(i, *call.args) is None)
    plain = next((i for i in below if i.name in ("torch", "composed")), candidate)
    truth = _results(_double(call), op.impls[-1])
    usual = _results(call, plain)
    try:
        with watched(asked):
            got = _results(call, impl)
        error, plain_error, right = _compare(got, usual, truth)
        del got, usual, truth
        if not math.isfinite(error):
            failure = "its results have another shape or are not finite where the truth is"
            return dataclasses.replace(record, candidate=candidate.name, failure=failure)
        measured = dataclasses.replace(
            record, candidate=candidate.name, correct=right, error=_round(error), plain_error=_round(plain_error)
        )
        if not right:
            return measured
        beside = _bound(call, candidate) if against is None else _bound(call, impl)
        within = contextlib.nullcontext if against is None else functools.partial(trial, against)
        mine, other = _race([_bound(call, impl), beside], [contextlib.nullcontext, within], call.device, pace)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever a kernel, a compiler or a driver raises
        text = " ".join(str(failure).split())[:300] or type(failure).__name__
        return dataclasses.replace(record, candidate=candidate.name, failure=f"{type(failure).__name__}: {text}")
    return dataclasses.replace(measured, speedup=_round(other / mine), microseconds=_round(mine * 1e6))


def _double(call: Call) -> Call:
    def change(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    return dataclasses.replace(call, args=mapped(call.args, change))


def _results(call: Call, impl: Impl) -> list[Tensor | None]:
    """What a row gives; of one that returns nothing, the arguments that it has changed. None where it keeps nothing."""
    fresh = dataclasses.replace(call, args=mapped(call.args, lambda t: _copy(t.detach())))
    found = _bound(fresh, impl)()
    if call.device.type == "cuda":
        torch.cuda.synchronize(call.device)  # an error of a kernel appears here, not in what is asked next
    if found is None:
        return list(tensors(fresh.args))
    return list(found) if isinstance(found, list | tuple) else [found]


def _compare(
    got: list[Tensor | None], plain: list[Tensor | None], truth: list[Tensor | None]
) -> tuple[float, float, bool]:
    """(largest error, the plain row's, whether the rule holds for every result), relative to each result's size."""
    if len(got) != len(truth):
        return math.inf, 0.0, False
    pairs, others = [], []
    for g, p, t in zip(got, plain, truth, strict=True):
        if t is None or g is None:
            continue
        beside = None if p is None or p.shape != t.shape else _error(p, t)
        pairs.append((_error(g, t), beside, _UNEQUAL if not g.is_floating_point() else _FLOORS[g.dtype]))
        others += [] if beside is None else [beside]
    usual = max(others, default=0.0)
    right = all(error <= SLACK * (usual if beside is None else beside) + floor for error, beside, floor in pairs)
    return max((error for error, _, _ in pairs), default=0.0), usual, right and bool(pairs)


def _error(got: Tensor, truth: Tensor) -> float:
    if got.shape != truth.shape:
        return math.inf
    if truth.numel() == 0:
        return 0.0
    if not got.is_floating_point():
        return (got != truth).double().mean().item()
    value, wild = got.double(), ~truth.isfinite()
    if not ((value == truth) | (value.isnan() & truth.isnan()))[wild].all():
        return math.inf
    size = truth.masked_fill(wild, 0.0).abs().max().item()
    apart = (value - truth).masked_fill(wild, 0.0).abs().max().item()
    return apart / max(size, 1e-30) if math.isfinite(apart) else math.inf


def _race(
    runs: list[Callable[[], Any]], within: list[Callable[[], Any]], device: torch.device, pace: Pace
) -> tuple[float, float]:
    """Median seconds a call of each, in turn, its samples within a block of its own."""
    counts = []
    for run, block in zip(runs, within, strict=True):
        with block():
            run()
            once = min(_sample(run, 1, device) for _ in range(2))
        counts.append(max(1, min(pace.most_calls, math.ceil(pace.sample / max(once, 1e-7)))))
    seconds: list[list[float]] = [[], []]
    for turn in range(pace.rounds):
        for i in (0, 1) if turn % 2 else (1, 0):
            with within[i]():
                seconds[i].append(_sample(runs[i], counts[i], device))
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _sample(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def _round(value: float) -> float:
    return float(f"{value:.4g}")
