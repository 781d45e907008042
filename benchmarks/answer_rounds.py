"""Times warm peers in turn on one job: A, B, A, B …, the others waiting.

Knows processes and clocks; does not know what they answer, or what is made of the times.
"""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miss.benchmarks.load import Busy
from miss.benchmarks.peers.process import PeerError, PeerProcess

STAGES = ("image", "question", "decode", "total")
_WARM = 2
_stamps = iter(range(1, 1 << 16))  # a number a run, over all jobs of this process: no image is seen twice


@dataclass
class Turns:
    """What one peer took in every round, in seconds by stage, and how it used the machine."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    cached: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    tokens: list[list[int]] = field(default_factory=list)
    other_load: list[float] = field(default_factory=list)
    idle_cpu: float = 0.0  # seconds on the cores while others had their turn
    waited: float = 0.0  # seconds that those turns lasted


def in_turn(
    peers: Sequence[PeerProcess],
    job: Path,
    rounds: int,
    between: Callable[[], None],
    cached: frozenset[str] = frozenset(),
) -> tuple[dict[str, Turns], dict[str, str]]:
    """(turns by peer, why others dropped out). Every run has images of its own; peers named in `cached` are asked once
    more about the same images in the same turn."""
    found, failed = {peer.entry.name: Turns() for peer in peers}, {}
    alive = list(peers)
    for peer in peers:
        try:
            peer.ask("prepare", job)
            for _ in range(_WARM):
                found[peer.entry.name].tokens = peer.ask("run", job, stamp=next(_stamps))["tokens"]
        except PeerError as error:
            failed[peer.entry.name] = str(error)
            alive.remove(peer)
    for _ in range(rounds):
        between()
        for peer in list(alive):
            try:
                _turn(peer, alive, found, job, peer.entry.name in cached)
            except PeerError as error:
                failed[peer.entry.name] = str(error)
                alive.remove(peer)
    return {name: turns for name, turns in found.items() if name not in failed}, failed


def _turn(peer: PeerProcess, alive: list[PeerProcess], found: dict[str, Turns], job: Path, cached: bool) -> None:
    waiting = [other for other in alive if other is not peer]
    before = [other.cpu_seconds() for other in waiting]
    stamp, turns, busy = next(_stamps), found[peer.entry.name], Busy(peer.cpu_seconds)
    seconds = peer.ask("run", job, stamp=stamp)["seconds"]
    turns.other_load.append(busy.others())
    for stage in STAGES:
        turns.seconds[stage].append(seconds[stage])
    for other, start in zip(waiting, before, strict=True):
        found[other.entry.name].idle_cpu += other.cpu_seconds() - start
        found[other.entry.name].waited += seconds["total"]
    if cached:
        again = peer.ask("run", job, stamp=stamp)["seconds"]
        for stage in STAGES:
            turns.cached[stage].append(again[stage])


def spread(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """Median, least and most (milliseconds by default), and (80th - 20th percentile) / median."""
    ordered = sorted(values)
    middle = statistics.median(ordered)
    fifths = statistics.quantiles(ordered, n=5) if len(ordered) > 1 else [middle] * 4
    return {
        "median": round(scale * middle, 4),
        "min": round(scale * ordered[0], 4),
        "max": round(scale * ordered[-1], 4),
        "spread": round((fifths[3] - fifths[0]) / middle, 4) if middle else 0.0,
    }


def ratio(theirs: Turns, ours: Turns) -> dict[str, float]:
    """Their time / ours, round by round: above 1 where ours is faster."""
    pairs = zip(theirs.seconds["total"], ours.seconds["total"], strict=False)
    return spread([a / b for a, b in pairs], 1.0)


@contextlib.contextmanager
def started(make: Sequence[Callable[[], PeerProcess]], failed: dict[str, str], names: Sequence[str]) -> Any:
    """The processes that could be started; why the others could not goes to `failed`."""
    with contextlib.ExitStack() as stack:
        alive = []
        for name, one in zip(names, make, strict=True):
            try:
                alive.append(stack.enter_context(one()))
            except PeerError as error:
                failed[name] = str(error)
        yield alive
