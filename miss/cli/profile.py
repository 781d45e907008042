"""`miss profile`: where the time of an answer goes, by stage and operation, against this machine's ceilings.

    miss profile answer --image scan.png --question "is there a mass?" --precision int8
    miss profile answer --cached --trace answer.json      (open in chrome://tracing or ui.perfetto.dev)

Knows flags, tables and the trace's format; the engine records.
"""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from miss.cli.flags import Append

if TYPE_CHECKING:
    from miss.engine.runtime.allocations import Allocations
    from miss.engine.runtime.engine import Engine
    from miss.engine.runtime.profile import Part, Profile

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "chest-xray.jpg"
_CEILING_ROUNDS = 9


@dataclass
class Args:
    """Profile an answer: every operation's time, rate, bytes and share of the ceiling, and the gaps between them."""

    image: Path = _EXAMPLE
    """Image file: PNG, JPEG, WebP, BMP, TIFF or DICOM."""
    question: Annotated[list[str], Append] = field(
        default_factory=lambda: ["what modality is used to take this image?"]
    )
    """A question about the image; several are answered together."""
    checkpoint: str = "miss-small"
    """A checkpoint folder, or the name of one that ships with the project."""
    precision: str = "auto"
    """What `miss answer --precision` takes."""
    device: str = "cpu"
    """cpu or cuda."""
    max_new_tokens: int | None = None
    """Longest answer in tokens, the closing one included. Default: the checkpoint's."""
    beams: int = 1
    """Beam width; 1 is greedy."""
    cached: bool = False
    """The image was asked about before, so that its encoding is read from the cache."""
    repeats: int = 9
    """Passes with the recorder, and as many without in turn with them."""
    trace: Path | None = None
    """Write the median pass as a Chrome trace."""
    json: bool = False
    """One JSON object instead of tables."""


def answer(args: Args) -> int:
    from miss.engine.runtime.allocations import allocations
    from miss.engine.runtime.engine import Engine
    from miss.engine.runtime.profile import profile
    from miss.engine.runtime.sampler import SamplingParams

    if args.repeats < 1:
        raise ValueError(f"--repeats: got {args.repeats}; wanted at least 1")
    engine = Engine.load(args.checkpoint, args.precision, args.device)
    params = SamplingParams(num_beams=args.beams, max_new_tokens=args.max_new_tokens, num_alternatives=0)
    pairs = [(args.image.read_bytes(), question) for question in args.question]

    def call() -> None:
        if not args.cached:
            engine.forget_images()
        list(engine.answer_many(pairs, params))

    found = profile(call, engine.device, args.repeats)
    memory = allocations(call, engine.device)
    ceilings = _ceilings(engine)
    if args.trace:
        args.trace.write_text(json.dumps(chrome_trace(found)), encoding="utf-8")
    if args.json:
        print(json.dumps(_record(found, memory, ceilings, args)))
        return 0
    _show(found, memory, ceilings)
    if args.trace:
        print(f"\nwrote {args.trace}: open it in chrome://tracing or https://ui.perfetto.dev")
    return 0


COMMANDS = {"answer": (Args, answer)}


def _ceilings(engine: "Engine") -> dict[str, float]:
    """Operations and bytes a second that this machine reaches, medians of short bursts."""
    from miss.benchmarks.ceilings import Ceilings

    ceilings = Ceilings(engine.device)
    rates: dict[str, list[float]] = {}
    for _ in range(_CEILING_ROUNDS):
        for kind in ceilings.kinds:
            rates.setdefault(kind, []).append(ceilings.rate(kind))
        rates.setdefault("read", []).append(ceilings.bandwidth("read"))
    return {name: statistics.median(values) for name, values in rates.items()}


def share(part: "Part", ceilings: dict[str, float]) -> tuple[float, str] | None:
    """(share of the nearer ceiling, its name) of an operation's time; None where it has no known cost.

    Compute: the time that its arithmetic takes at least. Read: the time that its bytes take at least from memory; what
    lies in a cache can be above 1.
    """
    if not part.op or part.seconds <= 0 or not (part.flops or part.nbytes):
        return None
    compute = sum(flops / ceilings[kind] for kind, flops in part.kinds.items()) / part.seconds
    read = part.nbytes / ceilings["read"] / part.seconds
    kind = max(part.kinds, key=lambda k: part.kinds[k], default="fp32")
    return (compute, kind) if compute >= read else (read, "read")


