"""Records of what was measured of our GPU kernels: one's fields, and the files that hold them.

Knows a record and its file, which is `{"format": 2, "records": [...]}`, a record an object with the fields of `Record`,
all of them; does not know which of them count (evidence.py) or how anything is measured (validation.py).
"""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FORMAT = 2  # 2: a record says which launches it was measured with


@dataclass(frozen=True)
class Record:
    """What was measured of one row of a table."""

    op: str
    implementation: str
    gpu: str  # as PyTorch names it; "cpu" in a trial run without one, which no rule reads
    architecture: str  # sm_90
    shape_class: str  # of `shape_class`
    sources: str  # of `sources_hash`
    launches: dict[str, Any]  # each place of launches.py that it asks for: what was tuned for it, None where nothing
    correct: bool  # by the error rule, for every result
    error: float | None  # the largest, relative to the float64 truth's largest value; None where it failed
    plain_error: float | None  # the same of the plain PyTorch row
    candidate: str | None  # the row that would run in its place
    speedup: float | None  # the candidate's time / its time: above 1 is faster
    microseconds: float | None  # its time a call, launch included
    failure: str | None  # the error it ended in, in one line
    versions: dict[str, str]
    date: str  # UTC, 2026-11-24T10:15:00Z

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.implementation, self.gpu, self.architecture, self.shape_class

    @property
    def day(self) -> str:
        return self.date[:10]

    def refusal(self) -> str | None:
        """Why it is no ground to run by itself; None where it is."""
        if self.failure is not None:
            return f"failed on {self.gpu} on {self.day}: {self.failure}"
        if not self.correct:
            return f"measured wrong: error {self.error:.1e}, {self.plain_error:.1e} of plain PyTorch ({self.day})"
        if self.speedup is None or self.speedup <= 1.0:
            return f"measured slower ({self.speedup or 0:.2f}x of {self.candidate}, {self.day})"
        return None

    def __str__(self) -> str:
        return (
            f"{self.speedup or 0:.2f}x of {self.candidate}, error {self.error or 0:.1e} "
            f"({self.plain_error or 0:.1e} of plain PyTorch), {self.gpu}, {self.day}"
        )


def read(path: Path) -> list[Record]:
    """A file's records; none where it does not exist.

    Raises:
        ValueError: it is not a file of records; the message names it and says what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise _unreadable(path, str(error)) from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(path, f"not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise _unreadable(path, 'wanted {"format": 2, "records": [...]}')
    if content.get("format") != FORMAT:
        raise _unreadable(path, f"its format is {content.get('format')!r}, this version reads {FORMAT}")
    return [_parse(path, at, value) for at, value in enumerate(content["records"])]


_FIELDS = {field.name: field.type for field in dataclasses.fields(Record)}
_NUMBERS = ("error", "plain_error", "speedup", "microseconds")


def _parse(path: Path, at: int, value: Any) -> Record:
    if not isinstance(value, dict) or value.keys() != _FIELDS.keys():
        odd = sorted(value.keys() ^ _FIELDS.keys()) if isinstance(value, dict) else "it is no object"
        raise _unreadable(path, f"record {at} has other fields than it should: {odd}")
    for name in _FIELDS:
        one = value[name]
        if name in _NUMBERS:
            right = one is None or (isinstance(one, int | float) and not isinstance(one, bool))
        elif name in ("candidate", "failure"):
            right = one is None or isinstance(one, str)
        else:
            right = isinstance(one, {"correct": bool, "versions": dict, "launches": dict}.get(name, str))
        if not right:
            raise _unreadable(path, f"record {at}: {name} is {one!r}, wanted {_FIELDS[name]}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value["date"]):
        raise _unreadable(path, f"record {at}: date is {value['date']!r}, wanted 2026-11-24T10:15:00Z")
    if value["failure"] is None and (value["error"] is None or value["plain_error"] is None):
        raise _unreadable(path, f"record {at} has neither errors nor a failure")
    return Record(**value)


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(f"evidence file {path}: {why}; correct it, or delete it and run `miss kernels validate`")


def write(path: Path, records: Iterable[Record]) -> None:
    """Adds records to a file, in place of those of their keys; whole or not at all, and one process at a time.

    Raises:
        ValueError: what is there is not a file of records. OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        kept = {record.key: record for record in (*read(path), *records)}
        rows = [dataclasses.asdict(kept[key]) for key in sorted(kept)]
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "records": rows}, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # where Triton runs there is one

    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
