"""The arithmetic of a server under load: arrivals by a seed, latencies, percentiles, goodput, and where a sweep ends.

Knows times and rates; does not know servers, sockets or what was asked.

A visit is one user's call: an image with its questions, in one request or several. Its latency runs from the moment
that it was due, not from when the client got round to sending it; one given up counts with the time it was given.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

STAGES = ("queue", "image", "question", "decode")
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Visit:
    """Seconds since the load began. problem: why it has no answer, `late` where it was given up; stages: of its slowest
    question, as far as the server says them; answers: in the order of the questions."""

    due: float
    sent: float
    done: float
    problem: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    answers: tuple[str, ...] = ()

    @property
    def latency(self) -> float:
        return self.done - self.due


def arrivals(seed: int, rate: float, seconds: float) -> list[float]:
    """Times of a Poisson process of `rate` a second, in order, all before `seconds`.

    Raises:
        ValueError: the rate or the time is not above 0.
    """
    if not (rate > 0 and seconds > 0):
        raise ValueError(f"arrivals: got {rate:g} a second for {seconds:g} s; wanted both above 0")
    generator, found, now = random.Random(seed), [], 0.0
    while (now := now + generator.expovariate(rate)) < seconds:
        found.append(now)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two nearest of the sorted values, in proportion; of none: 0."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return min(max(ordered[low] + (place - low) * (ordered[high] - ordered[low]), ordered[low]), ordered[high])


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    return {name: round(1e3 * percentile(values, share), 3) for name, share in SHARES.items()}


def good(visits: Sequence[Visit], limit: float) -> int:
    """How many were answered in whole within `limit` seconds of being due."""
    return sum(not visit.problem and visit.latency <= limit for visit in visits)


def point(visits: Sequence[Visit], rate: float, seconds: float, limit: float) -> dict[str, Any]:
    """One rate's figures; goodput and throughput are visits a second of the time in which visits were due."""
    answered = [visit for visit in visits if not visit.problem]
    stages = {name: [v.stages[name] for v in answered if name in v.stages] for name in STAGES}
    return {
        "rate": round(rate, 4),
        "offered": round(len(visits) / seconds, 4),
        "visits": len(visits),
        "answered": len(answered),
        "throughput": round(len(answered) / max(seconds, *(v.done for v in visits), seconds), 4),
        "goodput": round(good(visits, limit) / seconds, 4),
        "problems": dict(Counter(visit.problem for visit in visits if visit.problem)),
        "client_lag": percentiles([visit.sent - visit.due for visit in visits]),
        "ms": {"total": percentiles([visit.latency for visit in visits])}
        | {name: percentiles(values) for name, values in stages.items() if values},
    }


def holds(found: dict[str, Any], share: float = 0.9) -> bool:
    """Whether a server kept up at this point: so much of what was offered came back in time."""
    return bool(found["goodput"] >= share * found["offered"])


def peak(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The point of the highest goodput."""
    return max(points, key=lambda found: found["goodput"], default=None)
