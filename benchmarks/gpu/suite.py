"""The suite: every part in turn, the most valuable first, each its own process with its share of the time that is left.

    benchmarks/gpu_suite.sh --minutes 9 --out DIR
    benchmarks/gpu_suite.sh --device cpu --quick --out DIR     tries every part's command out, and proves nothing

Run it again on the same folder and it goes on: what is done stays, what failed, hung or was killed is run again.
Knows parts, time and the results' folder; does not know what a part measures. Imports no torch, so that nothing that
torch does can end it. Never run on a GPU.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miss.benchmarks import going_on
from miss.benchmarks.gpu import collect, process, state
from miss.benchmarks.gpu.jobs import last_object
from miss.benchmarks.gpu.plan import Plan, python
from miss.benchmarks.gpu.state import ROOT, State

_PROBE = 120.0  # seconds for finding the device
_ENDING = 8.0  # of the suite's time, kept for packing
_MARGIN = 0.9  # of its limit that a part is told, so that it can end by itself
_LEAST = 8.0  # seconds below which no part is begun
_STARTS = 50  # of one part in one run: a command that ends with 75 goes on where it is started again


@dataclass(frozen=True)
class Part:
    """weight: its share of the time, among the parts that are still to come."""

    name: str
    what: str
    weight: float
    command: Callable[[Plan], list[str]]


def _jobs(name: str) -> Callable[[Plan], list[str]]:
    return lambda plan: python("miss.benchmarks.gpu.jobs", name, *plan.flags())


def _machine(plan: Plan) -> list[str]:
    words = ["--device", plan.device, "--seconds", f"{plan.seconds:.0f}", *(["--quick"] if plan.quick else [])]
    return python("miss.benchmarks.gpu.machine", *words, "--result", str(plan.result("machine")))


def _evidence(plan: Plan) -> list[str]:
    words = ["--device", plan.device, "--minutes", f"{plan.seconds / 60:.3f}", "--out", str(plan.evidence)]
    few = ["--quick", "--op", "kv_append"] if plan.device == "cpu" else ["--quick"]
    return python("miss", "kernels", "validate", *words, *(few if plan.quick else []))


def _tune(plan: Plan) -> list[str]:
    return python("miss.benchmarks.gpu.tune", *plan.flags(), "--result", str(plan.result("tune")))


PARTS = (
    Part("machine", "the machine and its ceilings", 1.0, _machine),
    Part("tests", "tests on the device", 3.0, _jobs("tests")),
    Part("evidence", "evidence: our kernels against the truth and the next candidate", 4.0, _evidence),
    Part("kernels", "kernels against every peer present", 4.0, _jobs("kernels")),
    Part("answers", "whole answers: eager, SDPA, compiled, ours with and without graphs", 3.0, _jobs("answers")),
    Part("finetune", "a finetuning step", 1.5, _jobs("finetune")),
    Part("profiles", "profiles of an answer", 1.0, _jobs("profiles")),
    Part("tune", "launch configurations of our kernels, each in turn", 1.5, _tune),
)


def main(argv: list[str] | None = None, parts: tuple[Part, ...] = PARTS) -> int:
    args = _arguments(parts).parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    deadline = time.monotonic() + 60 * args.minutes
    chosen = [part for part in parts if not args.parts or part.name in args.parts]
    out = (args.out or Path(os.environ.get("OUT") or "runs/gpu-suite")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.go_on_from is not None:
        collect.copy(args.go_on_from, out)
    plan = Plan(args.device, args.quick, out, (args.work or _default_work(out)).resolve())
    try:
        environment = _probe(plan)
        head = _head(plan, environment)
        store = State(out, head)
        collect.begin(plan, head["key"])
    except (OSError, ValueError) as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2
    key = head["key"]
    print(f"{environment.get('gpu') or 'CPU (a trial, it proves nothing)'}; sources {store.content['source']}; {out}")
    try:
        for i, part in enumerate(chosen):
            _turn(part, i, chosen, plan, store, key, deadline, args.again)
    finally:
        store.content["notes"] = collect.pack_all(plan)
        store.save()
    return _finish(chosen, store, args.json)


def _arguments(parts: tuple[Part, ...]) -> argparse.ArgumentParser:
    names = ", ".join(part.name for part in parts)
    text = f"{(__doc__ or '').strip()}\n\nParts, in this order:\n"
    text += "\n".join(f"  {part.name:<10} {part.what}" for part in parts)
    text += "\n\nExit code: 0 all parts ran, 1 some failed or had no time, 2 the suite could not begin."
    parser = argparse.ArgumentParser(
        "gpu_suite.sh", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--out", type=Path, help="results' folder; default $OUT, else runs/gpu-suite")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the commands out")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few repeats, some operations")
    parser.add_argument("--parts", nargs="+", metavar="PART", choices=[part.name for part in parts], help=names)
    parser.add_argument("--again", action="store_true", help="run also what is done")
    parser.add_argument(
        "--go-on-from", type=Path, metavar="DIR", help="results of an earlier run, copied to --out first"
    )
    parser.add_argument("--work", type=Path, help="folder of what need not come back; default in the temporary folder")
    parser.add_argument("--json", action="store_true", help="a summary as one JSON object, last")
    return parser


def _default_work(out: Path) -> Path:
    """One of the results' folder's own, so that a run that goes on finds it again."""
    name = hashlib.sha256(str(out).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"miss-gpu-suite-{os.getuid()}-{name}"


def _terminated(*_: Any) -> None:
    raise SystemExit(143)


def _probe(plan: Plan) -> dict[str, Any]:
    """The machine's description, from a process of its own.

    Raises:
        ValueError: there is no such device, or PyTorch does not load; the end of what was said.
    """
    log = plan.work / "probe.log"
    code = (
        "import json, torch; from miss.benchmarks.gpu.machine import environment; "
        f"torch.zeros(1, device='{plan.device}').add_(1).item(); "
        f"print(json.dumps(environment(torch.device('{plan.device}'))))"
    )
    log.unlink(missing_ok=True)
    ended = process.run([sys.executable, "-c", code], plan.environment(), ROOT, log, _PROBE, print)
    found = last_object(process.tail(log))
    if ended.code or ended.hung or found is None:
        raise ValueError(f"no {plan.device} device answers: {process.last_line(log)}")
    return found


def _head(plan: Plan, environment: dict[str, Any]) -> dict[str, Any]:
    source = state.source_hash()
    found = {"key": state.key_of(source, environment, plan.quick), "source": source, "commit": state.commit()}
    return {**found, "device": plan.device, "quick": plan.quick, "environment": environment}


def _turn(
    part: Part, at: int, chosen: list[Part], plan: Plan, store: State, key: str, deadline: float, again: bool
) -> None:
    head = f"[{at + 1}/{len(chosen)}] {part.name}"
    left = deadline - time.monotonic() - _ENDING
    if store.is_done(part.name, key) and not again:
        print(f"{head}: done before", flush=True)
        return
    if left < _LEAST:
        if store.earlier(part.name, key) is None:  # what an earlier run has left stays
            store.put(part.name, status="skipped", key=key, why=f"no time was left ({max(0.0, left):.0f} s)")
        print(f"{head}: no time is left", flush=True)
        return
    coming = [other for other in chosen[at:] if again or not store.is_done(other.name, key)]
    limit = left * part.weight / sum(other.weight for other in coming)
    limit = max(limit, min(left, _LEAST))
    print(f"{head}: {part.what}; at most {limit:.0f} s of the {left:.0f} s left", flush=True)
    _run(part, plan, store, key, limit, again)


def _run(part: Part, plan: Plan, store: State, key: str, limit: float, again: bool) -> None:
    result, log = plan.result(part.name), plan.logs / f"{part.name}.log"
    earlier = None if again else store.earlier(part.name, key)
    if again or not (store.was_killed(part.name, key) and result.exists()):  # else it says more than was brought home
        result.unlink(missing_ok=True)
        if earlier is not None:
            state.write_json(result, earlier)
    store.put(part.name, status="running", key=key, limit=round(limit, 1), result=earlier)
    ended, _ = process.until_over(
        lambda left: part.command(replace(plan, seconds=_MARGIN * left)),
        lambda words, left: process.run(words, plan.environment(), ROOT, log, left, lambda t: print(t, flush=True)),
        lambda code: code == going_on.AGAIN,
        limit,
        _LEAST,
        _STARTS,
    )
    found = collect.result_of(part.name, plan)
    status = _status(ended, found)
    entry = {"status": status, "key": key, "limit": round(limit, 1), "seconds": round(ended.seconds, 1)}
    entry |= {"exit_code": ended.code, "result": found}
    if status != "done":
        entry["tail"] = process.tail(log)
    store.put(part.name, **entry)
    collect.pack_all(plan)
    print(f"  {part.name}: {status} after {ended.seconds:.0f} s", flush=True)
    if status in ("failed", "hung"):
        print("  | " + "\n  | ".join(process.tail(log, 5).splitlines()), flush=True)


def _status(ended: process.Ended, found: dict[str, Any] | None) -> str:
    if ended.hung:
        return "hung"
    if ended.code not in (0, going_on.AGAIN):
        return "failed"
    return "partial" if ended.code or (found is not None and not found.get("complete", True)) else "done"


def _finish(chosen: list[Part], store: State, as_json: bool) -> int:
    statuses = {part.name: store.parts.get(part.name, {}).get("status", "not run") for part in chosen}
    bad = [name for name, status in statuses.items() if status not in ("done", "partial")]
    for note in store.content["notes"]:
        print(f"note: {note}")
    print(f"{len(chosen) - len(bad)} of {len(chosen)} parts ran; results in {store.path.parent}")
    if bad:
        print("did not: " + ", ".join(f"{name} ({statuses[name]})" for name in bad))
    if as_json:
        head = {name: store.content[name] for name in ("source", "commit", "device", "quick")}
        print(json.dumps({"benchmark": "gpu suite", **head, "parts": statuses, "failed": bad}))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
