"""`miss kernels validate`: proves our GPU kernels on the GPU at hand, and writes what it finds as evidence.

Knows which calls to measure, the process that measures and the file; does not know how anything is measured
(miss.kernels.validation) or what a record allows (miss.kernels.evidence).

The measuring is done by a process of its own, which is started anew where it dies or hangs: a kernel that reads beyond
its memory takes the CUDA context of its process with it, and that is a finding about one kernel, not the end of all.
"""

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from miss.cli.calls import Shapes, calls, variants
from miss.kernels import evidence, registry
from miss.kernels.records import Record, read
from miss.kernels.validation import QUICK, Call, Pace, blank, blank_call, gather, measure, ours, sound
from miss.models.config import MissConfig, did_you_mean

# Seconds without a word beyond which a measurement hangs: a third of the time, so that what hangs is found, recorded
# and left behind within the run that meets it. While Triton compiles, which takes most of a minute where cores are few,
# it is half of the time: what takes longer is no finding, and left to the next run.
_LEAST_STALL, _MOST_STALL, _MOST_COMPILING = 30.0, 120.0, 240.0
_STARTING = 90.0  # seconds until the first word: a process imports PyTorch and opens the device
_GRACE = 0.05  # of the time: what is measured when it is over may end
_KILLED = 10.0  # seconds until a killed process is gone, or is left to itself
_BATCHES = (8, 1, 32, 2, 4, 16, 64)  # the most common first, as time may end


@dataclass
class ValidateArgs:
    """Measure our GPU kernels on this machine's GPU: correct? faster than what would run in their place?

    Writes a record a kernel and class of shapes; from then on the kernels that are both run by themselves. What is on
    record for the present sources is not measured again, so that a run that was ended goes on where it was.
    """

    op: tuple[str, ...] = ()
    """Only these operations (and their gradients); all that have a kernel of ours where none is named."""
    minutes: float = 10.0
    """No measurement begins after this time."""
    preset: tuple[Literal["small", "base", "large"], ...] = ("base", "small")
    """Whose shapes to measure."""
    dtype: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float16", "float32")
    """In which dtypes."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a trial of this command with the CPU's kernels; it proves nothing and is written only where --out says."""
    quick: bool = False
    """Few shapes of the small model and few repeats, to see whether it works."""
    again: bool = False
    """Measure also what is on record."""
    json: bool = False
    """One JSON object at the end instead of a line a measurement."""
    out: Path | None = None
    """Write to this file instead of the user's own ($MISS_EVIDENCE, or evidence.json in the cache folder)."""


@dataclass(frozen=True)
class Plan:
    """What a measuring process is to do."""

    names: tuple[str, ...]
    presets: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    device: str
    pace: Pace
    deadline: float  # of time.time()
    grace: float = 0.0  # seconds that what was begun before it may take beyond it


@dataclass
class Found:
    """What came of it."""

    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    complete: bool = False


def validate(args: ValidateArgs) -> int:
    registry.load_all()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this PyTorch sees no CUDA device, and our GPU kernels can be proven on one alone "
            "(--device cpu --quick tries the command itself)"
        )
    plan = _plan(args, device)
    path = args.out if args.out is not None else evidence.user_file() if device.type == "cuda" else None
    if device.type == "cuda" and path is None:
        raise ValueError("there is no home folder to write to; name a file with --out, or in $MISS_EVIDENCE")
    known = [] if path is None else read(path)  # an unreadable one ends it here, not after ten minutes
    # What was tuned since is measured anew: another launch is another kernel.
    done = set() if args.again else {(*r.key, r.sources) for r in known if evidence.current(r)}
    found = Found()

    def report(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    report(f"measuring {', '.join(plan.names)} on {_hardware(device)}, at most {args.minutes:g} minutes")
    for record in measured(plan, done, found, work, _stall(args.minutes), _compiling_limit(args.minutes)):
        if path is not None:
            evidence.write(path, [record])
        found.records.append(record)
        report(_line(record))
    _finish(args, path, found)
    return 0


def _stall(minutes: float) -> float:
    seconds = 60 * minutes
    return min(_MOST_STALL, max(_LEAST_STALL, seconds / 3), max(1.0, seconds / 2))


def _compiling_limit(minutes: float) -> float:
    return max(_stall(minutes), min(_MOST_COMPILING, 30 * minutes))


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "the CPU (a trial, no evidence)"


def _finish(args: ValidateArgs, path: Path | None, found: Found) -> None:
    proven = sum(r.refusal() is None for r in found.records)
    if args.json:
        rows = [dataclasses.asdict(r) for r in found.records]
        head = {"file": None if path is None else str(path), "complete": found.complete, "proven": proven}
        print(json.dumps({**head, "skipped": found.skipped, "records": rows}))
        return
    for text in found.skipped:
        print(f"skipped {text}")
    print(f"{len(found.records)} measured, {proven} of them correct and faster; {path or 'nothing'} is written")
    if not found.complete:
        print("the time is over before all shapes were measured: run it again, it goes on from here")


def _line(record: Record) -> str:
    says = record.refusal() or f"{record.speedup:.2f}x of {record.candidate}, {record.microseconds:.1f} us"
    return f"{record.op} {record.implementation}  {record.shape_class}: {says}"


def _plan(args: ValidateArgs, device: torch.device) -> Plan:
    names = [name for name, op in registry.OPS.items() if not name.endswith(registry.BACKWARD) and _has(op, device)]
    for name in args.op:
        if name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"no operation named {name} has a kernel of ours{hint}; those that do: {', '.join(names)}")
    return Plan(
        names=args.op or tuple(names),
        presets=("small",) if args.quick else args.preset,
        dtypes=args.dtype[:1] if args.quick else args.dtype,
        batches=(2,) if args.quick else _BATCHES,
        device=str(device),
        pace=QUICK if args.quick else Pace(),
        deadline=time.time() + 60 * args.minutes,
        grace=60 * args.minutes * _GRACE,
    )


