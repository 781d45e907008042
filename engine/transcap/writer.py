"""What every writer of captions is: label sets in, candidates with their scores and costs out.

Knows no writer; the loop that cleans and stores knows nothing else of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from miss.engine.transcap.labels import LabelSet
from miss.engine.transcap.prompts import Prompt


class WriterError(ValueError):
    """A writer that cannot be had here or cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Candidate:
    """A caption as it was written: `score` is its mean log-probability a token, where the writer knows it."""

    text: str
    score: float | None = None
    finished: bool = True


@dataclass
class Written:
    """The candidates of one label set; `tokens` counts what was read and written for them, `model` who says it did."""

    candidates: list[Candidate]
    tokens: dict[str, int] = field(default_factory=dict)
    model: str | None = None


class Writer(Protocol):
    """Writes candidates. What it writes for a label set depends on that set, `seed` and itself, never on the others."""

    @property
    def name(self) -> str: ...

    @property
    def prompt(self) -> Prompt | None: ...

    @property
    def identity(self) -> dict[str, str]:
        """The model and its revision: what a resumed run must find unchanged."""
        ...

    def prepare(self) -> None:
        """Loads what is needed, so that the first batch's time is that of writing.

        Raises:
            WriterError: it cannot be had here.
        """
        ...

    def write(self, sets: Sequence[LabelSet], wanted: int, seed: int) -> list[Written]:
        """Up to `wanted` candidates for each set, in order.

        Raises:
            WriterError: it cannot go on; nothing of these sets is kept.
        """
        ...


def number(seed: int, *names: object) -> int:
    """A 63-bit seed out of a seed and names: the same on every machine, in every process."""
    text = "\x1f".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
