"""Where data lies, and paths from a manifest that may not leave their folder.

Knows folders and names; does not know what the files hold.
"""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

ENVIRONMENT = "MISS_DATA"
# Bytes of one name and of all, as file systems have them (4,095, the root's included): asking for a longer one is an
# error of the system's, not a no.
LONGEST, LONGEST_PATH = 255, 2048
BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "data"


class DataError(ValueError):
    """A data set that cannot be read as it is; the message names the file and the row."""


class PathError(DataError):
    """A path of a manifest that leaves its folder."""


def safe_path(root: str | os.PathLike[str], name: str) -> Path:
    """`root`/`name`, where that stays inside `root` with every link followed.

    Raises:
        PathError: the name is empty, absolute, holds `..` or a character that no file name has, or leads outside.
    """
    shown = repr(name if len(str(name)) <= 120 else str(name)[:120] + "…")
    if not isinstance(name, str) or not name.strip() or "\x00" in name:
        raise PathError(f"image path {shown}: wanted a file name relative to its data folder")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
        raise PathError(f"image path {shown} is absolute; wanted one relative to its data folder")
    if ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise PathError(f'image path {shown} holds ".."; wanted one that stays inside its data folder')
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in PurePosixPath(name).parts]
    if max(sizes, default=0) > LONGEST or sum(sizes) + len(sizes) > LONGEST_PATH:
        raise PathError(f"image path {shown} is longer than any file's; wanted names of up to {LONGEST} bytes")
    base = Path(root).resolve()
    path = base / name
    try:
        inside = path.resolve().is_relative_to(base)
    except (OSError, ValueError, RuntimeError):  # a loop of links, or characters that the file system refuses
        inside = False
    if not inside:
        raise PathError(f"image path {shown} leads outside its data folder; copy the file into it")
    return path


def resolve_data_root(flag: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the data: the flag, then $MISS_DATA, then shared/data beside the project.

    Raises:
        DataError: none is given, or the one that is given is no folder.
    """
    given = flag or os.environ.get(ENVIRONMENT)
    if given:
        path = Path(given).expanduser()
        if not path.exists():
            raise DataError(
                f"{path}: no such folder (from {'--data' if flag else '$' + ENVIRONMENT}); wanted the data's"
            )
        return path
    if BESIDE.is_dir():
        return BESIDE
    raise DataError(f"no data folder: give --data DIR or set ${ENVIRONMENT} to the folder that holds the data sets")
