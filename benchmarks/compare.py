"""What got faster or slower between two runs, beyond the noise of both.

Knows the rows' columns; does not know how they were measured.

Times are judged against the ceiling that was measured in the same rounds: slower = (share before / share after) - 1. A
host whose clock fell by a third between two runs is then no regression, nor does a faster one hide one.
"""

import math
from dataclasses import dataclass
from typing import Any

KEY = ("op", "implementation", "shape", "dtype", "cache")
# Of normal noise: the 20th to the 80th percentile span 1.683 deviations, a median of n strays by 1.253 / sqrt(n).
_STRAY = 1.253 / 1.683
_SURE = 3.0  # such strays


@dataclass(frozen=True)
class Change:
    """A row of both runs. `slower` is 0.1 where it takes a tenth more, as seen against the ceilings."""

    key: tuple[str, ...]
    before_ms: float
    after_ms: float
    slower: float
    noise: float
    ours: bool

    def verdict(self, limit: float) -> str:
        """`regression` past the limit, `slower`, `faster` beyond the noise, else an empty text."""
        if abs(self.slower) <= self.noise:
            return ""
        if self.slower > limit:
            return "regression"
        return "slower" if self.slower > 0 else "faster"


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    gone: list[tuple[str, ...]]  # rows that the second run lacks
    new: list[tuple[str, ...]]
    broken: list[tuple[str, ...]]  # rows whose answer the second run refuses: a regression at any limit

    def regressions(self, limit: float) -> list[Change]:
        """Ours alone: what a peer takes is not ours to keep."""
        return [c for c in self.changes if c.ours and c.verdict(limit) == "regression"]


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    first, second = ({tuple(row[k] for k in KEY): row for row in run["rows"]} for run in (before, after))
    changes = [_change(key, first[key], second[key]) for key in first if key in second]
    refused = {tuple(r[k] for k in KEY[:4]) for r in after["refused"] if r["ours"]}
    gone = [key for key in first if key not in second and key[:4] not in refused]
    broken = [key for key in first if key not in second and key[:4] in refused]
    return Comparison(changes, gone, [key for key in second if key not in first], broken)


def _change(key: tuple[str, ...], before: dict[str, Any], after: dict[str, Any]) -> Change:
    roof = before["ceiling"]  # the same roof for both, though the nearer one may have changed
    name = "ceiling_gbps" if roof in ("read", "copy") else "ceiling_gflops"
    slower = (after["median_ms"] * after[name]) / (before["median_ms"] * before[name]) - 1
    strays = [row["spread"] * _STRAY / math.sqrt(row["repeats"]) for row in (before, after)]
    return Change(key, before["median_ms"], after["median_ms"], slower, _SURE * math.hypot(*strays), before["ours"])


def report(found: Comparison, limit: float) -> str:
    """A line a change beyond the noise, the worst first, and what only one run has."""
    lines = [f"{'':<12}{'slower by':>10}{'noise':>8}{'before ms':>12}{'after ms':>12}  row"]
    for change in sorted(found.changes, key=lambda c: -c.slower):
        if verdict := change.verdict(limit):
            whose = "" if change.ours else " (a peer)"
            lines.append(
                f"{verdict:<12}{change.slower:>10.1%}{change.noise:>8.1%}{change.before_ms:>12.4g}"
                f"{change.after_ms:>12.4g}  {' '.join(change.key)}{whose}"
            )
    if len(lines) == 1:
        lines = ["nothing changed beyond the noise"]
    for word, keys in (("wrong now", found.broken), ("gone", found.gone), ("new", found.new)):
        lines += [f"{word:<12}{'':>42}  {' '.join(key)}" for key in keys]
    return "\n".join(lines)
