"""SIGTERM and SIGINT as a wish to save and leave at the next step's end; a second SIGINT leaves at once.

Knows signals of this process; does not know ranks, steps or what is saved.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT)
_GRACE = 3.0  # seconds that a second SIGINT gives the process to unwind


class Interrupted(Exception):
    """A signal while `may_interrupt` allowed it to end what was going on."""


class Signals:
    """`number` is the signal that this process got, if any; `may_interrupt` lets the next one raise Interrupted."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.may_interrupt = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Inside, the two signals are wishes. In a thread that is not the main one they are somebody else's."""
        try:
            before = {name: signal.signal(name, self._ask) for name in ASKING}
        except ValueError:
            yield
            return
        try:
            with _watched():
                yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        if self.may_interrupt:
            self.may_interrupt = False
            raise Interrupted


@contextmanager
def _watched() -> Iterator[None]:
    """Python runs handlers between its own instructions, of which a process that waits for other ranks has none. The
    system writes each signal into a socket all the same; a thread reads there."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_leave_at_the_second, args=(ours,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()  # ends the thread
        thread.join()
        ours.close()


def _leave_at_the_second(read: socket.socket) -> None:
    asked = False
    while got := read.recv(1):
        if asked and got[0] == signal.SIGINT:
            break
        asked = asked or got[0] in ASKING
    else:
        return
    read.settimeout(_GRACE)
    try:
        while read.recv(64):
            continue
    except TimeoutError:
        print("SIGINT again: left at once, nothing saved", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
