"""Our server under load, and the same model behind a plain Hugging Face server and LitServe. `miss bench serve`.

Knows what is measured and in which order; does not know how servers run, how loads are made, or how results are shown.

1. All servers are started, each in processes of its own; those that have no turn are stopped. All answer the same
   questions, and the answers are compared.
2. One request at a time, ours against the engine alone in a process like the server's, request by request in turn.
3. Closed loop, in rounds: every server takes each cell (questions an image, cache) in turn.
4. Open loop: Poisson arrivals at growing shares of what a closed loop reached, until goodput falls.
"""

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from miss.benchmarks import answer_models, record
from miss.benchmarks.answer_rounds import spread
from miss.benchmarks.peers.catalogue import ENTRIES
from miss.benchmarks.peers.process import PeerError, convert
from miss.benchmarks.serve_figures import Visit, arrivals, holds, peak, percentiles, point
from miss.benchmarks.serve_servers import PEERS, TRIED, Kind, Running, ServerError, alone, client, ours, start
from miss.engine.runtime.engine import find_checkpoint

CELLS = {  # questions of a visit, how many images come round (0: none comes twice)
    "many-cold": {"questions": 8, "images": 0},
    "many-warm": {"questions": 8, "images": 8},
    "unique-cold": {"questions": 1, "images": 0},
    "unique-warm": {"questions": 1, "images": 8},
}
SHARES = (0.4, 0.7, 0.9, 1.2, 1.6)  # of a closed loop's throughput
BLOCK = 8  # requests of one at a time, before the other side has its turn
AT_ONCE = 4  # visits of a closed loop
QUESTIONS = (
    *("what modality is used to take this image?", "is this image normal?", "which organ is shown?"),
    *("is there a fracture?", "which part of the body is this?", "are the lungs healthy?", "is there a mass?"),
    *("what is the color of the liver?", "is the heart enlarged?", "which plane is the image scanned in?"),
)


@dataclass(frozen=True)
class Options:
    """limit: seconds within which a visit's answers are good. turn: seconds of a closed loop's turn. seconds: of a
    rate."""

    checkpoint: str = "miss-small"
    precisions: tuple[str, ...] = ("auto", "fp32")
    peers: tuple[str, ...] = ("hf-fastapi", "litserve")
    limit: float = 2.0
    rounds: int = 4
    turn: float = 2.0
    seconds: float = 6.0
    single: int = 40
    compared: int = 48
    threads: int = 0
    tune: bool = False
    parts: tuple[str, ...] = ("single", "closed", "open")
    data: Path | None = None
    work: Path = field(default_factory=answer_models.default_work)


@dataclass
class Bench:
    """Everything that runs, and the number of the next image that nobody has seen."""

    options: Options
    client: Running
    servers: dict[str, Running]
    say: Callable[[str], None]
    next: int = 1000

    def load(self, name: str, cell: dict[str, Any], count: int, apart: bool = False, **how: Any) -> list[Visit]:
        """One server's visits; the others stand still. apart: every question in a request of its own."""
        server, target = self.servers[name], dict(self.servers[name].target)
        if apart:
            target["together"] = False
        asked = {"target": target, "cell": {**cell, "first": self.next}, "count": count, **how}
        self.next += count
        server.resume()
        try:
            found = self.client.ask(asked)["visits"]
        finally:
            server.pause()
        return [Visit(**{**visit, "answers": tuple(visit["answers"])}) for visit in found]

    def closed(self, name: str, cell: dict[str, Any], count: int, at_once: int = AT_ONCE, **how: Any) -> list[Visit]:
        return self.load(name, cell, count, do="closed", at_once=at_once, **how)