def _has(op: registry.Op, device: torch.device) -> bool:
    tables = [op, registry.OPS.get(op.name + registry.BACKWARD)]
    return any(table is not None and bool(ours(table, device)) for table in tables)


Worker = Callable[[Connection, Plan, frozenset[tuple[str, ...]]], None]


def measured(
    plan: Plan,
    done: set[tuple[str, ...]],
    found: Found,
    worker: Worker,
    stall: float,
    compiling: float = _MOST_COMPILING,
) -> Iterator[Record]:
    """The records of one measuring process after another, until all is measured or the time is over. One that says
    nothing for `stall` seconds is ended, and what it was at is recorded as hung; one that compiles for `compiling`
    seconds is ended too, and what it was at is skipped; what it was at when it died or lost its device is recorded as
    failed. The next process goes on behind it.

    Raises:
        OSError: a process ended, or lost its device, and what it was at is not known: the next would do the same.
    """
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    skipped_one = False
    while True:
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(there, plan, frozenset(done)), daemon=True)
        process.start()
        there.close()
        turn = _Turn(plan, here, stall, compiling, found)
        before = len(done)
        try:
            for record in turn.records():
                done.add((*record.key, record.sources))
                yield record
        finally:
            process.join(timeout=5.0 if turn.ended else 0.0)
            process.kill()
            process.join(_KILLED)
            here.close()
        if turn.late:
            return
        if turn.begun is not None and turn.hung and turn.compiles:
            at, skipped_one = turn.begun, True
            done.add((*at.key, at.sources))
            what = f"{at.op} {at.implementation} {at.shape_class}"
            found.skipped.append(f"{what}: it compiled for {compiling:.0f} s; the next run tries it again")
        elif turn.begun is not None:
            why = f"hung: nothing was said for {stall:.0f} s" if turn.hung else f"died (exit code {process.exitcode})"
            done.add((*turn.begun.key, turn.begun.sources))
            yield dataclasses.replace(turn.begun, failure=f"its process {why}")
        elif turn.ended is None:
            raise OSError(f"the measuring process hung or died between two measurements (code {process.exitcode})")
        elif turn.ended != "again":
            found.complete = turn.ended == "complete" and not skipped_one
            return
        elif len(done) == before:
            raise OSError("the measuring process lost its device, and nothing can be said of what it was at")


