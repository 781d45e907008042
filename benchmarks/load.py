"""How much of the machine other processes took while something was measured.

Knows /proc/stat; does not know what is measured. Where there is no /proc, others are taken to have had nothing.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/stat")


class Busy:
    """Starts counting when it is made. `also`: the seconds on the cores of processes that count as this one's own."""

    def __init__(self, also: Callable[[], float] = lambda: 0.0) -> None:
        self._also = also
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds() + also()

    def others(self) -> float:
        """The share of all cores' time that was spent outside of this process, the host's own (steal) included."""
        if self._busy is None:
            return 0.0
        elapsed = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        spent = (_busy_seconds() or 0.0) - self._busy - (_own_seconds() + self._also() - self._own)
        return min(1.0, max(0.0, spent / elapsed)) if elapsed > 0 else 0.0


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float | None:
    """Of all cores since the machine started: user, nice, system, interrupts and steal."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, _STAT.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
