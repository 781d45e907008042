"""Brings the results of a run on a GPU into the repository: `miss bench merge DIR`.

Knows the results' files and where they belong; does not know how they were made. Nothing that is in the repository is
lost: evidence is added record by record, the newer of one key (operation, row, GPU, shape class) stays, and a record of
other sources replaces none. Other files are named after the GPU; what a run of the same key (sources, versions) has
left there is added to, and what one of another key has left is kept beside, with its sources' hash in its name.

  evidence.json         kernels/evidence.json, refused where it is a CPU's
  kernels-cuda.jsonl    benchmarks/results/kernels-<gpu>.jsonl
  answers.json          benchmarks/results/answers-<gpu>.json
  tuned.json            kernels/tuned/<gpu>.json, place by place; not from other sources
  suite.json            benchmarks/results/suite-<gpu>.json
  (written)             benchmarks/results/gpu-<gpu>.md
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.benchmarks.gpu import collect, pack, state, summary
from miss.benchmarks.gpu.summary import Results
from miss.kernels import evidence, launches
from miss.kernels.launches import Launch, file_name
from miss.kernels.records import Record
from miss.kernels.records import read as read_records

RESULTS = Path("benchmarks") / "results"
EVIDENCE = Path("kernels") / "evidence.json"
TUNED = Path("kernels") / "tuned"


@dataclass(frozen=True)
class Merged:
    """written: files, relative to the repository. records: new or newer ones. kept: that were there and stay. stale:
    records of that GPU that were measured with other launches than are now tuned there; they prove nothing."""

    written: list[str]
    records: int
    kept: int
    page: str
    stale: int = 0


def read(folder: Path) -> Results:
    """A folder of results.

    Raises:
        ValueError: it holds none, or a file of it is damaged; the message names it.
    """
    if not (folder / state.NAME).exists():
        raise ValueError(f"{folder}: no {state.NAME} in it; wanted the folder that gpu_suite.sh wrote")
    found = state.read(folder / state.NAME)
    for name in ("source", "environment", "device"):
        if name not in found:
            raise ValueError(f"{folder / state.NAME}: says no {name}")
    device = found["device"]
    results = Results(found, _lines(folder / f"kernels-{device}.jsonl"), _object(folder / "answers.json"))
    wanted = ("op", "shape", "dtype", "cache", "implementation", "median_ms", "ours", "gbps")
    if any(name not in row for row in results.rows for name in wanted):
        raise ValueError(f"{folder / f'kernels-{device}.jsonl'}: a row without one of {', '.join(wanted)}")
    for label, one in results.answers.items():
        rows = one.get("rows") if isinstance(one, dict) else None
        if not isinstance(rows, dict) or not all(_has_median(row) for row in rows.values()):
            raise ValueError(f"{folder / 'answers.json'}: {label} is no result of `miss bench answer`")
    return results


def _has_median(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("ms"), dict) and "median" in row["ms"]


def _text(path: Path) -> str | None:
    try:
        return pack.text_of(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _object(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        found = {} if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted an object")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    text, found = _text(path), []
    for number, line in enumerate((text or "").splitlines(), 1):
        try:
            one = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(one, dict) or "record" not in one:
            raise ValueError(f"{path}, line {number}: wanted an object that says which record it is")
        found.append(one)
    return found


def merge(folder: Path, root: Path, any_source: bool = False, trial: bool = False) -> Merged:
    """Everything is read and checked before anything is written.

    Raises:
        ValueError: see `read`; or the results are of other sources than the repository's and `any_source` is not said,
            or of a CPU or a quick run and `trial` is not; or the repository's own evidence is damaged.
    """
    results, records, tuned = read(folder), _records(folder), _tuned(folder)
    source, here = results.state["source"], state.source_hash(root)
    if source != here and not any_source:
        commit = results.state.get("commit") or "unknown"
        raise ValueError(
            f"{folder} is of the sources {source} (commit {commit}), the repository's are {here}: "
            f"run the suite again, or say --any-source"
        )
    if (results.state["device"] == "cpu" or results.state.get("quick")) and not trial:
        raise ValueError(f"{folder} is of a trial (a CPU, or --quick): it proves nothing; --trial brings it in even so")
    before = read_records(root / EVIDENCE)
    fresh = newer(before, records, source == here)
    _check_old(root / RESULTS, results)
    written = []
    if fresh:
        evidence.write(root / EVIDENCE, fresh)
        (root / EVIDENCE).with_name(f".{EVIDENCE.name}.lock").unlink(missing_ok=True)
        written.append(EVIDENCE.as_posix())
    if tuned.get("table") and source == here:
        written.append(_tune(root, tuned["gpu"], tuned["table"]))
    results = _together(root / RESULTS, results)
    page = summary.page(results, state.now()[:10])
    for name, text in _files(results, page).items():
        (root / RESULTS / name).write_text(text, encoding="utf-8")
        written.append((RESULTS / name).as_posix())
    return Merged(written, len(fresh), len(before), page, _stale(root, results.state["environment"].get("gpu")))


def _names(results: Results) -> dict[str, str]:
    gpu = _slug(results.state["environment"].get("gpu") or "trial on a CPU")
    ends = {"suite": "json", "kernels": "jsonl", "answers": "json", "gpu": "md"}
    return {kind: f"{kind}-{gpu}.{end}" for kind, end in ends.items()}


def _files(results: Results, page: str) -> dict[str, str]:
    names = _names(results)
    found = {names["suite"]: json.dumps(results.state, indent=1) + "\n", names["gpu"]: page}
    if results.lines:
        found[names["kernels"]] = "".join(json.dumps(line) + "\n" for line in results.lines)
    if results.answers:
        found[names["answers"]] = json.dumps(results.answers) + "\n"
    return found


def _check_old(folder: Path, new: Results) -> None:
    """Reads what `_together` will read: a damaged file is an error before anything is written."""
    names = _names(new)
    if (folder / names["suite"]).exists() and state.read(folder / names["suite"]).get("key") == new.state.get("key"):
        _lines(folder / names["kernels"])
        _object(folder / names["answers"])


def _together(folder: Path, new: Results) -> Results:
    """With what an earlier run of the same key has left; that of another key is moved aside."""
    folder.mkdir(parents=True, exist_ok=True)
    names = _names(new)
    if not (folder / names["suite"]).exists():
        return new
    old = state.read(folder / names["suite"])
    if old.get("key") != new.state.get("key"):
        for name in names.values():
            path = folder / name
            if path.exists():
                path.replace(_aside(path, str(old.get("source", "unknown"))))
        return new
    better = {name: part for name, part in old["parts"].items() if _worth(part) > _worth(new.state["parts"].get(name))}
    together = {**new.state, "parts": {**old["parts"], **new.state["parts"], **better}}
    lines = collect.joined([*_lines(folder / names["kernels"]), *new.lines])
    return Results(together, lines, {**_object(folder / names["answers"]), **new.answers})


def _aside(path: Path, source: str) -> Path:
    """A name that nothing has: the same sources may have run with other versions."""
    names = (path.with_name(f"{path.stem}-{source}{f'-{i}' if i else ''}{path.suffix}") for i in itertools.count())
    return next(name for name in names if not name.exists())


def _worth(part: dict[str, Any] | None) -> int:
    """What is done says more than what is not, and something more than nothing."""
    order = ("skipped", "running", "failed", "hung", "partial", "done")
    return -1 if part is None else order.index(part["status"]) if part.get("status") in order else 0


def _records(folder: Path) -> list[Record]:
    """Those of GPUs: a trial on a CPU has records too, which no rule reads."""
    path = folder / "evidence.json"
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and packed.exists():
        raise ValueError(f"{packed}: unpack it first (gunzip)")
    return [record for record in read_records(path) if record.gpu != "cpu"]


def _tuned(folder: Path) -> dict[str, Any]:
    found = _object(folder / "tuned.json")
    try:
        for kinds in found.get("table", {}).values():
            for launch in (launch for shapes in kinds.values() for launch in shapes.values()):
                Launch(**launch)
        if found and not isinstance(found["gpu"], str):
            raise TypeError("no gpu")
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'tuned.json'}: is no table of launches ({error})") from None
    return found


def _tune(root: Path, gpu: str, table: dict[str, dict[str, Any]]) -> str:
    """Adds to what was tuned on that GPU before; the file's name."""
    name = TUNED / file_name(gpu)
    before = _object(root / name)
    together: dict[str, Any] = {}
    for kinds, op in ((kinds, op) for found in (before, table) for op, kinds in found.items()):
        for kind, shapes in kinds.items():
            together.setdefault(op, {}).setdefault(kind, {}).update(shapes)
    state.write_json(root / name, together)
    return name.as_posix()


def _stale(root: Path, gpu: str | None) -> int:
    if gpu is None:
        return 0
    now = launches.table(root / TUNED / file_name(gpu))
    found = [record for record in read_records(root / EVIDENCE) if record.gpu == gpu]
    return sum(not launches.same(record.launches, now) for record in found)


def newer(before: list[Record], found: list[Record], present: bool = True) -> list[Record]:
    """What of `found` takes its key's place: what is of later date than the record that is there, or has none there.

    present: they are of the present sources; those of others take nobody's place.
    """
    there = {record.key: record for record in before}
    return [r for r in found if r.key not in there or (present and r.date > there[r.key].date)]


def _slug(name: str) -> str:
    """ "NVIDIA H200" as part of a file's name: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