class _Turn:
    """What one measuring process says, until it ends, hangs, or the time is over."""

    def __init__(self, plan: Plan, here: Connection, stall: float, compiling: float, found: Found) -> None:
        self.plan, self.here, self.stall, self.compiling, self.found = plan, here, stall, compiling, found
        self.begun: Record | None = None  # what it is at
        self.ended: str | None = None  # its last word
        self.hung = self.late = self.compiles = False

    def records(self) -> Iterator[Record]:
        patience = max(self.stall, _STARTING)
        while self.ended is None and (message := self._next(patience)) is not None:
            kind, value = message
            self.compiles = kind == "compiling"
            patience = self.compiling if self.compiles else self.stall
            if kind in ("compiling", "compiled"):
                continue
            at, self.begun = self.begun, value if kind in ("call", "begin") else None
            if kind == "skip":
                self.found.skipped.append(value)
            elif kind == "end":
                self.ended = value
            elif kind == "lost" and at is not None:
                yield dataclasses.replace(at, failure=f"the device was lost with it: {value}")
            elif kind == "done":
                yield value

    def _next(self, patience: float) -> tuple[str, Any] | None:
        """The next message; None where the process has ended, says nothing for too long, or the time is over."""
        left = self.plan.deadline + self.plan.grace - time.time()
        try:
            if self.here.poll(max(0.0, min(patience, left))):
                found: tuple[str, Any] = self.here.recv()
                return found
        except (EOFError, ConnectionResetError):
            return None
        self.late = left < patience  # it had less than what shows that it hangs: the next run begins with it
        self.hung = not self.late
        return None


def work(there: Connection, plan: Plan, done: frozenset[tuple[str, ...]]) -> None:
    """The measuring process. Says ("call", blank record) before a public function is called, ("begin", blank record)
    before a measurement and ("done", record), ("skip", why) or ("lost", why) after it, with ("compiling", None) and
    ("compiled", None) between where a kernel is compiled; last ("end", "complete"), "over" where the time is, or
    "again" where this process can go on no more."""
    with _telling_what_compiles(there, plan):
        _work(there, plan, done)


@contextlib.contextmanager
def _telling_what_compiles(there: Connection, plan: Plan) -> Iterator[None]:
    if torch.device(plan.device).type != "cuda" or importlib.util.find_spec("triton") is None:
        yield
        return
    from miss.kernels import offline

    with offline.compiling(lambda begins: there.send(("compiling" if begins else "compiled", None))):
        yield


def _work(there: Connection, plan: Plan, done: frozenset[tuple[str, ...]]) -> None:
    registry.load_all()
    torch.manual_seed(0)
    seen, device = set(done), torch.device(plan.device)
    for name, label, call in _calls(plan):
        whole = blank_call(registry.OPS[name], label, device)
        if (*whole.key, whole.sources) in seen:
            continue
        if time.time() > plan.deadline:
            there.send(("end", "over"))
            return
        there.send(("call", whole))
        try:
            found = gather(call)
        except Exception as error:  # the rows that run by themselves do not: most often memory
            if not _went_on(there, device, f"{name}, {label}", error):
                return
            continue
        for one in found:
            for impl in ours(one.op, device):
                if time.time() > plan.deadline:
                    there.send(("end", "over"))
                    return
                record = blank(one, impl)
                key = (*record.key, record.sources)
                if key in seen or one.op.cannot(impl, *one.args):
                    continue
                seen.add(key)
                there.send(("begin", record))
                if not _said(there, one, impl, plan):
                    return
    there.send(("end", "complete"))


def _said(there: Connection, call: Call, impl: registry.Impl, plan: Plan) -> bool:
    """Measures and says what came of it; whether the process can go on."""
    device = torch.device(plan.device)
    try:
        record = measure(call, impl, plan.pace)
    except Exception as error:  # of the reference or the other rows, or no memory: it says nothing of this one
        return _went_on(there, device, f"{call.op.name} {impl.name} {call.shape_class}", error)
    there.send(("done", record))
    if sound(device):
        return True
    there.send(("end", "again"))
    return False


def _went_on(there: Connection, device: torch.device, what: str, error: Exception) -> bool:
    """Says what failed; whether the process can go on: a device that was lost with it ends the process."""
    if sound(device):
        there.send(("skip", f"{what}: {_one_line(error)}"))
        return True
    there.send(("lost", _one_line(error)))
    there.send(("end", "again"))
    return False


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _calls(plan: Plan) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """What is measured (operation, which call of it, the call), the most valuable first: as many questions as images,
    then many over one image."""
    for dtype in plan.dtypes:
        for preset in plan.presets:
            config = MissConfig.preset(preset)
            pairs = [(batch, batch) for batch in plan.batches] + [(1, batch) for batch in plan.batches if batch > 1]
            for images, rows in pairs:
                where = torch.device(plan.device)
                shapes = Shapes(config, getattr(torch, dtype), where, images, rows, laid_out=where.type == "cpu")
                table, more = calls(shapes), variants(shapes)
                for name in plan.names:
                    label = f"{preset}, {dtype}, {images} images, {rows} questions"
                    for form, call in enumerate((table.get(name), *more.get(name, ()))):
                        if call is not None:
                            yield name, f"{label}, form {form}", call
