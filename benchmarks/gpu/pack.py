"""Keeps the results' folder small enough to travel: few files, none large.

Knows file names, sizes and archives; does not know what is in them. The rules, where something is too large:
  *.json, *.jsonl      compressed (.gz)
  logs.tar.gz          of every log its beginning and its end, shorter until it fits
  traces.tar.gz        the largest traces left out until it fits
What does not fit even so is left out, and `fit` says so.
"""

import gzip
import io
import tarfile
from pathlib import Path

MOST_BYTES = 16 * 2**20 - 2**16  # of a file; a little below 16 MiB
MOST_FILES = 8
_LOG = 2**20  # bytes of a log that are kept at first


def tar(target: Path, files: list[Path], most: int = MOST_BYTES) -> list[str]:
    """Files into a compressed archive of at most `most` bytes; what was left out or shortened, in words."""
    said: list[str] = []
    logs = all(path.suffix == ".log" for path in files)
    kept, keep = sorted(files, key=lambda path: path.stat().st_size), _LOG
    while kept:
        data = _archive(kept, keep if logs else None)
        if len(data) <= most:
            temporary = target.with_name(f".{target.name}.new")
            temporary.write_bytes(data)
            temporary.replace(target)
            return said
        if logs and keep > 1024:
            keep //= 2
            said = [f"{target.name}: of each log the first and last {keep // 2} bytes"]
        else:
            said.append(f"{target.name}: {kept.pop().name} left out, too large")
    return said


def _archive(files: list[Path], keep: int | None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for path in sorted(files):
            data = path.read_bytes()
            if keep is not None and len(data) > keep:
                data = data[: keep // 2] + b"\n[... left out ...]\n" + data[-keep // 2 :]
            entry = tarfile.TarInfo(path.name)
            entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def untar(source: Path, folder: Path) -> None:
    """The plain files of an archive of ours, by their last names alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source, "r:gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            name = Path(member.name).name
            if file is not None and name not in ("", ".", "..") and not (folder / name).exists():
                (folder / name).write_bytes(file.read())


def fit(folder: Path, names: tuple[str, ...], most: int = MOST_BYTES) -> list[str]:
    """Enforces the limit on our own files of a folder; what was compressed or left out, in words. Other files are
    nobody's to touch, and are counted.

    names: patterns of our files. suite.json is not among them: what it holds is small by its making.
    """
    said = []
    for path in sorted(path for name in names for path in folder.glob(name)):
        if path.stat().st_size <= most:
            continue
        if path.suffix in (".json", ".jsonl"):
            packed = path.with_name(path.name + ".gz")
            packed.write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
            said.append(f"{path.name}: compressed")
            path = packed
        if path.stat().st_size > most:
            path.unlink()
            said.append(f"{path.name}: left out, {most} bytes are the most of a file")
    count = sum(1 for path in folder.iterdir() if path.is_file())
    if count > MOST_FILES:
        said.append(f"{folder}: holds {count} files, others' among them; {MOST_FILES} travel")
    return said


def text_of(path: Path) -> str:
    """Of a file or, where it was too large, of its compressed form.

    Raises:
        FileNotFoundError: there is neither.
    """
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and packed.exists():
        return gzip.decompress(packed.read_bytes()).decode("utf-8")
    return path.read_text(encoding="utf-8")
