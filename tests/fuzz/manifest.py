"""`python -m tests.fuzz.manifest -max_total_time=600`: any bytes as a list of data or of a checkpoint's files.

Knows which errors users may see; does not know what a list means.
"""

import json
import tempfile
from pathlib import Path

from tests.fuzz.harness import fuzz, instrumented

with instrumented(__name__, "miss.engine.data", "miss.engine.training.checkpoint"):
    from miss.engine.data.datasets import scan
    from miss.engine.data.pairs import scan_pairs
    from miss.engine.data.paths import DataError
    from miss.engine.data.shards import damage_named, read_index, read_places
    from miss.engine.training.checkpoint import MANIFEST, CheckpointCorrupt, _manifest_bytes, verify

TEMPORARY = tempfile.TemporaryDirectory(prefix="miss-fuzz-")
FOLDER = Path(TEMPORARY.name)
(FOLDER / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
(FOLDER / "a.tar").write_bytes(bytes(1024))


def questions(data: bytes) -> None:
    path = FOLDER / "test.jsonl"
    path.write_bytes(data)
    scan("jsonl", path, "test")


def pairs(data: bytes, name: str) -> None:
    path = FOLDER / name
    path.write_bytes(data)
    scan_pairs(path)


def packed(data: bytes) -> None:
    (FOLDER / "index.json").write_bytes(data)
    with damage_named(FOLDER):
        read_places(FOLDER, read_index(FOLDER))


def files(data: bytes, sealed: bool) -> None:
    """sealed: with the hash that a forger would put there, too."""
    folder = FOLDER / "step"
    folder.mkdir(exist_ok=True)
    (folder / "state").write_bytes(b"12")
    if sealed:
        try:
            data = _manifest_bytes(json.loads(data))
        except (ValueError, TypeError, RecursionError):
            return
    (folder / MANIFEST).write_bytes(data)
    verify(folder)


def one_input(data: bytes) -> None:
    """The first byte chooses the kind of list."""
    choice, data = (data[0] if data else 0) % 6, data[1:]
    try:
        if choice == 0:
            questions(data)
        elif choice == 1:
            pairs(data, "pairs.jsonl")
        elif choice == 2:
            pairs(data, "pairs.csv")
        elif choice == 3:
            packed(data)
        else:
            files(data, sealed=choice == 5)
    except (DataError, CheckpointCorrupt):
        return


if __name__ == "__main__":
    fuzz(one_input, "manifest")