def _label(part: "Part") -> str:
    return part.op or ("between operations" if part.stage != "outside" else "outside of all stages")


def _show(found: "Profile", memory: "Allocations", ceilings: dict[str, float]) -> None:
    total = found.recorded
    print(f"{'stage':<11}{'operation':<29}{'runs on':<10}{'calls':>6}{'ms':>9}{'share':>7}", end="")
    print(f"{'GFLOP/s':>9}{'GB/s':>7}{'of ceiling':>13}{'allocated':>11}")
    for stage in dict.fromkeys(part.stage for part in found.parts):
        parts = sorted((p for p in found.parts if p.stage == stage), key=lambda p: -p.seconds)
        for part in parts:
            print(_line(part, total, ceilings, memory))
        seconds = sum(p.seconds for p in parts)
        print(f"{stage:<11}{'= all of it':<45}{seconds * 1e3:>9.2f}{seconds / total:>7.1%}\n")
    print(
        f"parts add up to {total * 1e3:.2f} ms; an answer takes {found.plain * 1e3:.2f} ms without the recorder", end=""
    )
    print(f" ({total / found.plain - 1:+.1%}), {found.seconds * 1e3:.2f} ms with it")
    print("ceilings: " + ", ".join(f"{name} {rate / 1e9:,.0f} G/s" for name, rate in ceilings.items()))
    count = sum(part.count for part in memory.parts.values())
    print(f"memory: {count:,} allocations, at most {memory.peak / 1e6:.1f} MB held at once beyond the model")


def _line(part: "Part", total: float, ceilings: dict[str, float], memory: "Allocations") -> str:
    line = f"{part.stage:<11}{_label(part):<29}{part.implementation:<10}{part.calls if part.op else '':>6}"
    line += f"{part.seconds * 1e3:>9.2f}{part.seconds / total:>7.1%}"
    nearest = share(part, ceilings)
    if nearest:
        line += f"{part.flops / part.seconds / 1e9:>9.1f}{part.nbytes / part.seconds / 1e9:>7.1f}"
        line += f"{nearest[0]:>7.0%} {nearest[1]:<5}"
    allocated = memory.parts.get((part.stage, part.op))
    return (
        line
        if not allocated
        else f"{line:<90}{allocated.count:>6} x {allocated.nbytes / allocated.count / 1e3:,.0f} KB"
    )


def _record(found: "Profile", memory: "Allocations", ceilings: dict[str, float], args: Args) -> dict[str, Any]:
    parts = []
    for part in found.parts:
        allocated = memory.parts.get((part.stage, part.op))
        nearest = share(part, ceilings)
        parts.append(
            asdict(part)
            | {"share": part.seconds / found.recorded}
            | ({"share_of_ceiling": nearest[0], "ceiling": nearest[1]} if nearest else {})
            | ({"allocations": allocated.count, "allocated_bytes": allocated.nbytes} if allocated else {})
        )
    return {
        "profile": "answer",
        "checkpoint": args.checkpoint,
        "precision": args.precision,
        "cached": args.cached,
        "questions": len(args.question),
        "seconds": found.plain,
        "recorded_seconds": found.seconds,
        "parts_seconds": found.recorded,
        "parts": parts,
        "ceilings": ceilings,
        "peak_bytes": memory.peak,
    }


def chrome_trace(found: "Profile") -> dict[str, Any]:
    """The recorded pass nearest to the median as a Chrome trace: stages on one line, operations on the next."""
    costs = iter(found.costs)
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}}
        for tid, name in ((1, "stages"), (2, "operations"))
    ]
    for span in found.spans:
        event = {"name": span.op or span.stage, "ph": "X", "pid": 1, "tid": 2 if span.op else 1}
        event |= {"ts": span.start * 1e6, "dur": span.seconds * 1e6, "cat": span.stage}
        if span.op:
            spent = next(costs).cost
            event["args"] = {"implementation": span.implementation} | (asdict(spent) if spent else {})
        events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
