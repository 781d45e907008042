"""Whether an answer is right: every implementation of a case against its float64 truth, before anything is timed.

Knows the registry's reference; does not know clocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Bound, Case
from miss.kernels import registry
from miss.kernels.validation import mapped, tensors

Checked = tuple[tuple[Any, ...], list[Tensor]]  # a set of inputs, its results in float64
_COSTLY = 2e9  # FLOPs beyond which one set is checked, not two: the float64 reference has 100 GFLOP/s at best


@dataclass
class Runner:
    """One that takes part in a case."""

    name: str
    ours: bool
    chosen: bool
    bind: Callable[..., Bound]
    choice: dict[str, str]
    tolerance: float
    results: int | None = None
    skips: int = 0
    error: float = math.nan
    error_absolute: float = math.nan
    calls: int = 1
    warms: bool = True  # whether a call that is not timed comes before each sample
    bound: list[Bound] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def one_line(error: BaseException) -> str:
    """An error's kind and its first words."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no words'])[0][:200]}"


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.clone()


def truths_of(case: Case, sets: list[tuple[Any, ...]]) -> list[Checked]:
    """The first and the last set, or the last alone where the truth is costly, with their results in float64."""
    chosen = sets[-1:] if case.flops > _COSTLY else [sets[0], sets[-1]]
    with registry.use(**{case.op: "reference"}):
        return [
            (one, [t.double() for t in tensors((case.truth or case.call)(*mapped(one, _double)))]) for one in chosen
        ]


def check(runner: Runner, truths: list[Checked]) -> str | None:
    """Computes those sets; why the answer is refused, None where it is right."""
    runner.error = runner.error_absolute = 0.0
    for inputs, wanted in truths:
        try:
            with registry.use(**runner.choice):
                got = list(tensors(runner.bind(*mapped(inputs, torch.clone))()))
        except Exception as error:  # a library, a compiler or a driver raises what it likes
            return one_line(error)
        asked = wanted[runner.skips : runner.results]
        if len(got) < len(asked):
            return f"{len(got)} results; wanted {len(asked)}"
        for g, w in zip(got, asked, strict=False):
            if reason := _compare(runner, g, w):
                return reason
    return None


def _compare(runner: Runner, got: Tensor, wanted: Tensor) -> str | None:
    """Keeps the largest error."""
    if got.shape != wanted.shape:
        return f"shape {tuple(got.shape)}; wanted {tuple(wanted.shape)}"
    if wanted.numel() == 0:
        return None
    absolute = (got.double() - wanted).abs().max().item()
    relative = absolute / max(wanted.abs().max().item(), 1e-30)
    if not relative <= runner.tolerance:  # NaN is refused too
        return f"wrong: error {relative:.2e} of the truth's largest value, allowed are {runner.tolerance:.0e}"
    runner.error, runner.error_absolute = max(runner.error, relative), max(runner.error_absolute, absolute)
    return None
