"""Tries every launch configuration of the Triton kernels' tables in turn, and writes those that beat the default.

    python -m miss.benchmarks.gpu.tune --device cuda --out DIR --work DIR --seconds 100 --result tune.json

Knows tables of launches, calls and records; does not know any kernel. Each configuration is measured as evidence is: it
must be right by the error rule, and its time is the row's own. What `miss bench merge` makes kernels/tuned/<gpu>.json
of is in tuned.json. On a CPU nothing is measured, and it says so. Never run on a GPU; its order of events is tested
with interpreted kernels.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from miss.benchmarks import going_on
from miss.benchmarks.gpu.machine import NEEDS_CUDA
from miss.benchmarks.gpu.state import write_json
from miss.cli.calls import Shapes, calls, variants
from miss.kernels import registry
from miss.kernels.launches import Launch, trial
from miss.kernels.registry import Impl
from miss.kernels.validation import QUICK, Call, Pace, gather, measure
from miss.models.config import MissConfig

PACE = Pace(rounds=5, sample=5e-4, most_calls=50)
_WINS = 0.97  # of the default's time: less is noise
_BATCHES = ((8, 8), (1, 8), (1, 1), (32, 32))  # images, questions
Place = tuple[str, str]  # an operation's name as its launcher says it, and a shape class


class Search:
    """What was measured so far, whole in a file at any time: it may end at any kernel."""

    def __init__(self, path: Path, pace: Pace = PACE) -> None:
        self.path, self.pace = path, pace
        try:
            self.content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.content = {"complete": False, "measured": {}, "bad": []}
        if last := self.content.pop("trying", None):  # its process died at this one
            self.content["bad"].append(last)

    def save(self, **changes: Any) -> None:
        self.content |= changes
        write_json(self.path, self.content)

    def run(self, found: Iterable[tuple[Call, Impl]], deadline: float) -> bool:
        """Tries all launches of all calls; whether it came to the end."""
        for call, impl in found:
            try:
                places = asked(call, impl)
            except Exception as error:  # of a kernel, its compiler or memory: evidence judges it, here it has no launch
                self._fault([call.op.name, impl.name, 0, call.shape_class], error)
                continue
            for (op, kind), table in places.items():
                if len(table) < 2:
                    continue
                self.content.setdefault("tables", {})[f"{op}/{kind}"] = [asdict(launch) for launch in table]
                for i, launch in enumerate(table):
                    if time.time() > deadline:
                        return False
                    self._one(call, impl, op, kind, i, launch)
        return True

    def _one(self, call: Call, impl: Impl, op: str, kind: str, index: int, launch: Launch) -> None:
        name = [op, kind, index, f"{call.op.name} {call.shape_class}"]
        times = self.content["measured"].setdefault(f"{op}/{kind}", {}).setdefault(name[3], {})
        if str(index) in times or any(bad[:4] == name for bad in self.content["bad"]):
            return
        self.save(trying=name)

        def pick(asking: str, shape: str, default: Launch) -> Launch | None:
            return launch if (asking, shape) == (op, kind) else None

        try:
            with trial(pick):
                record = measure(call, impl, self.pace)
            times[str(index)] = record.microseconds if record.correct else None
        except Exception as error:  # of the reference, the other row, or memory: it says nothing of this launch
            del self.content["trying"]
            self._fault(name, error)
            return
        del self.content["trying"]
        self.save()

    def _fault(self, name: list[Any], error: Exception) -> None:
        """Writes it down; a CUDA context that went with it ends the process, and the next one goes on behind it."""
        self.content["bad"].append([*name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"])
        self.save()
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                print(f"{name[0]}: the CUDA context is lost ({lost}); started again, tuning goes on", flush=True)
                raise SystemExit(going_on.AGAIN) from lost

    def winners(self) -> dict[Place, tuple[int, float]]:
        """Place -> (index in its table, time / the default's), where another than the default wins over all calls."""
        found = {}
        for place, by_call in self.content["measured"].items():
            best = _best([{int(i): t for i, t in times.items()} for times in by_call.values()])
            if best is not None:
                op, _, kind = place.rpartition("/")
                found[op, kind] = best
        return found


def _best(calls: list[dict[int, float | None]]) -> tuple[int, float] | None:
    """The launch that is right in all calls and whose geometric mean of times is least, if it beats the default."""
    whole = [times for times in calls if times.get(0)]
    scores: dict[int, float] = {}
    for index in {i for times in whole for i in times if i}:
        ratios = [float(times[index] or math.inf) / float(times[0] or 1.0) for times in whole if index in times]
        if len(ratios) == len(whole):
            scores[index] = statistics.geometric_mean(ratios) if math.isfinite(max(ratios)) else math.inf
    index = min(scores, key=lambda i: scores[i], default=0)
    return (index, round(scores[index], 4)) if index and scores[index] < _WINS else None


def tables() -> list[dict[str, tuple[Launch, ...]]]:
    """Every table of launches in the Triton modules that are loaded."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.startswith("miss.kernels.") and name.rpartition(".")[2].startswith("triton"):
            for value in vars(module).values():
                if isinstance(value, dict) and value and all(_is_launches(v) for v in value.values()):
                    found.append(value)
    return found


def _is_launches(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(one, Launch) for one in value)


def asked(call: Call, impl: Impl) -> dict[Place, tuple[Launch, ...]]:
    """Which launches a row's call asks for, each with its table."""
    seen: dict[Place, Launch] = {}

    def pick(op: str, kind: str, default: Launch) -> None:
        seen[op, kind] = default

    with trial(pick):
        measure(call, impl, QUICK)
    known = tables()
    found = {}
    for (op, kind), first in seen.items():
        for table in known:
            if kind in table and table[kind][0] is first:
                found[op, kind] = table[kind]
    return found


def everything(device: torch.device) -> Iterable[tuple[Call, Impl]]:
    """Calls of base in bfloat16 at several batches, with every Triton row that takes them."""
    config, seen = MissConfig.preset("base"), set[tuple[str, str, str]]()
    for images, rows in _BATCHES:
        shapes = Shapes(config, torch.bfloat16, device, images, rows, laid_out=False)
        table, more = calls(shapes), variants(shapes)
        for name in registry.OPS:
            for call in (table.get(name), *more.get(name, ())):
                if call is None:
                    continue
                try:
                    found = gather(call)
                except Exception as error:  # the rows that run by themselves do not: most often memory
                    print(f"{name}: {type(error).__name__}", flush=True)
                    continue
                for one in found:
                    for impl in one.op.impls:
                        key = (one.op.name, one.shape_class, impl.name)
                        # With a gradient both tables are asked, each of which has a call of its own.
                        if one.wanted or not impl.sources or key in seen or one.op.cannot(impl, *one.args):
                            continue
                        seen.add(key)
                        yield one, impl


def report(search: Search) -> dict[str, Any]:
    """tuned.json: what kernels/tuned/ takes, and how much each launch wins."""
    table: dict[str, dict[str, Any]] = {}
    wins = {}
    for (op, kind), (index, ratio) in search.winners().items():
        table.setdefault(op, {})[kind] = search.content["tables"][f"{op}/{kind}"][index]
        wins[f"{op}/{kind}"] = ratio
    return {"gpu": search.content.get("gpu"), "table": table, "time_of_default": wins}


def main() -> int:
    parser = argparse.ArgumentParser(description="Launch configurations, each in turn.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="as few calls as show that it works")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="(unused)")
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    if args.device == "cpu":
        write_json(args.result, {"complete": True, "tuned": NEEDS_CUDA})
        print(f"launches: {NEEDS_CUDA}")
        return 0
    deadline = time.time() + args.seconds
    registry.load_all()
    torch.manual_seed(0)
    search = Search(args.result, QUICK if args.quick else PACE)
    search.content["gpu"] = torch.cuda.get_device_name()
    complete = search.run(everything(torch.device("cuda")), deadline)
    found = report(search)
    write_json(args.out / "tuned.json", found)
    search.save(complete=complete)
    print("\n".join(f"{place}: {ratio:.2f} of the default's time" for place, ratio in found["time_of_default"].items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