def run(options: Options, say: Callable[[str], None], keep: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The whole measurement, as one object; `keep` is handed what is known of it after each part."""
    checkpoint = find_checkpoint(options.checkpoint)
    threads = options.threads or torch.get_num_threads()
    work = options.work / "serve" / checkpoint.name
    kinds, failed = _kinds(options, checkpoint, work, threads)
    for name, reason in failed.items():
        say(f"{name}: {reason}")
    paths, questions = _asked(options.data)
    if options.tune:
        kinds = [kind if kind.ours else tuned(kind, checkpoint, options, work, threads, say) for kind in kinds]
    environment = {**record.environment(torch.device("cpu")), "threads": threads, "before": record.moment()}
    with contextlib.ExitStack() as stack:
        servers = _started(stack, kinds, failed, checkpoint, work, threads, say)
        bench = Bench(options, stack.enter_context(client(paths, questions, work)), servers, say)
        result: dict[str, Any] = {
            **{"benchmark": "serve", "checkpoint": checkpoint.name, "limit": options.limit, "failed": failed},
            "servers": {k.name: {"precision": k.precision, "flags": k.flags, "ours": k.ours} for k in kinds},
            **{
                "environment": environment,
                "answers": answers(bench),
                "single": {},
                "closed": {},
                "ratios": {},
                "open": {},
            },
        }
        result["single"] = {
            p: single(bench, checkpoint, p, work, threads) for p in options.precisions if "single" in options.parts
        }
        keep(result)
        if "closed" not in options.parts:
            return result
        result["closed"] = closed(bench)
        result["ratios"] = ratios(result["closed"], [k for k in kinds if k.name in servers])
        keep(result)
        for name, label, found in sweeps(bench, result["closed"] if "open" in options.parts else {}):
            result["open"].setdefault(name, {})[label] = found
            keep(result)
    environment["after"] = record.moment()
    return result


def _started(
    stack: contextlib.ExitStack,
    kinds: Sequence[Kind],
    failed: dict[str, str],
    checkpoint: Path,
    work: Path,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, Running]:
    """Those that could be started, ready and standing still; why the others could not goes to `failed`."""
    servers: dict[str, Running] = {}
    for kind in kinds:
        say(f"starting {kind.name}")
        try:
            servers[kind.name] = stack.enter_context(start(kind, checkpoint, work, threads))
            servers[kind.name].pause()
        except ServerError as error:
            failed[kind.name] = str(error)
            say(str(error))
    if not any(kind.ours for kind in kinds if kind.name in servers):
        raise ValueError(f"no server of ours could be started: {'; '.join(failed.values())}")
    return servers


def _kinds(options: Options, checkpoint: Path, work: Path, threads: int) -> tuple[list[Kind], dict[str, str]]:
    """(what is measured, why the others are not)."""
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        raise ValueError(f"--peers: got {unknown[0]}; known: {', '.join(PEERS)}, none")
    wanted = [*map(ours, options.precisions), *(PEERS[name] for name in options.peers)]
    failed = {kind.name: reason for kind in wanted if (reason := kind.missing())}
    peers = [kind for kind in wanted if not kind.ours and kind.name not in failed]
    if peers:
        try:
            convert(ENTRIES["hf-fp32"], checkpoint, work, [], threads)
        except PeerError as error:
            failed |= {kind.name: str(error) for kind in peers}
    return [kind for kind in wanted if kind.name not in failed], failed


def _asked(data: Path | None) -> tuple[list[str], list[str]]:
    """Images' files and questions: SLAKE's validation where it is there, else the examples'."""
    samples = answer_models.samples(data, "validate")
    if not samples:
        return [str(path) for path in sorted(answer_models.EXAMPLES.glob("*.jpg"))], list(QUESTIONS)
    paths = list(dict.fromkeys(str(sample.image) for sample in samples))[:24]
    return paths, list(dict.fromkeys(sample.question for sample in samples))[:64]


def tuned(kind: Kind, checkpoint: Path, options: Options, work: Path, threads: int, say: Callable[[str], None]) -> Kind:
    """A peer with those of its settings that answered the most questions of a closed loop."""
    paths, questions = _asked(options.data)
    rates: dict[Kind, float] = {}
    for flags in TRIED[kind.name]:
        one = replace(kind, flags=flags)
        with start(one, checkpoint, work, threads) as server, client(paths, questions, work) as asker:
            bench = Bench(options, asker, {kind.name: server}, say)
            bench.closed(kind.name, CELLS["many-cold"], 1)
            visits = bench.closed(kind.name, CELLS["many-cold"], AT_ONCE)
        rates[one] = 8 * sum(not v.problem for v in visits) / max(v.done for v in visits)
        say(f"{kind.name} {' '.join(flags)}: {rates[one]:.2f} questions a second")
    return max(rates, key=lambda one: rates[one])


def answers(bench: Bench) -> dict[str, Any]:
    """How many of the same questions about the same images each server answers as the last of ours does, which is fp32
    where it was asked for; all are warm afterwards."""
    cell, found, first = CELLS["unique-cold"], {}, bench.next
    for name in bench.servers:
        bench.next = first
        visits = bench.closed(name, cell, bench.options.compared, at_once=1)
        found[name] = [visit.answers for visit in visits]
        bench.say(f"{name}: answered {sum(not visit.problem for visit in visits)} of {len(visits)}")
    reference = [name for name in found if name.startswith("miss-")][-1]
    return {
        "questions": bench.options.compared,
        "reference": reference,
        "equal": {n: sum(a == b for a, b in zip(v, found[reference], strict=True)) for n, v in found.items()},
    }


def single(bench: Bench, checkpoint: Path, precision: str, work: Path, threads: int) -> dict[str, Any]:
    """p50 of one request at a time through HTTP over the engine alone: new images, and images asked about before.

    In blocks on one connection, in turn; a block's first request, that finds the process just woken, is left out.
    """
    name = f"miss-{precision}"
    if name not in bench.servers:
        return {}
    from miss.benchmarks.serve_client import Pictures

    pictures = Pictures(*_asked(bench.options.data))
    found: dict[str, Any] = {}
    with alone(checkpoint, precision, work, threads) as engine:
        target = {**bench.servers[name].target, "together": False}  # the same fields: as many alternatives
        engine.ask(json.loads(pictures.body(0, CELLS["unique-cold"], target)[0]))  # it is loaded when it answers
        engine.pause()
        for cell_name in ("unique-cold", "unique-warm"):
            cell, http, inside = CELLS[cell_name], [], []
            for block in range(1 + max(1, bench.options.single // BLOCK)):
                numbers = range(bench.next, bench.next + BLOCK + 1)
                through = [v.latency for v in bench.load(name, cell, BLOCK + 1, do="single")][1:]
                asked = [json.loads(pictures.body(number, cell, target)[0]) for number in numbers]
                engine.resume()
                within = [engine.ask(one)["seconds"] for one in asked][1:]
                engine.pause()
                if block:  # the first warms up: it has all images of a warm cell
                    http += through
                    inside += within
            ratio = statistics.median(http) / statistics.median(inside)
            found[cell_name] = {
                **{"http_ms": percentiles(http), "engine_ms": percentiles(inside), "requests": len(http)},
                "ratio_p50": round(ratio, 4),
            }
            bench.say(f"{name}, one at a time, {cell_name}: {ratio:.3f}x the engine alone")
        engine.resume()
    return found


def _cells(name: str, precisions: Sequence[str]) -> list[tuple[str, str, bool]]:
    """(label, cell, questions apart) that a server is measured at: only our first has all; peers keep no cache."""
    if name == f"miss-{precisions[0]}":
        return [(cell, cell, False) for cell in CELLS] + [("many-cold-apart", "many-cold", True)]
    return [(cell, cell, False) for cell in ("many-cold", "unique-cold")]


def closed(bench: Bench) -> dict[str, Any]:
    """Questions a second by server and cell, round by round; a turn's visits are counted so that it lasts about as long
    as asked."""
    turns = [(name, *cell) for name in bench.servers for cell in _cells(name, bench.options.precisions)]
    rates: dict[tuple[str, str], list[float]] = {(name, label): [] for name, label, _, _ in turns}
    counts = dict.fromkeys(rates, AT_ONCE)
    problems = dict.fromkeys(rates, 0)
    for turn in range(bench.options.rounds + 1):
        for name, label, cell, apart in turns:
            key, began = (name, label), time.monotonic()
            visits = bench.closed(name, CELLS[cell], counts[key], apart=apart)
            if any(visit.problem for visit in visits):
                problems[key] += sum(bool(visit.problem) for visit in visits)
            lasted = max(visit.done for visit in visits)
            rate = len(visits) / lasted
            if turn:
                rates[key].append(rate * CELLS[cell]["questions"])
            counts[key] = max(AT_ONCE, min(256, round(rate * bench.options.turn)))
            bench.say(f"{name} {label}: {rate:.2f} visits a second ({time.monotonic() - began:.1f} s)")
    found: dict[str, Any] = {}
    for (name, label), values in rates.items():
        found.setdefault(name, {})[label] = {
            **{"questions_per_s": spread(values, 1.0), "rounds": [round(v, 3) for v in values]},
            "problems": problems[name, label],
        }
    return found


def ratios(found: dict[str, Any], kinds: Sequence[Kind]) -> dict[str, Any]:
    """Ours over each peer, round by round: above 1 where ours answers more."""
    mine, theirs = [k.name for k in kinds if k.ours], [k.name for k in kinds if not k.ours]
    result = {}
    for own, peer in itertools.product(mine, theirs):
        for label in found[own]:
            other = found[peer].get("many-cold" if label.startswith("many") else "unique-cold")
            if other is not None:
                pairs = zip(found[own][label]["rounds"], other["rounds"], strict=True)
                result[f"{own}/{peer} {label}"] = spread([a / b for a, b in pairs], 1.0)
    return result


def sweeps(bench: Bench, found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Rates upwards by server and cell, until goodput falls; of ours the first precision."""
    for name, cells in found.items():
        if name.startswith("miss-") and name != f"miss-{bench.options.precisions[0]}":
            continue
        for label in (label for label in cells if label in CELLS):
            capacity = cells[label]["questions_per_s"]["median"] / CELLS[label]["questions"]
            yield name, label, _sweep(bench, name, label, capacity)


def _sweep(bench: Bench, name: str, label: str, capacity: float) -> dict[str, Any]:
    options, points = bench.options, []
    for number, share in enumerate(SHARES):
        rate = share * capacity
        seconds = max(options.seconds, min(6 / rate, 2 * options.seconds))  # a slow server gets time for a few visits
        due = arrivals(number + 1, rate, seconds) or [0.0]
        visits = bench.load(name, CELLS[label], len(due), do="open", due=due, patience=1.5 * options.limit)
        points.append(point(visits, rate, seconds, options.limit))
        bench.say(f"{name} {label} at {rate:.2f}/s: goodput {points[-1]['goodput']:.2f} of {points[-1]['offered']:.2f}")
        if not holds(points[-1]):
            bench.closed(name, CELLS[label], 1, at_once=1)  # what it still works on is waited for
            break
    best = peak(points)
    return {"points": points, "peak": None if best is None else best["goodput"], "fell": not holds(points[-1])}
