"""The list of samples that a run could not use: each once, whichever process met it, whenever.

Knows one file; does not know why a sample is of no use or what is done without it.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable
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
