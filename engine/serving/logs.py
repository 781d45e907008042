"""What a server writes down: JSON lines of what happened, and an audit log of who was answered by which model.

Knows events and their fields; does not know questions, answers, file names or tags, and has no way to write them: a
line holds an event's name, which is a constant of the code, and fields that are numbers or words of ours. What
libraries log is reduced to where in the code it was logged.
"""

import hashlib
import hmac
import json
import logging
import os
import queue
import secrets
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

LOGGER = "miss.engine.serving"


def event(name: str, level: int = logging.INFO, **fields: str | int | float | bool | list[str] | None) -> None:
    """Writes a line. Fields are numbers and words of ours, never what a caller sent."""
    logging.getLogger(LOGGER).log(level, name, extra={"miss": fields})


def places(trace: TracebackType | None) -> list[str]:
    """Where in the code an exception came from, innermost last."""
    frames = traceback.extract_tb(trace)[-6:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


class JsonLines(logging.Formatter):
    """One JSON object a line. Of an exception: its type and where it came from, not what it says."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        if record.name == LOGGER:
            line |= {"event": record.msg, **getattr(record, "miss", {})}
        else:
            where = f"{Path(record.pathname).name}:{record.lineno}"
            line |= {"event": "library", "logger": record.name, "where": where}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"], line["at"] = record.exc_info[0].__name__, places(record.exc_info[2])
        return json.dumps(line)


def configure() -> None:
    """All loggers of this process write such lines to standard error, warnings included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers, root.level = [handler], logging.WARNING
    logging.getLogger(LOGGER).setLevel(logging.INFO)


class Audit:
    """An append-only file of JSON lines, each on disk (fsync) within a moment of its answer.

    A line: time, request id, principal, model, its SHA-256, HMAC of the image, outcome, scores. A thread writes, and
    what has gathered meanwhile goes out in one write. Without a path it writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._key = secrets.token_bytes(32)
        self.failures = 0
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._file = -1 if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        if path is not None:
            self._thread.start()

    def image(self, data: bytes) -> str | None:
        """An image's mark, the same for the same image while this server runs; it cannot be undone without its key."""
        return None if self._file < 0 else hmac.digest(self._key, hashlib.sha256(data).digest(), "sha256").hex()

    def write(self, **fields: Any) -> None:
        if self._file >= 0:
            self._lines.put(json.dumps({"time": round(time.time(), 3), **fields}) + "\n")

    def _work(self) -> None:
        ended = False
        while not ended:
            taken = [self._lines.get()]
            while not self._lines.empty():
                taken.append(self._lines.get())
            ended = None in taken
            data = "".join(line for line in taken if line is not None).encode()
            try:
                while data:
                    data = data[os.write(self._file, data) :]
                os.fsync(self._file)
            except OSError:
                self.failures += 1
                logging.getLogger(LOGGER).exception("audit_not_written")

    def close(self) -> None:
        """Returns when all is on disk."""
        if self._file >= 0:
            self._lines.put(None)
            self._thread.join()
            os.close(self._file)
            self._file = -1
