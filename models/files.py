"""Whole folders written at once: all of the new files appear under the name, or none.

Knows folders and the operating system's ways to replace one; does not know what a checkpoint is.
"""

import contextlib
import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    Files of an older `folder` that the block did not write are kept. Every file is flushed to the disk before the
    exchange, so that a crash or a power cut leaves either the old folder or the new one.

    Raises:
        FileExistsError: `folder` is a file, or holds folders of its own (which are not replaced).
        OSError: as from writing, for example a full disk; nothing is left behind.
    """
    target = Path(os.path.abspath(folder))
    if target.exists() and not target.is_dir():
        raise FileExistsError(17, "a file stands where a folder is to be written", str(target))
    nested = [child for child in target.iterdir() if child.is_dir()] if target.exists() else []
    if nested:
        raise FileExistsError(17, f"holds the folder {nested[0].name}, so that it is not replaced", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            _keep_others(target, temporary)
        for child in temporary.iterdir():
            child.chmod(0o666 & ~_umask())  # the safetensors library writes files that their owner alone may read
            flush(child)
        flush(temporary)
        _put_in_place(temporary, target)
        flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Has the operating system write a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's file creation mask; there is no way to read it but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _keep_others(old: Path, new: Path) -> None:
    for child in old.iterdir():
        if not (new / child.name).exists():
            shutil.copy2(child, new / child.name, follow_symlinks=False)


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        # Where the kernel cannot swap two names there is a moment without the folder; its old form lies beside it.
        backup = target.parent / f".{target.name}.{os.getpid()}.old"
        os.rename(target, backup)
        os.rename(temporary, target)
        shutil.rmtree(backup)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step (Linux renameat2); False where that is not to be had."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    result: int = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return result == 0


def _remove_abandoned(target: Path) -> None:
    """Removes what a killed process left: temporary folders of this target whose process is gone."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(\d+)\.tmp")
    for sibling in target.parent.iterdir():
        if (match := pattern.fullmatch(sibling.name)) and not _is_running(int(match.group(1))):
            shutil.rmtree(sibling, ignore_errors=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
