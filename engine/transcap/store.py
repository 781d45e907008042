"""A run's folder: every batch is on the disk before the next begins, and results are whole or not there.

Knows lines, hashes and renames; does not know what a batch holds.

`run.json` says what the run was started with; `batches.jsonl` has one line a batch, its hash before it. A crash loses
the batch that was being written: a line that is cut short or damaged is dropped with all behind it, and said so.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS, BATCHES, LOCK = "run.json", "batches.jsonl", ".lock"
Record = dict[str, Any]


class StoreError(ValueError):
    """A run's folder that cannot be gone on with; the message says what to do."""


class RunFolder:
    """One run, by one process at a time."""

    def __init__(self, folder: Path, settings: Record, resume: str = "auto") -> None:
        """Opens or makes the folder.

        Args:
            settings: what must be the same for a run to go on.
            resume: auto, or none: what is there is removed.

        Raises:
            StoreError: another process has it, or it is a run with other settings.
        """
        if resume not in ("auto", "none"):
            raise StoreError(f"--resume: got {resume!r}; accepted: auto, none")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / LOCK, "w")  # noqa: SIM115 (held as long as the run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StoreError(
                f"{folder}: another process is writing there; wait for it, or give another --out"
            ) from None
        try:
            if resume == "none":
                (folder / SETTINGS).unlink(missing_ok=True)
                (folder / BATCHES).unlink(missing_ok=True)
            self._take_up(settings)
            self.batches = self._read_batches()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, record: Record) -> None:
        """Adds a batch; it is on the disk when this returns.

        Raises:
            OSError: the disk is full, or the like; the batches before it are untouched.
        """
        line = seal(record)
        with open(self.folder / BATCHES, "ab") as file:
            start = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.folder / BATCHES, start)
                raise
        _sync(self.folder)
        self.batches.append(record)

    def finish(self, files: dict[str, bytes]) -> None:
        """Writes results, each whole or not at all."""
        for name, content in files.items():
            write_atomic(self.folder / name, content)

    def _take_up(self, settings: Record) -> None:
        path = self.folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if not path.is_file():
            if (self.folder / BATCHES).exists():
                raise StoreError(f"{self.folder}: batches without {SETTINGS}; give another --out, or --resume none")
            write_atomic(path, json.dumps(settings, indent=2, ensure_ascii=False).encode())
            return
        try:
            there = json.loads(path.read_bytes())
        except ValueError:
            raise StoreError(f"{path}: not JSON; give another --out, or --resume none to start anew") from None
        other = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
        if other:
            shown = "; ".join(f"{k} was {_short(there.get(k))}, is {_short(settings.get(k))}" for k in sorted(other))
            raise StoreError(
                f"{self.folder} holds a run with other settings ({shown}): give another --out, the settings it was "
                "started with, or --resume none to start anew"
            )

    def _read_batches(self) -> list[Record]:
        path = self.folder / BATCHES
        if not path.is_file():
            return []
        content, found, end = path.read_bytes(), list[Record](), 0
        for line in content.splitlines(keepends=True):
            record = unseal(line)
            if record is None:
                break
            found.append(record)
            end += len(line)
        if end < len(content):
            print(
                f"warning: {path}: {len(content) - end:,} bytes behind batch {len(found)} are damaged or cut short; "
                "they are dropped and written anew",
                file=sys.stderr,
                flush=True,
            )
            os.truncate(path, end)
        return found


def seal(record: Record) -> bytes:
    """A record as a line with its hash before it."""
    content = json.dumps(record, ensure_ascii=False).encode()
    return hashlib.sha256(content).hexdigest()[:16].encode() + b" " + content + b"\n"


def unseal(line: bytes) -> Record | None:
    """The record of a line; None where it is not whole."""
    digest, _, content = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or hashlib.sha256(content).hexdigest()[:16].encode() != digest:
        return None
    record: Record = json.loads(content)
    return record


def write_atomic(path: Path, content: bytes) -> None:
    """A file that holds the old bytes or the new ones, whenever the machine stops."""
    temporary = path.with_name(f".aside-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def json_lines(rows: Iterable[Record]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
