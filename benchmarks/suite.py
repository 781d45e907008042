"""All operations' cases, one after another: which there are, which of them were asked for, and the run.

Knows the bench files by the folders of kernels/; does not know how a case is measured, files or plots.
"""

import importlib
import importlib.util
import pkgutil
import time
from collections.abc import Callable, Iterator

import torch

import miss.kernels
from miss.benchmarks.cases import Cache, Case, Result, Settings
from miss.benchmarks.ceilings import Ceilings
from miss.benchmarks.gpu import aims
from miss.benchmarks.harness import measure
from miss.benchmarks.shapes import Shapes
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
) -> Result:
    """Measures every case until the time is over; `show` is called as each is done, with all so far."""
    total = Result()
    for case, cache in progress(cases):
        if time.time() > settings.deadline:
            name = {"op": case.op, "shape": case.shape, "dtype": case.dtype}
            total.skipped.append({**name, "implementation": "all", "reason": "the time was over"})
            continue
        try:
            one = measure(case, cache, settings, ceilings)
        except Exception as error:  # of its inputs or truth, or a device that is lost: it is said, and the next goes on
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            name = {"op": case.op, "shape": case.shape, "dtype": case.dtype}
            one = Result(refused=[{**name, "implementation": "all", "ours": True, "reason": reason}])
        total.rows += one.rows
        total.refused += [r for r in one.refused if r not in total.refused]
        total.skipped += [s for s in one.skipped if s not in total.skipped]
        show(case, cache, one, total)
    return total
