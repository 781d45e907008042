"""What is asked for in place of the free choice: by MISS_KERNELS, and inside `with use(…)` blocks.

Knows the names of operations and of their implementations; does not know what these need, or which one would run.
"""

import difflib
import threading
from collections.abc import Mapping
from typing import Protocol

BACKWARD = "_backward"  # how the name of an operation's backward table ends


class Table(Protocol):
    """An operation: what it is called, and its implementations."""

    name: str
    names: list[str]


Tables = Mapping[str, Table]


class Forced:
    """What `use()` and MISS_KERNELS ask for, checked against the tables.

    `use()` is a process-wide stack, not a context variable: autograd runs backward on threads of its own, and those
    must obey the `with` block that the forward pass stood in (a context variable is empty there).
    """

    def __init__(self, tables: Tables, environment: str = "") -> None:
        self.tables, self.environment = tables, parse_choice(environment)
        self._stack: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def get(self, op: str) -> str | None:
        """The implementation that is asked for, the innermost first; None where the choice is free.

        An operation's backward table follows the forward one wherever it has an implementation of that name.
        """
        if not self._stack and not self.environment:
            return None
        forward = op.removesuffix(BACKWARD)
        for choice in (*reversed(self._stack), self.environment):
            if op in choice:
                return choice[op]
            if forward in choice and forward != op and choice[forward] in self.tables[op].names:
                return choice[forward]
        return None

    def push(self, choice: dict[str, str]) -> None:
        self.check(choice)
        with self._lock:
            self._stack = [*self._stack, choice]

    def remove(self, choice: dict[str, str]) -> None:
        with self._lock:
            self._stack = [c for c in self._stack if c is not choice]

    def check_environment(self, op: Table) -> None:
        """Called as each table registers, so that a wrong implementation name fails at import, not never."""
        asked = self.environment.get(op.name)
        if asked is not None and asked not in op.names:
            raise ValueError(f"MISS_KERNELS: {_no_implementation(op, asked)}")

    def check_complete(self) -> None:
        """To be called once every operation's module is imported: until then an unknown name may yet register.

        Raises:
            ValueError: MISS_KERNELS names an operation that does not exist.
        """
        try:
            self.check({op: impl for op, impl in self.environment.items() if op not in self.tables})
        except ValueError as error:
            raise ValueError(f"MISS_KERNELS: {error}") from error

    def check(self, choice: dict[str, str]) -> None:
        """Raises ValueError where an operation or an implementation is not known, naming the ones that are."""
        for name, impl in choice.items():
            if name not in self.tables:
                known = list(self.tables)
                raise ValueError(f"no operation named {name}{_did_you_mean(name, known)}; known: {', '.join(known)}")
            if impl not in self.tables[name].names:
                raise ValueError(_no_implementation(self.tables[name], impl))


def parse_choice(text: str) -> dict[str, str]:
    """`"op=implementation,op=implementation"` as a dictionary.

    Raises:
        ValueError: a part is not of that form.
    """
    choice: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, equals, impl = part.partition("=")
        if not (op and equals and impl):
            raise ValueError(
                f'MISS_KERNELS: got "{part}"; wanted op=implementation[,op=implementation …], '
                f"for example layer_norm=reference"
            )
        choice[op] = impl
    return choice


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _no_implementation(op: Table, impl: str) -> str:
    hint = _did_you_mean(impl, op.names)
    return f"{op.name} has no implementation named {impl}{hint}; known: {', '.join(op.names)}"
