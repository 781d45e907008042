"""Where a rank that ends leaves the reason, and where the others look when a call to it fails.

Knows the store that ranks meet at: keys and small texts; does not know collective calls, or what can go wrong.

Costs nothing while nothing fails. A rank that was killed, or stands still, leaves nothing: so the others can name it.
"""

import json
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

_PATIENCE = 3.0  # seconds: an entry is written before the connections close, so it is there or will not come
_READ = "miss/read"
ENDED_EARLY = 75  # sysexits' EX_TEMPFAIL: the same command may succeed when it is started again


class Cause(NamedTuple):
    """What ended a rank: words for people and its exit code; `lost`: only that another one was gone."""

    words: str
    code: int
    lost: bool = False


class Board:
    """One for each run of a process group. `host`: this rank's process holds the store."""

    def __init__(self) -> None:
        self._store: Any = None
        self._rank, self._world_size, self._host = 0, 1, False
        self._posted = False

    def open(self, store: Any, rank: int, world_size: int, host: bool) -> None:
        store.set_timeout(timedelta(seconds=_PATIENCE))
        self._store, self._rank, self._world_size, self._host = store, rank, world_size, host
        self._posted = False

    def post(self, cause: Cause) -> None:
        """This rank's reason, once: what follows from it is no other one."""
        if self._store is None or self._posted:
            return
        self._posted = True
        entry = json.dumps(cause._asdict())
        self._bounded(lambda: self._store.set(_key(self._rank), entry))

    def causes(self) -> dict[int, Cause]:
        """What the other ranks left, by rank; those that are missing were killed or do not answer."""
        found: dict[int, Cause] = {}
        if self._store is not None:
            self._bounded(lambda: self._collect(found))
        return dict(found)

    def _collect(self, found: dict[int, Cause]) -> None:
        deadline = time.monotonic() + _PATIENCE
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        while len(found) < len(others) and time.monotonic() < deadline:
            for rank in others:
                if rank not in found and self._store.check([_key(rank)]):
                    found[rank] = Cause(**json.loads(self._store.get(_key(rank))))
            if any(not cause.lost for cause in found.values()):
                break
            time.sleep(0.05)
        self._store.add(_READ, 1)

    def close(self, wait: bool) -> None:
        """Lets go of the store. With `wait` the process that holds it stays until the others have read, or have ended
        without."""
        if self._store is not None and wait and self._host:
            self._bounded(self._until_read)
        self._store = None

    def _until_read(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self._store.add(_READ, 0) < self._world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)

    def _bounded(self, work: Any) -> None:
        """Runs it beside: a store in a process that stands still answers never, and one that is gone raises."""

        def quietly() -> None:
            try:
                work()
            except RuntimeError:  # the store's process is gone, and with it what was left there
                return

        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        thread.join(2 * _PATIENCE)


def _key(rank: int) -> str:
    return f"miss/ended/{rank}"


def exit_code(error: BaseException) -> int:
    """What the command line leaves with after this error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return int(getattr(error, "exit_code", 1))
