"""The list of samples that a run could not use: each once, whichever process met it; and how many are too many.

Knows one file and counts; does not know why a sample is of no use or what is done without it.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.engine.data.paths import DataError

FILE = "quarantine.jsonl"


class Quarantine:
    """`quarantine.jsonl` in a run's folder, written by all processes of the run, and gone on with when it resumes.

    A line is `{"key", "reason", …}`. Processes take turns by a lock on the file and read what others wrote first.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / FILE
        self._known: set[tuple[str, str]] = set()
        self._read_to = 0

    def add(self, records: Iterable[dict[str, Any]]) -> int:
        """Writes those that are not yet there, by key and reason; returns how many.

        Raises:
            DataError: the file holds something else.
            OSError: it cannot be written.
        """
        records = [r for r in records if (r["key"], r["reason"]) not in self._known]
        if not records:
            return 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._catch_up(file)
            lines = []
            for record in records:
                if (name := (record["key"], record["reason"])) not in self._known:
                    self._known.add(name)
                    lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            self._read_to = file.tell()
        return len(lines)

    def counts(self) -> Counter[str]:
        """How many samples the file names, by reason: of all processes, and of the run before it was resumed."""
        if self.path.is_file():
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._catch_up(file)
        return Counter(reason for _, reason in self._known)

    def _catch_up(self, file: Any) -> None:
        """Reads what others have written; half a line, which a killed process left, is cut off."""
        if os.fstat(file.fileno()).st_size < self._read_to:  # someone took the file away or cut it: begin anew
            self._known, self._read_to = set(), 0
        file.seek(self._read_to)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(self._read_to + whole)
        for line in data[:whole].split(b"\n")[:-1]:
            try:
                record = json.loads(line)
                self._known.add((str(record["key"]), str(record["reason"])))
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{self.path}: {line[:60]!r} is no record; move the file away") from None
        self._read_to += whole


class TooManyCorrupt(ValueError):
    """More of the data is corrupt than the run was told to bear."""


@dataclass(frozen=True)
class CorruptLimit:
    """Of the first `samples` that a process meets (of a smaller data set: of as many as it has), the share that may be
    corrupt. Of every further `samples` half may be: that many stand in a row only where a disk went away."""

    samples: int = 1000
    share: float = 0.05
    later: float = 0.5

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 <= self.share <= 1 or not 0 <= self.later <= 1:
            raise ValueError(
                f"samples {self.samples}, share {self.share}, later {self.later}: wanted 1 or more, shares of 0 to 1"
            )


class Guard:
    """Follows the pairs that a process meets, and says when too many were of no use."""

    def __init__(self, limit: CorruptLimit, num_pairs: int) -> None:
        self.limit, self.window = limit, min(limit.samples, num_pairs)
        self.seen = self.corrupt = 0  # pairs in all; of no use in the present window

    @property
    def share(self) -> float:
        """What is accepted of the present window."""
        first = self.seen <= self.window
        return self.limit.share if first else max(self.limit.share, self.limit.later)

    def exceeded_by(self, is_corrupt: bool) -> bool:
        """Takes the next pair in."""
        if self.seen % self.window == 0:
            self.corrupt = 0
        self.seen, self.corrupt = self.seen + 1, self.corrupt + is_corrupt
        return self.corrupt > self.share * self.window + 1e-9  # 0.29 * 100 is less than 29

    def __str__(self) -> str:
        met = (self.seen - 1) % self.window + 1
        which = "first" if self.seen <= self.window else "last"
        accepted = f"accepted: {self.share:.1%} of {self.window:,}"
        return f"{self.corrupt:,} of the {which} {met:,} pairs cannot be used; {accepted}"
