"""Where a run's seconds go: compute, communication, data, validation, checkpoint; together they are the wall time.

Knows clocks; does not know what is done in them.
"""

import contextlib
import time
from collections.abc import Iterator

from miss.engine.training.ranks import TalkClock

KINDS = ("compute", "communication", "data", "validation", "checkpoint")


class Spent:
    """Seconds by kind since it was made. What is under no other kind is compute, less what ranks said to each other
    meanwhile; a kind that is entered inside another takes over until it ends, its own communication included."""

    def __init__(self, talk: TalkClock) -> None:
        self._talk, self._kinds = talk, ["compute"]
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._mark = (time.perf_counter(), talk.seconds)

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Inside, time is of this kind."""
        assert kind in KINDS, kind
        self._settle()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._settle()
            self._kinds.pop()

    def seconds(self) -> dict[str, float]:
        """By kind, up to now."""
        self._settle()
        return dict(self._seconds)

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """By kind, since `seconds()` gave `before`."""
        return {kind: value - before.get(kind, 0.0) for kind, value in self.seconds().items()}

    def _settle(self) -> None:
        now, talked = time.perf_counter(), self._talk.seconds
        wall, said = now - self._mark[0], talked - self._mark[1]
        kind = self._kinds[-1]
        if kind == "compute":
            self._seconds["communication"] += said
            wall -= said
        self._seconds[kind] += wall
        self._mark = (now, talked)
