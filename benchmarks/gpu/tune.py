"""Tries every launch configuration of the Triton kernels' tables in turn, and writes those that beat the default.

    python -m miss.benchmarks.gpu.tune --device cuda --out DIR --work DIR --seconds 100 --result tune.json

Knows tables of launches, calls and records; does not know any kernel. Each configuration is measured as evidence is: it
must be right by the error rule, and its time is taken in turn with the default's, so that a clock that slows down slows
both. A winner is one of a place: an operation's kind of call, in one dtype, at one row's sizes. What `miss bench merge`
makes kernels/tuned/<gpu>.json of is in tuned.json. On a CPU nothing is measured, and it says so. Never run on a GPU;
its order of events is tested with interpreted kernels.
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
from miss.kernels.launches import Launch, Place, trial
from miss.kernels.registry import Impl
from miss.kernels.validation import QUICK, Call, Pace, gather, measure, sound
from miss.models.config import MissConfig

PACE = Pace(rounds=5, sample=5e-4, most_calls=50)
_WINS = 0.97  # of the default's time: less is noise
_BATCHES = ((8, 8), (1, 8), (1, 1), (32, 32))  # images, questions


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
                self._fault([call.op.name, impl.name, "", 0, call.shape_class], error, call.device)
                continue
            for place, table in places.items():
                if len(table) < 2:
                    continue
                launches = [asdict(launch) for launch in table]
                self.content.setdefault("tables", {})[str(place)] = {"place": list(place), "launches": launches}
                for i, launch in enumerate(table):
                    if time.time() > deadline:
                        return False
                    self._one(call, impl, place, i, launch)
        return True

    def _one(self, call: Call, impl: Impl, place: Place, index: int, launch: Launch) -> None:
        """A launch's time in the default's, 1 of the default itself; None where it is wrong."""
        name = [*place, index, f"{call.op.name} {call.shape_class}"]
        ratios = self.content["measured"].setdefault(str(place), {}).setdefault(name[4], {})
        if str(index) in ratios or any(bad[:5] == name for bad in self.content["bad"]):
            return
        self.save(trying=name)

        def pick(asking: Place, default: Launch) -> Launch | None:
            return launch if asking == place else None

        def usual(asking: Place, default: Launch) -> Launch | None:
            return default if asking == place else None

        try:
            with trial(pick):
                record = measure(call, impl, self.pace, usual if index else None)
        except Exception as error:  # of the reference, the other row, or memory: it says nothing of this launch
            del self.content["trying"]
            self._fault(name, error, call.device)
            return
        del self.content["trying"]
        if record.failure is not None and not sound(call.device):
            self._fault(name, RuntimeError(record.failure), call.device)
        found = (1 / record.speedup if index else 1.0) if record.correct and record.speedup else None
        ratios[str(index)] = None if found is None else round(found, 4)
        self.save()

    def _fault(self, name: list[Any], error: Exception, device: torch.device) -> None:
        """Writes it down; a CUDA context that went with it ends the process, and the next one goes on behind it."""
        self.content["bad"].append([*name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"])
        self.save()
        if not sound(device):
            print(f"{name[0]}: the CUDA context is lost; started again, tuning goes on", flush=True)
            raise SystemExit(going_on.AGAIN)

    def winners(self) -> dict[Place, tuple[int, float]]:
        """Place -> (index in its table, time / the default's), where another than the default wins over all calls."""
        found = {}
        for place, by_call in self.content["measured"].items():
            best = _best([{int(i): ratio for i, ratio in ratios.items()} for ratios in by_call.values()])
            if best is not None:
                found[Place(*self.content["tables"][place]["place"])] = best
        return found


def _best(calls: list[dict[int, float | None]]) -> tuple[int, float] | None:
    """The launch that is right in all calls and whose geometric mean of ratios is least, if it beats the default."""
    whole = [ratios for ratios in calls if ratios.get(0)]
    scores: dict[int, float] = {}
    for index in {i for ratios in whole for i in ratios if i}:
        ratios = [float(call[index] or math.inf) for call in whole if index in call]
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

    def pick(place: Place, default: Launch) -> None:
        seen[place] = default

    with trial(pick):
        measure(call, impl, QUICK)
    known = tables()
    found = {}
    for place, first in seen.items():
        for table in known:
            if place.kind in table and table[place.kind][0] is first:
                found[place] = table[place.kind]
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
    table: dict[str, dict[str, dict[str, Any]]] = {}
    wins = {}
    for place, (index, ratio) in search.winners().items():
        launch = search.content["tables"][str(place)]["launches"][index]
        table.setdefault(place.op, {}).setdefault(place.kind, {})[place.shape] = launch
        wins[str(place)] = ratio
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
