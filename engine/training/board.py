"""Where a rank that ends leaves the reason, and where the others find it when a call to it fails.

Knows the store that ranks meet at: keys and small texts; does not know collective calls, or what can go wrong.

A rank that was killed, or stands still, leaves nothing: so the others can name it.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

_PATIENCE = 3.0  # seconds: an entry is written before the connections close, so it is there or will not come
_EVERY = 0.5  # seconds between two looks while nothing fails
_SAID = "said"
ENDED_EARLY = 75  # sysexits' EX_TEMPFAIL: the same command may succeed when it is started again


class Cause(NamedTuple):
    """What ended a rank: words for people and its exit code; `lost`: only that another one was gone."""

    rank: int
    words: str
    code: int
    lost: bool = False


class Board:
    """One for each run of a process group. `host`: this rank's process holds the store."""

    def __init__(self) -> None:
        self._store: Any = None
        self._rank, self._world_size, self._host = 0, 1, False
        self._posted = False
        self._heard: Cause | None = None
        self._closing = threading.Event()

    def open(self, store: Any, rank: int, world_size: int, host: bool) -> None:
        """Begins to listen, in a thread: where rank 0 ends, the store ends with it, and what it said must be here."""
        store.set_timeout(timedelta(seconds=_PATIENCE))
        self._store, self._rank, self._world_size, self._host = store, rank, world_size, host
        self._posted, self._heard = False, None
        self._closing.clear()
        threading.Thread(target=lambda: _quietly(lambda: self._listen(store)), daemon=True, name="board").start()

    def _listen(self, store: Any) -> None:
        while not self._closing.wait(_EVERY):
            if store.check([_SAID]):
                self._heard = _cause(store, _SAID)
                store.set(_read(self._rank), "")
                return

    def post(self, cause: Cause) -> None:
        """This rank's reason, once: what follows from it is no other one."""
        if self._store is None or self._posted:
            return
        self._posted = True
        store, entry = self._store, json.dumps(cause)
        keys = [_ended(self._rank)] if cause.lost else [_ended(self._rank), _SAID]
        if not cause.lost:
            self._closing.set()
        self._bounded(lambda: [store.set(key, entry) for key in keys])

    def causes(self) -> dict[int, Cause]:
        """What the other ranks left, by rank; those that are missing were killed or do not answer."""
        found: dict[int, Cause] = {}
        if (store := self._store) is not None and self._heard is None:
            self._bounded(lambda: self._collect(store, found))
        if (heard := self._heard) is not None:
            return {heard.rank: heard}
        return dict(found)

    def _collect(self, store: Any, found: dict[int, Cause]) -> None:
        deadline = time.monotonic() + _PATIENCE
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        while len(found) < len(others) and time.monotonic() < deadline and self._heard is None:
            for rank in others:
                if rank not in found and store.check([_ended(rank)]):
                    found[rank] = _cause(store, _ended(rank))
            if any(not cause.lost for cause in found.values()):
                break
            time.sleep(0.05)
        store.set(_read(self._rank), "")

    def close(self, wait: bool) -> None:
        """Lets go of the store. With `wait` the process that holds it stays until the others have read what it said, or
        need no more, or have ended without."""
        self._closing.set()
        if self._store is not None and wait:
            store, key = self._store, _read(self._rank)
            self._bounded(lambda: self._until_read(store) if self._host else store.set(key, ""))
        self._store = None

    def _until_read(self, store: Any) -> None:
        deadline = time.monotonic() + _PATIENCE
        keys = [_read(rank) for rank in range(self._world_size) if rank != self._rank]
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _bounded(self, work: Callable[[], Any]) -> None:
        """Runs it beside, and not for long: a store in a process that stands still never answers, and is not asked
        again."""
        thread = threading.Thread(target=lambda: _quietly(work), daemon=True)
        thread.start()
        thread.join(2 * _PATIENCE)
        if thread.is_alive():
            self._store = None


def agree_on_attempt(store: Any, rank: int, world_size: int, timeout: float) -> str:
    """A name for this start of the ranks, the same on all and never used before.

    torchrun keeps one store over its restarts (torch 2.13), with the addresses of ranks that are gone: under names of
    their own no attempt reads them. Rank 0 gives a name to those who came; it counts once all of these have seen it,
    which a rank of an earlier attempt cannot.

    Raises:
        dist.DistStoreError: not all came in time.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"come/{rank}", mine)
    name = ""
    come: list[str] = []
    while time.monotonic() < deadline:
        if rank == 0:
            keys = [f"come/{other}" for other in range(world_size)]
            now = [store.get(key).decode() for key in keys] if store.check(keys) else []
            if now != come:
                name, come = uuid.uuid4().hex, now
                store.set("attempt", json.dumps([name, come]))
        elif store.check(["attempt"]):
            name, come = json.loads(store.get("attempt"))
        if come and come[rank] == mine:
            store.set(f"{name}/seen/{rank}", "")
            if store.check([f"{name}/seen/{other}" for other in range(world_size)]):
                return name
        time.sleep(0.01)
    raise dist.DistStoreError(f"timed out after {timeout:.0f} s: not all of {world_size} ranks came")


def _quietly(work: Callable[[], Any]) -> None:
    """Where the store's process is gone there is nothing to be read, and nobody to read: no error of its own."""
    try:
        work()
    except RuntimeError:
        return


def _cause(store: Any, key: str) -> Cause:
    return Cause(*json.loads(store.get(key)))


def _ended(rank: int) -> str:
    return f"ended/{rank}"


def _read(rank: int) -> str:
    return f"read/{rank}"


def exit_code(error: BaseException) -> int:
    """What the command line leaves with after this error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return int(getattr(error, "exit_code", 1))
