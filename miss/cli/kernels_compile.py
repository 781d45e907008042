"""miss kernels compile: every Triton kernel for GPUs that need not be here, held against the report in the repository.
miss kernels report: that report, the worst first.

Knows the report and its faults; does not know how a kernel is compiled.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miss.kernels import compiled
from miss.kernels.compiled import ARCHS, Key, Report, Row
from miss.models.config import did_you_mean

if TYPE_CHECKING:  # it imports triton, which may not be installed
    from miss.kernels.offline import Failure, Found

    Work = tuple[Found, str]

RENEW = "miss kernels compile --only-changed"


@dataclass
class CompileArgs:
    """Compile every Triton kernel ahead of time, in every configuration that is launched: no GPU is needed.

    Shows registers, spills, shared memory, tensor core instructions and predicted occupancy, the worst first, and
    brings the report kernels/compiled.json up to date. That a kernel compiles does not show that it is right or fast.

    Exit code 1 where a default configuration spills, where a kernel does not compile or cannot be launched, or where
    it is worse than in the report: more spills, over 10 % more registers in a default configuration, tensor core
    instructions lost. With another version of Triton than the report's nothing is written and only spills count.
    """

    arch: tuple[str, ...] = ARCHS
    """Architectures, with commas or spaces between: sm_80 (A100), sm_86, sm_89 (RTX 4090), sm_90 (H100, H200), sm_100,
    sm_120. The report holds sm_80 and sm_90; others are shown only."""
    op: tuple[str, ...] = ()
    """Only these operations (or folders of kernels/); all where none is named."""
    only_changed: bool = False
    """Only what the report does not hold, or holds of older sources."""
    sample: int = 0
    """With --only-changed: also this many unchanged ones, always the same, of as many operations as there are."""
    check: bool = False
    """Write nothing, and let exit code 1 also mean that the report is not up to date."""
    report: Path = compiled.REPORT
    """The report to compare with, and to write."""
    jobs: int = 0
    """Processes; 0: one a processor."""
    rows: int = 40
    """Lines of the table; 0: all."""
    json: bool = False
    """Print everything as one JSON object."""


def compile_kernels(args: CompileArgs) -> int:
    archs = _archs(args.arch)
    from miss.kernels import offline

    everything = offline.find()
    found = _named(everything, args.op)
    report = compiled.load(args.report)
    wanted = [(f, arch) for f in found for arch in archs if offline.compiles_for(f.case, arch)]
    kept = {_key(f, arch) for f in everything for arch in ARCHS if offline.compiles_for(f.case, arch)}
    stale, gone = _stale(wanted, report), report.rows.keys() - kept
    start = time.perf_counter()
    rows, failures = _compile(_changed(wanted, stale, args.sample) if args.only_changed else wanted, args.jobs)
    seconds = round(time.perf_counter() - start, 1)
    problems = [f"{' '.join(f.key)}: {f.reason}" for f in failures]
    problems += compiled.judge(rows, report, offline.VERSION)
    if args.check and (stale or gone):
        problems.append(f"{args.report.name}: {len(stale)} missing or old, {len(gone)} of no case: run `{RENEW}`")
    notes = _notes(report, offline.VERSION)
    if not args.check and not notes:
        new = report.rows | {row.key: row for row in rows}
        notes.append(_write(Report(offline.VERSION, {k: r for k, r in new.items() if k in kept}), args.report))
    versions = {"triton": offline.VERSION, "report_triton": report.triton}
    result = {**versions, "seconds": seconds, "changed": sorted(stale | gone), "problems": problems, "notes": notes}
    if args.json:
        print(json.dumps({**result, "rows": [row.as_json() for row in rows]}))
    else:
        print("\n".join(_lines(rows, report, args.rows, result)))
    return 1 if problems else 0


@dataclass
class ReportArgs:
    """Show what the Triton kernels took when they were compiled for kernels/compiled.json, the worst first."""

    arch: tuple[str, ...] = ARCHS
    """Architectures, with commas or spaces between: sm_80, sm_90."""
    op: tuple[str, ...] = ()
    """Only these operations; all where none is named."""
    report: Path = compiled.REPORT
    """The report to show."""
    rows: int = 40
    """Lines of the table; 0: all."""
    json: bool = False
    """Print everything as one JSON object."""


def show_report(args: ReportArgs) -> int:
    archs, report = _archs(args.arch), compiled.load(args.report)
    if not report.rows:
        raise ValueError(f"{args.report}: no report; `miss kernels compile` writes it")
    _known(args.op, {row.op for row in report.rows.values()})
    rows = [row for row in report.rows.values() if row.arch in archs and row.op in (args.op or (row.op,))]
    if args.json:
        print(json.dumps({"triton": report.triton, "rows": [row.as_json() for row in rows]}))
        return 0
    print("\n".join(compiled.table(rows, Report(), args.rows)))
    print(f"{len(rows)} compiled with Triton {report.triton}; what they are worth on a GPU this does not show")
    return 0


def _archs(given: tuple[str, ...]) -> list[str]:
    archs = [name for text in given for name in text.split(",") if name]
    for name in archs:
        if name not in compiled.LIMITS:
            raise ValueError(f"--arch {name}: unknown; known: {', '.join(compiled.LIMITS)}")
    return list(dict.fromkeys(archs))


def _known(names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            hint = did_you_mean(name, sorted(known))
            raise ValueError(f"no operation named {name} has Triton kernels{hint}; known: {', '.join(sorted(known))}")


def _named(everything: "list[Found]", names: tuple[str, ...]) -> "list[Found]":
    folders = {f.module.split(".")[0] for f in everything}
    _known(names, folders | {f.case.op for f in everything})
    return [f for f in everything if not names or {f.case.op, f.module.split(".")[0]} & set(names)]


def _key(found: "Found", arch: str) -> Key:
    return found.case.op, found.case.name, arch


def _stale(wanted: "list[Work]", report: Report) -> set[Key]:
    """What the report has to hold, and does not hold of these sources."""
    from miss.kernels import offline

    rows = {_key(found, arch): found.case for found, arch in wanted if arch in ARCHS}
    return {
        key
        for key, case in rows.items()
        if key not in report.rows or report.rows[key].hash != offline.fingerprint(case)
    }


def _changed(wanted: "list[Work]", stale: set[Key], sample: int) -> "list[Work]":
    """What is stale, and a sample of the rest: the first of each module in the order of a hash, then the second, …"""
    rest = [w for w in wanted if _key(*w) not in stale]
    rest.sort(key=lambda w: hashlib.sha256(str(_key(*w)).encode()).digest())
    turns: Counter[str] = Counter()
    ranked = []
    for found, arch in rest:
        turns[found.module] += 1
        ranked.append((turns[found.module], (found, arch)))
    ranked.sort(key=lambda r: r[0])
    return [w for w in wanted if _key(*w) in stale] + [w for _, w in ranked[:sample]]


def _compile(work: "list[Work]", jobs: int) -> "tuple[list[Row], list[Failure]]":
    from tqdm import tqdm

    from miss.kernels import offline

    jobs = jobs or len(os.sched_getaffinity(0))
    done = list(tqdm(offline.compile_all(work, jobs), total=len(work), unit="kernel", disable=None))
    rows = [row for row in done if isinstance(row, Row)]
    failures = [failure for failure in done if not isinstance(failure, Row)]
    return sorted(rows, key=lambda r: r.key), sorted(failures, key=lambda f: f.key)


def _notes(report: Report, version: str) -> list[str]:
    if report.triton in ("", version):
        return []
    return [
        f"the report is of Triton {report.triton}, this is {version}: only spills are compared, nothing is written "
        f"(remove the report to write it anew with {version})"
    ]


def _write(report: Report, path: Path) -> str:
    try:
        report.save(path)
    except OSError as error:  # the figures are shown all the same
        return f"not written: {path}: {error.strerror}"
    return f"written: {path}"


def _lines(rows: list[Row], report: Report, limit: int, result: dict[str, Any]) -> list[str]:
    lines = compiled.table(rows, report, limit) if rows else ["nothing changed, nothing compiled"]
    spills = sum(row.spill > 0 for row in rows)
    lines.append(f"{len(rows)} compiled with Triton {result['triton']} in {result['seconds']:.0f} s; {spills} spill")
    return lines + result["notes"] + [f"problem: {problem}" for problem in result["problems"]]
