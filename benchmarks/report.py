"""A run for people: a table a case, the ceilings, what changed between two runs.

Knows the rows' columns; does not know how they were measured, or files.
"""

import math
from typing import Any

from miss.benchmarks.cases import Cache, Case, Result

WIDTH = 120
_BUSY = 0.05  # of all cores' time; more than this, and times are no longer the implementation's own
_HEAD = (
    f"  {'implementation':<22}{'median ms':>11}{'spread':>8}{'GFLOP/s':>10}{'GB/s':>8}"
    f"{'share':>8} of {'ceiling':<8}{'error':>10}{'to peer':>10}"
)


def heading() -> str:
    return _HEAD


def block(case: Case, cache: Cache, result: Result) -> str:
    """A case and a line an implementation. `>` is what runs by itself, `*` the peer that ratios are to."""
    moved = (case.reads + case.writes) / 1e6
    title = f"{case.op}  {case.shape}  {case.dtype}  {cache}  ({case.flops / 1e9:.3g} GFLOP, {moved:.3g} MB)"
    lines = [title[:WIDTH]]
    for row in result.rows:
        mark = (">" if row.chosen else " ") + ("*" if row.implementation == row.peer else " ")
        ratio = "" if row.ratio_to_peer is None else f"{row.ratio_to_peer:.2f}x"
        lines.append(
            f"{mark}{row.implementation:<22}{number(row.median_ms):>11}{row.spread:>8.0%}{row.gflops:>10.1f}"
            f"{row.gbps:>8.1f}{row.share_of_ceiling:>8.0%} of {row.ceiling:<8}{row.error:>10.1e}{ratio:>10}"
        )
    if result.rows and result.rows[0].other_load > _BUSY:
        lines.append(f"! other processes had {result.rows[0].other_load:.0%} of the cores meanwhile")
    lines += [f"! {r['implementation']:<22}refused, {r['reason']}"[:WIDTH] for r in result.refused]
    return "\n".join(lines)


def number(value: float) -> str:
    """To four digits: 1234, 12.34, 0.01234."""
    digits = 3 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, min(6, digits))}f}"


def ceilings(found: dict[str, Any]) -> str:
    """A line a number of threads."""
    lines = [f"ceilings: {found['source']}"]
    for name, values in found.items():
        if name.startswith(("threads_", "device")):
            shown = {key: f"{v['median']:.0f} ±{v['spread']:.0%}" for key, v in values.items()}
            for unit, suffix in (("GFLOP/s", "_gflops"), ("GB/s", "_gbps")):
                part = [f"{key.removesuffix(suffix)} {text}" for key, text in shown.items() if key.endswith(suffix)]
                lines.append(f"  {name:<10} {unit + ':':<9}{', '.join(part)}")
    return "\n".join(lines)


def environment(found: dict[str, Any]) -> str:
    """Two lines of what it ran on."""
    skipped = ("before", "after")
    words = [f"{key} {value}" for key, value in found.items() if value is not None and key not in skipped]
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > WIDTH - 2:
            lines.append("")
        lines[-1] += ("; " if lines[-1] else "") + word
    return "\n".join(lines)
