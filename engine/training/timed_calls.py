"""Counts what another library's collective calls take.

Knows calls by name and a clock; does not know the library.
"""

from collections.abc import Iterable
from typing import Any

from miss.engine.training.ranks import TalkClock


def time_calls(backend: Any, names: Iterable[str], clock: TalkClock) -> None:
    """Counts the time of an object's collective calls, and of waiting for those that run beside other work."""
    for name in names:
        call = getattr(backend, name, None)
        if call is not None:
            call = getattr(call, "untimed", call)  # an earlier engine's clock is another's

            def timed(*args: Any, _call: Any = call, **kwargs: Any) -> Any:
                with clock.running():
                    handle = _call(*args, **kwargs)
                return handle if handle is None else _TimedHandle(handle, clock)

            timed.untimed = call  # type: ignore[attr-defined]
            setattr(backend, name, timed)


class _TimedHandle:
    """What a collective call that goes on in the background gives, with waiting counted."""

    def __init__(self, handle: Any, clock: TalkClock) -> None:
        self._handle, self._clock = handle, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.running():
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
