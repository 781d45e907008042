"""From the work folder into the results' folder: what a part has left, packed so that it travels; and back again.

Knows which files there are; does not know how they are measured. The results' folder holds at any time suite.json,
evidence.json, kernels-<device>.jsonl, answers.json, tuned.json, logs.tar.gz and traces.tar.gz, where there is
something in them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from miss.benchmarks import going_on
from miss.benchmarks.gpu import pack, state
from miss.benchmarks.gpu.plan import Plan

LOGS, TRACES, ANSWERS, TUNED = "logs.tar.gz", "traces.tar.gz", "answers.json", "tuned.json"
_MARKER = ".miss-gpu-suite"  # a work folder of ours, which may be emptied; holds the key
_OURS = ("evidence.json", "kernels-*.jsonl", ANSWERS, TUNED, LOGS, TRACES)


def result_of(name: str, plan: Plan) -> dict[str, Any] | None:
    """What a part has written of itself, or what its files say."""
    if name == "evidence":
        return _of_evidence(plan)
    try:
        found = json.loads(plan.result(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _of_evidence(plan: Plan) -> dict[str, Any] | None:
    try:
        records = json.loads(plan.evidence.read_text(encoding="utf-8"))["records"]
    except (OSError, ValueError, KeyError):
        return None
    faster = [r for r in records if r["correct"] and (r["speedup"] or 0) > 1]
    wrong = [r for r in records if not r["correct"] and r["failure"] is None]
    failed = [r for r in records if r["failure"] is not None]
    losing = sorted({_name(r) for r in records if r["failure"] is None} - {_name(r) for r in faster})
    log = plan.logs / "evidence.log"
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    over = "the time is over" in said.rpartition("\n$ ")[2]  # of the last command: a log is added to
    return {
        "complete": not over,
        "records": len(records),
        "correct_and_faster": len(faster),
        "wrong": [f"{_name(r)} {r['shape_class']}" for r in wrong][:50],
        "failed": [f"{_name(r)} {r['shape_class']}: {r['failure']}"[:300] for r in failed][:50],
        "nowhere_faster": losing,
    }


def _name(record: dict[str, Any]) -> str:
    return f"{record['op']} {record['implementation']}"


def pack_all(plan: Plan) -> list[str]:
    """Brings the results' folder up to date; what was left out or shortened, in words."""
    _kernels(plan)
    _answers(plan)
    for name in (".evidence.json.lock",):
        (plan.out / name).unlink(missing_ok=True)
    said = pack.tar(plan.out / LOGS, sorted(plan.logs.glob("*.log")))
    said += pack.tar(plan.out / TRACES, sorted(plan.traces.glob("*.json")))
    return said + pack.fit(plan.out, _OURS)


def _kernels(plan: Plan) -> None:
    """One file of all operations' rows; a row that was measured again takes the earlier one's place."""
    texts = [
        path.read_text(encoding="utf-8") for path in sorted(plan.work.glob(f"bench/*/kernels-{plan.device}.jsonl"))
    ]
    if not texts:
        return
    before = plan.kernels.read_text(encoding="utf-8") if plan.kernels.exists() else ""
    found = [row for line in "\n".join([before, *texts]).splitlines() if (row := _object(line)) is not None]
    temporary = plan.kernels.with_name(f".{plan.kernels.name}.new")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in joined(found)), encoding="utf-8")
    temporary.replace(plan.kernels)


def joined(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of kernels-<device>.jsonl, the later of what says of the same; environment and ceilings first. That there
    was no time for a case is not said once it was measured."""
    names = ("record", "op", "implementation", "shape", "dtype", "cache")
    kept = {json.dumps([line.get(name) for name in names]): line for line in lines}
    over = going_on.over([line for line in kept.values() if line["record"] == "case"])
    late = [name for name, line in kept.items() if line.get("reason") == going_on.LATE and going_on.key(line) in over]
    for name in late:
        del kept[name]
    return sorted(kept.values(), key=lambda line: line["record"] not in ("environment", "ceilings"))


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:  # the last line of a process that was killed
        return None
    return found if isinstance(found, dict) and "record" in found else None


def _whole(path: Path) -> dict[str, Any] | None:
    """None: half written by a process that was ended."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and "setting" in found else None


def _answers(plan: Plan) -> None:
    results = {}
    if (plan.out / ANSWERS).exists():
        results = json.loads((plan.out / ANSWERS).read_text(encoding="utf-8"))
    # Peers of one setting may have been measured by several commands; what both have is the first one's.
    for path in sorted((plan.work / "answers").glob("*/answer-*.json"), reverse=True):
        found = _whole(path)
        if found is not None:
            label = found["setting"]["label"]
            before = results.get(label, {})
            both = {name: {**before.get(name, {}), **found[name]} for name in ("rows", "ratios", "failed")}
            results[label] = found | both
    if results:
        state.write_json(plan.out / ANSWERS, results)


def begin(plan: Plan, key: str) -> None:
    """Makes the work folder ready: emptied where it is of another run, with the logs and traces of an earlier one.

    Raises:
        ValueError: the folder holds what is not the suite's.
    """
    marker = plan.work / _MARKER
    if plan.work.exists() and not marker.exists() and any(path.name != "probe.log" for path in plan.work.iterdir()):
        raise ValueError(f"{plan.work} holds something else; name another folder with --work")
    new = not (plan.out / state.NAME).exists()
    if marker.exists() and (new or marker.read_text(encoding="utf-8") != key):
        shutil.rmtree(plan.work)
    for folder in (plan.logs, plan.traces):
        folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(key, encoding="utf-8")
    for name, folder in ((LOGS, plan.logs), (TRACES, plan.traces)):
        if (plan.out / name).exists():
            pack.untar(plan.out / name, folder)


def copy(source: Path, out: Path) -> None:
    """An earlier run's files, where the results' folder has none of that name."""
    for name in (state.NAME, *_OURS):
        for path in source.glob(name):
            if not (out / path.name).exists():
                shutil.copyfile(path, out / path.name)
