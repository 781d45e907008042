"""What a run leaves behind: its environment, the lines of its file, and one JSON object; and how to read them again.

Knows files and the machine's description; does not know how anything is measured.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch

import miss
from miss.benchmarks import going_on
from miss.benchmarks.cases import Case, Result, Row
from miss.benchmarks.ceilings import last_cache_bytes
from miss.benchmarks.harness import as_json
from miss.kernels import extension


def environment(device: torch.device) -> dict[str, Any]:
    """Of the machine and the versions; `moment` of it is taken before and after."""
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "processor": _processor(),
        "isa": extension.isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_cache_mb": last_cache_bytes(device) >> 20,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "miss": miss.__version__,
        "commit": _commit(),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def moment() -> dict[str, Any]:
    """Frequencies (MHz, as the system shows them) and load, now."""
    lines = _cpuinfo("cpu MHz")
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {"mhz": [round(float(line)) for line in lines], "load": [round(value, 2) for value in load]}


def _cpuinfo(key: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _processor() -> str:
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, `+` where it has been changed since; None outside of one."""
    folder = Path(miss.__file__).resolve().parent
    try:
        name, changed = (
            subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changed else "")


def summary(environment: dict[str, Any], ceilings: dict[str, Any], result: Result) -> dict[str, Any]:
    """The run as one JSON object."""
    return {
        "benchmark": "kernels",
        "environment": environment,
        "ceilings": ceilings,
        "rows": [as_json(row) for row in result.rows],
        "refused": result.refused,
        "skipped": result.skipped,
        "cases": result.cases,
    }


def write(path: Path, run: dict[str, Any]) -> None:
    """As JSON lines, whole or not at all: the environment, the ceilings, then a line a row."""
    lines = [{"record": "environment", **run["environment"]}, {"record": "ceilings", **run["ceilings"]}]
    for record in ("row", "refused", "skipped"):
        lines += [{"record": record, **line} for line in run["rows" if record == "row" else record]]
    lines += [{"record": "case", **line} for line in run["cases"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


_SAME = ("device", "processor", "gpu", "torch", "miss")  # what of two environments must agree for one to go on


def earlier(paths: Sequence[Path], cases: Iterable[Case], environment: dict[str, Any]) -> Result:
    """What files of earlier runs say of these cases, the later file's word last; a file that is not there says nothing.

    Raises:
        ValueError: a file is of another machine or other versions, or of rows that this version does not write.
    """
    names = {(case.op, case.shape, case.dtype) for case in cases}
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in (path for path in paths if path.exists()):
        for line in filter(None, map(_object, path.read_text(encoding="utf-8").splitlines())):
            if line.get("record") == "environment":
                other = {name: line.get(name) for name in _SAME if line.get(name) != environment.get(name)}
                if other:
                    raise ValueError(f"--go-on {path}: is of another machine or version ({other}); measure it anew")
            elif (line.get("op"), line.get("shape"), line.get("dtype")) in names:
                kept[line.get("record"), *going_on.key(line), line.get("implementation")] = line
    found = Result()
    for line in kept.values():
        record = line.pop("record")
        try:
            into: dict[str, list[Any]] = {"refused": found.refused, "skipped": found.skipped, "case": found.cases}
            into.get(record, found.rows).append(Row(**line) if record == "row" else line)
        except TypeError as error:
            raise ValueError(f"--go-on: a row that this version does not write ({error}); measure it anew") from None
    return found


def read(path: Path) -> dict[str, Any]:
    """A run, of its file of JSON lines, of what `miss bench kernels` printed, or of the folder that it wrote.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        found = sorted(path.glob("kernels-*.jsonl"))
        if len(found) != 1:
            raise ValueError(f"{path}: holds {len(found)} files kernels-*.jsonl; name one")
        path = found[0]
    objects = [o for o in map(_object, path.read_text(encoding="utf-8").splitlines()) if o is not None]
    if objects and objects[-1].get("benchmark") == "kernels":
        return objects[-1]
    run: dict[str, Any] = {"environment": {}, "ceilings": {}, "rows": [], "refused": [], "skipped": [], "cases": []}
    for line in objects:
        record = line.pop("record", None)
        if record in ("environment", "ceilings"):
            run[record] = line
        elif record in ("row", "refused", "skipped"):
            run["rows" if record == "row" else record].append(line)
        elif record == "case":
            run["cases"].append(line)
    if not run["rows"]:
        raise ValueError(f"{path}: no rows of `miss bench kernels` in it")
    return run


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
