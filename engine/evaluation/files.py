"""Writing results whole or not at all.

Knows paths and bytes; does not know what they mean.
"""

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path


def write_files(files: Mapping[Path, bytes]) -> None:
    """Writes every file beside its place first, and moves them there only once all of them are on the disk.

    A full disk therefore leaves the old files as they were and no new ones. Devices and pipes (/dev/stdout) are
    written to directly, after the rest. A link is followed: the file that it names is replaced.

    Raises:
        OSError: with the path that could not be written.
    """
    direct = {path: data for path, data in files.items() if _is_special(path)}
    targets = {Path(os.path.realpath(path)): data for path, data in files.items() if path not in direct}
    partial: dict[Path, Path] = {}
    try:
        for path, data in targets.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(21, "Is a directory, wanted a file", str(path))
            partial[path] = path.with_name(f".{path.name}.{os.getpid()}.partial")
            _write(partial[path], data, path)
        for path, temporary in partial.items():
            os.replace(temporary, path)
    finally:
        for temporary in partial.values():
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    for path, data in direct.items():
        _write(path, data, path, sync=False)


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _write(path: Path, data: bytes, named: Path, sync: bool = True) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        # A write that fails (a full disk) does not say where.
        raise OSError(error.errno, error.strerror, str(named)) from error
