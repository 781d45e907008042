"""Checkpoints that are whole or not there: written aside, hashed, synced, renamed; verified before they are read.

Knows folders, bytes and hashes; does not know what is in the files: who saves hands over a function that writes them.

A run's `checkpoints/` holds `step-00000200/` folders, each with a `MANIFEST.json` of every file's size and SHA-256, and
`latest`, a file that names the newest. A crash at any moment leaves the previous one loadable: a folder gets its name
only after all its bytes are on the disk, and `latest` changes after that.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
LATEST = "latest"
_PREFIX = "step-"
_ASIDE = ".aside-"


class CheckpointCorrupt(ValueError):
    """A training checkpoint that is truncated, altered or incomplete."""


class CheckpointNotSaved(ValueError):
    """A checkpoint could not be written; those before it are untouched."""


class CheckpointStore:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self.keep_last = folder, keep_last

    def save(self, step: int, write: Callable[[Path], None], keep: int | None = None) -> Path:
        """Writes the checkpoint of `step` by `write(folder)`; then drops all but the last `keep_last` and step `keep`.

        Raises:
            CheckpointNotSaved: the disk is full, or the folder cannot be written.
        """
        target = self.folder / f"{_PREFIX}{step:08d}"
        replace_folder(target, lambda aside: _write_with_manifest(aside, write))
        write_atomic(self.folder / LATEST, f"{target.name}\n".encode())
        self._drop_old(step, keep)
        return target

    def steps(self) -> list[int]:
        """The steps that have a folder, newest first. Nothing is verified."""
        names = [path.name for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir()]
        return sorted((int(n.removeprefix(_PREFIX)) for n in names if n.removeprefix(_PREFIX).isdigit()), reverse=True)

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; None where there is none at all. Each that does not is reported.

        Raises:
            CheckpointCorrupt: there are checkpoints, and not one of them is whole.
        """
        problems: list[str] = []
        for path in self._candidates():
            try:
                verify(path)
            except CheckpointCorrupt as error:
                problems.append(str(error))
                print(f"warning: {error}; trying the one before it", file=sys.stderr, flush=True)
                continue
            return path
        if problems:
            raise CheckpointCorrupt(f"no checkpoint in {self.folder} is whole: {'; '.join(problems)}")
        return None

    def _candidates(self) -> list[Path]:
        """Newest first. `latest` can only lag behind (a crash between the two renames), so it decides nothing here.

        What it names must be there all the same: otherwise somebody removed it, which is said.
        """
        paths = [self.folder / f"{_PREFIX}{step:08d}" for step in self.steps()]
        latest = self.folder / LATEST
        if latest.is_file():
            name = latest.read_bytes().decode("utf-8", "replace").strip()
            if name not in [path.name for path in paths]:
                print(
                    f"warning: {latest} names {name[:40]!r}, which is not there; looking at the folders instead",
                    file=sys.stderr,
                    flush=True,
                )
        return paths

    def _drop_old(self, saved: int, keep: int | None) -> None:
        """Newer ones than `saved` are damaged, or of a future that this run went back from: they do not count, and go
        now that a whole one is there."""
        kept = [step for step in self.steps() if step <= saved][: self.keep_last]
        for step in self.steps():
            if step > saved:
                print(f"removed step {step}: this run went on from before it", file=sys.stderr, flush=True)
            if step not in kept and step != keep:
                remove_folder(self.folder / f"{_PREFIX}{step:08d}")

    def clean(self) -> None:
        """Removes what an interrupted save or removal left behind; call it when a run starts."""
        recover(self.folder)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Makes `target` the folder that `write(folder)` fills, so that it is the old one or the new one, never a mixture.

    Raises:
        CheckpointNotSaved: the disk is full, or the place cannot be written. `target` is as it was.
    """
    aside, old = target.parent / f"{_ASIDE}new-{target.name}", target.parent / f"{_ASIDE}old-{target.name}"
    try:
        with saving(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            recover(target.parent)
            aside.mkdir()
            write(aside)
            sync_tree(aside)
            if target.exists():
                os.rename(target, old)  # `recover` puts it back where a crash comes before the next line
            os.rename(aside, target)
            sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextlib.contextmanager
def saving(target: Path) -> Iterator[None]:
    """Errors of writing inside, in the words of the system's or of safetensors, become one CheckpointNotSaved."""
    try:
        yield
    except Exception as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        raise CheckpointNotSaved(
            f"could not save {target}: {reason}; what was saved before is untouched. Free some space or choose another "
            f"--output, then start again with --resume auto"
        ) from error


def recover(folder: Path) -> None:
    """Undoes what a crash in `replace_folder` left in `folder`: puts the old one back if the new one never came."""
    prefix = f"{_ASIDE}old-"
    for old in folder.glob(f"{prefix}*"):
        target = folder / old.name.removeprefix(prefix)
        if not target.exists():
            os.rename(old, target)
    for left in folder.glob(f"{_ASIDE}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


def remove_folder(path: Path) -> None:
    """Renames first, so that a crash never leaves half a folder under a checkpoint's name."""
    aside = path.parent / f"{_ASIDE}gone-{path.name}"
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def verify(path: Path) -> None:
    """Reads every byte of a checkpoint folder and compares it with the manifest.

    Raises:
        CheckpointCorrupt: a file is missing, of another size, altered or not in the manifest; or the manifest is.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        files = manifest["files"]
        whole = raw == _manifest_bytes(files)
        stated = {name: (one["size"], one["sha256"]) for name, one in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointCorrupt(f"{path.name}: its {MANIFEST} is missing or damaged") from None
    if not whole:
        raise CheckpointCorrupt(f"{path.name}: its {MANIFEST} was altered")
    present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {MANIFEST}
    if present != set(stated):
        different = ", ".join(sorted(present ^ set(stated))[:3])
        raise CheckpointCorrupt(f"{path.name}: missing or unexpected files: {different}")
    for name, (wanted, digest) in stated.items():
        size = (path / name).stat().st_size
        if size != wanted:
            raise CheckpointCorrupt(f"{path.name}: {name} has {size} bytes; its manifest says {wanted}")
        if sha256(path / name) != digest:
            raise CheckpointCorrupt(f"{path.name}: {name} was altered (its SHA-256 differs from the manifest's)")


def write_atomic(path: Path, content: bytes) -> None:
    """A file that holds the old bytes or the new ones, whenever the machine stops."""
    temporary = path.parent / f"{_ASIDE}{path.name}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointNotSaved(f"could not write {path}: {_write_failure(error) or error}") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """All files, then all folders, the innermost first, on the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def _write_with_manifest(folder: Path, write: Callable[[Path], None]) -> None:
    write(folder)
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_bytes(_manifest_bytes(files))


def _manifest_bytes(files: dict[str, Any]) -> bytes:
    """One way to write a manifest, so that a single flipped bit anywhere in it shows; it carries its own hash."""
    body = json.dumps(files, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, sort_keys=True, indent=1).encode()


def _write_failure(error: Exception) -> str | None:
    """Why writing failed, in words; None where the error is not about writing.

    safetensors reports a full disk as its own error type with the system's text in it.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return str(error).split("I/O error: ")[-1]
    return None
