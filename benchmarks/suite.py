"""All operations' cases, one after another: which there are, which of them were asked for, and the run.

Knows the bench files by the folders of kernels/; does not know how a case is measured, files or plots.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import miss.kernels
from miss.benchmarks import going_on
from miss.benchmarks.cases import Cache, Case, Result, Settings
from miss.benchmarks.ceilings import Ceilings
from miss.benchmarks.gpu import aims
from miss.benchmarks.harness import DeviceLost, measure
from miss.benchmarks.shapes import Shapes
from miss.kernels.validation import sound
from miss.models.config import did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMES = ("w8a8", "w8", "w4")
DEFAULT = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}


def folders() -> list[str]:
    """The operations' folders that have a benchmarks/bench_<folder>.py."""
    found = [m.name for m in pkgutil.iter_modules(miss.kernels.__path__) if m.ispkg]
    return [name for name in found if importlib.util.find_spec(f"miss.benchmarks.bench_{name}") is not None]


def select(
    ops: tuple[str, ...], dtypes: tuple[str, ...], names: tuple[str, ...], device: torch.device
) -> list[tuple[Case, Cache]]:
    """The cases of the folders or operations `ops` (all where empty) in `dtypes`, at the shapes `names`.

    Raises:
        ValueError: a name that is not known, with those that are.
    """
    for name in dtypes:
        if name not in (*DTYPES, *SCHEMES):
            raise ValueError(f"--dtype: got {name}; accepted: {', '.join((*DTYPES, *SCHEMES))}")
    floats = [name for name in dtypes if name in DTYPES] or list(DEFAULT[device.type])
    schemes = [name for name in dtypes if name in SCHEMES]
    found: dict[str, list[Case]] = {folder: [] for folder in folders()}
    for folder in found:
        module = importlib.import_module(f"miss.benchmarks.bench_{folder}")
        wanted_dtypes = tuple(DTYPES[f] for f in floats)
        for name in dict.fromkeys(names):
            if name in aims.SIZES:
                found[folder] += aims.cases(folder, wanted_dtypes, device, aims.SIZES[name])
            else:
                found[folder] += module.cases(Shapes(name, device), wanted_dtypes)
    _check_ops(ops, found)
    wanted = [
        case
        for folder, cases in found.items()
        for case in cases
        if (not ops or folder in ops or case.op in ops) and (not schemes or case.dtype.rpartition("/")[2] in schemes)
    ]
    unique = {case.label: case for case in wanted}
    return [(case, cache) for case in unique.values() for cache in case.caches]


def _check_ops(ops: tuple[str, ...], found: dict[str, list[Case]]) -> None:
    known = list(dict.fromkeys([*found, *(case.op for cases in found.values() for case in cases)]))
    for name in ops:
        if name not in known:
            raise ValueError(f"no benchmark of {name}{did_you_mean(name, known)}; known: {', '.join(known)}")


def run(
    cases: list[tuple[Case, Cache]],
    settings: Settings,
    ceilings: Ceilings,
    progress: Callable[[list[tuple[Case, Cache]]], Iterator[tuple[Case, Cache]]],
    show: Callable[[Case, Cache, Result, Result], None],
    earlier: Result | None = None,
    keep: Callable[[Result], None] = lambda total: None,
) -> Result:
    """Measures every case until the time is over or the device is lost.

    earlier: what an earlier run has left: it goes on behind it. keep: called with all so far as each case is begun, so
    that one which ends the process is known to the next. show: called as each is done.
    """
    total = earlier or Result()
    total.skipped = [s for s in total.skipped if s["reason"] != going_on.LATE]
    total.refused += going_on.settled(total.cases)
    over = going_on.over(total.cases)
    for case, cache in progress(cases):
        name = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "cache": cache}
        if going_on.key(name) in over:
            continue
        if time.time() > settings.deadline:
            total.skipped.append({**name, "implementation": "all", "reason": going_on.LATE})
            continue
        going_on.note(total.cases, name, "begun")
        keep(total)
        try:
            with _watched(settings.stall) as heard:
                one = _one(case, cache, replace(settings, heard=heard), ceilings)
        except BaseException:  # the time or a person ends the run: not this case's fault
            going_on.note(total.cases, name, "cut")
            keep(total)
            raise
        total.rows += one.rows
        total.refused += [r for r in one.refused if r not in total.refused]
        total.skipped += [s for s in one.skipped if s not in total.skipped]
        total.lost = one.lost
        going_on.note(total.cases, name, "lost" if one.lost else "done")
        show(case, cache, one, total)
        if one.lost:
            break
    return total


def _one(case: Case, cache: Cache, settings: Settings, ceilings: Ceilings) -> Result:
    """A case's result; what failed as a whole is refused as a whole, and the next goes on where the device is sound."""
    name = {"op": case.op, "shape": case.shape, "dtype": case.dtype}
    try:
        return measure(case, cache, settings, ceilings)
    except DeviceLost as lost:
        who = {"implementation": lost.implementation, "ours": lost.ours}
        return Result(refused=[{**name, **who, "reason": f"the device was lost with it: {lost}"}], lost=True)
    except Exception as error:  # of its inputs or its truth
        gone = not sound(settings.device)
        reason = f"{'the device was lost with it: ' * gone}{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Result(refused=[{**name, "implementation": "all", "ours": True, "reason": reason}], lost=gone)


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[Callable[[], None]]:
    """Ends the process where nothing is heard for longer: what hangs in a driver or a compiler hears nothing else."""
    timer: threading.Timer | None = None

    def heard() -> None:
        nonlocal timer
        if timer is not None:
            timer.cancel()
        timer = threading.Timer(seconds, lambda: os._exit(going_on.AGAIN))
        timer.daemon = True
        timer.start()

    if not math.isfinite(seconds):
        yield lambda: None
        return
    heard()
    try:
        yield heard
    finally:
        assert timer is not None
        timer.cancel()
