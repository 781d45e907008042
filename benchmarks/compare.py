"""What got faster or slower between two runs, beyond the noise of both.

Knows the rows' columns; does not know how they were measured.

Two witnesses judge a time, and what they agree on counts, the smaller of the two: the ceiling that was measured in the
same rounds, and the same case's peers in those rounds (where it has none: the time itself). A host whose clock fell by
a third between two runs is then no regression, nor does a faster one hide one. One witness is not enough: on a virtual
machine with two cores the bandwidth of memory went from 32 to 64 GB/s within a run, as if its cores had been moved to
two chips, and rows seemed 40 % slower against it whose times had fallen.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

KEY = ("op", "implementation", "shape", "dtype", "cache")
Key = tuple[str, ...]
Rows = dict[Key, dict[str, Any]]
# Of normal noise: the 20th to the 80th percentile span 1.683 deviations, a median of n strays by 1.253 / sqrt(n).
_STRAY = 1.253 / 1.683
_SURE = 3.0  # such strays


@dataclass(frozen=True)
class Change:
    """A row of both runs. `slower` is 0.1 where it takes a tenth more, as both witnesses see it."""

    key: Key
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
    gone: list[Key]  # rows that the second run lacks
    new: list[Key]
    broken: list[Key]  # rows whose answer the second run refuses: a regression at any limit

    def regressions(self, limit: float) -> list[Change]:
        """Ours alone: what a peer takes is not ours to keep."""
        return [c for c in self.changes if c.ours and c.verdict(limit) == "regression"]


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    first, second = ({tuple(row[k] for k in KEY): row for row in run["rows"]} for run in (before, after))
    both = [key for key in first if key in second]
    changes = []
    for key in both:
        peers = [k for k in both if _case(k) == _case(key) and k != key and not first[k]["ours"]]
        changes.append(_change(key, first, second, peers))
    refused = {tuple(r[k] for k in KEY[:4]) for r in after["refused"] if r["ours"]}
    gone = [key for key in first if key not in second and key[:4] not in refused]
    broken = [key for key in first if key not in second and key[:4] in refused]
    return Comparison(changes, gone, [key for key in second if key not in first], broken)


def _case(key: Key) -> tuple[str, ...]:
    return key[0], *key[2:]


def _change(key: Key, first: Rows, second: Rows, peers: list[Key]) -> Change:
    before, after = first[key], second[key]
    name = "ceiling_gbps" if before["ceiling"] in ("read", "copy") else "ceiling_gflops"
    grown = after["median_ms"] / before["median_ms"]
    against_ceiling = grown * after[name] / before[name] - 1
    others = [second[k]["median_ms"] / first[k]["median_ms"] for k in peers]
    against_peers = grown / (statistics.geometric_mean(others) if others else 1.0) - 1
    agree = against_ceiling * against_peers > 0
    slower = min(against_ceiling, against_peers, key=abs) if agree else 0.0
    noise = math.hypot(_stray(before), _stray(after), *(_stray(rows[k]) for k in peers for rows in (first, second)))
    return Change(key, before["median_ms"], after["median_ms"], slower, _SURE * noise, before["ours"])


def _stray(row: dict[str, Any]) -> float:
    """How far a median strays by chance, one deviation."""
    return row["spread"] * _STRAY / math.sqrt(row["repeats"])


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
