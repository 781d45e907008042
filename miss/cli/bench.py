"""`miss bench`: times operations and whole answers, and their peers, against this machine's ceilings; compares runs.

    miss bench kernels                    all operations at the shapes of base, on CPU
    miss bench kernels --op attention --dtype bfloat16 --shapes small --out runs/bench
    miss bench answer --preset base --peers headline --out benchmarks/results
    miss bench serve --out runs/serve     our server under load, and peers' servers of the same model
    miss bench pretrain --pairs 16        our pretraining step against the original's, in turn
    miss bench compare before.jsonl after.jsonl --limit 10
    miss bench merge DIR                  what benchmarks/gpu_suite.sh wrote on a GPU, into this repository

Knows flags, what is printed and which files are written; does not know how anything is measured.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from miss.cli.flags import Positional


@dataclass
class KernelArgs:
    """Time every operation, shape, dtype and implementation: GFLOP/s, GB/s, share of measured ceilings, error."""

    op: tuple[str, ...] = ()
    """Only these operations, or folders of kernels/; all where none is named."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    dtype: tuple[str, ...] = ()
    """float32, bfloat16, float16; w8a8, w8, w4: only these packed weights. Default: float32 bfloat16; bfloat16 float16
    on cuda."""
    shapes: tuple[str, ...] = ("base",)
    """Of which models: small, base, large; aims: those that the aims on a GPU are stated for; or four numbers B,M,N,K,
    one linear of B * M rows."""
    repeats: int = 20
    """Samples of each; at most 7 where one takes over 0.3 s."""
    threads: int = 0
    """0: as PyTorch decides."""
    minutes: float = 0.0
    """No case begins after this time. 0: all are measured."""
    stall: float = 0.0
    """Seconds of one implementation of a case, whose first call compiles it, or of the rounds of all, beyond which it
    hangs and the process is ended (exit code 75). 0: it is waited for."""
    go_on: tuple[Path, ...] = ()
    """Files kernels-<device>.jsonl of earlier runs on this machine, that of --out among them: what they have measured
    stays, and what ended one of them is not measured again. One that is not there says nothing."""
    plots: bool = True
    """Draw what --out holds (needs matplotlib)."""
    json: bool = False
    """Print one JSON object and nothing else."""
    out: Path | None = None
    """A folder for kernels-<device>.jsonl, written as cases are done, a roofline and a plot an operation."""


@dataclass
class CompareArgs:
    """What got faster or slower beyond the noise. Exit code 1 where one of ours got slower by more than the limit."""

    before: Annotated[Path, Positional]
    """What `miss bench kernels` wrote or printed: a file, or the folder."""
    after: Annotated[Path, Positional]
    """The same of the later run."""
    limit: float = 10.0
    """Percent that one may be slower, seen against the ceilings and the peers of its run."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass
class AnswerArgs:
    """Time whole answers of ours and of other engines, warm and in turn, with their errors beside them."""

    preset: Literal["small", "base", "large"] = "base"
    """small: the checkpoint that ships. base, large: seeded random weights."""
    image_size: tuple[int, ...] = ()
    """Pixels a side; several are measured one after another, as with the next three. Default 384; small: its own."""
    batch: tuple[int, ...] = (1,)
    """Images at once."""
    questions_per_image: tuple[int, ...] = (1,)
    """Questions about each, of 18 tokens."""
    tokens: tuple[int, ...] = (8,)
    """Of every answer."""
    precision: tuple[str, ...] = ("fp32", "bf16", "int8")
    """Of ours."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run. On cuda int8, and peers other than Hugging Face's and ours, are left out."""
    peers: tuple[str, ...] = ("headline",)
    """Names, headline, gpu, all or none; what is not installed is said and left out."""
    rounds: int = 0
    """In each of which every peer answers once. 0: 15, of 8 images or more 7; quick: 7 and 5."""
    judged: int | None = None
    """Questions of SLAKE's validation that the shipped checkpoint answers; 0 none. Default all 1,053; quick: 200."""
    quick: bool = False
    """Fewer rounds and questions."""
    together: int = 6
    """Peers that are loaded at once, besides ours."""
    threads: int = 0
    """0: as PyTorch decides."""
    data: Path | None = None
    """Folder of the data sets; default $MISS_DATA, then ../shared/data."""
    work: Path | None = None
    """Folder of what peers were converted to; default miss-engine/peers in the user's cache."""
    out: Path = Path("benchmarks/results")
    """For answer-<setting>.json and answer.md, written after each group of peers, and plots."""
    plots: bool = True
    """Draw them (needs matplotlib)."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass
class MergeArgs:
    """Bring what `benchmarks/gpu_suite.sh` wrote on a GPU into the repository: evidence, results, a page of aims."""

    folder: Annotated[Path, Positional]
    """What the suite wrote."""
    into: Path = Path(".")
    """The repository."""
    any_source: bool = False
    """Also results of other sources than the repository's; they then prove nothing of the present ones."""
    trial: bool = False
    """Also results of a CPU or of --quick, which prove nothing."""
    json: bool = False
    """Print one JSON object instead of the page."""


def merge(args: MergeArgs) -> int:
    from dataclasses import asdict

    from miss.benchmarks.gpu import merge as merging

    if not (args.into / "kernels" / "evidence.json").exists():
        raise ValueError(f"--into {args.into}: no kernels/evidence.json there; wanted the repository's root")
    found = merging.merge(args.folder, args.into, args.any_source, args.trial)
    if args.json:
        print(json.dumps(asdict(found)))
        return 0
    print(found.page)
    print(f"{found.records} records added to the {found.kept} that were there; written: {', '.join(found.written)}")
    if found.stale:
        print(f"{found.stale} records are of other launches than are tuned now: gpu_suite.sh --parts evidence --again")
    return 0


@dataclass
class PretrainArgs:
    """Time a pretraining step of ours and the step as the original writes it, in turn, on CPU; losses held together."""

    preset: Literal["small", "base", "large"] = "small"
    """Whose shapes; random weights."""
    pairs: int = 16
    """Images with a caption in a step."""
    size: int = 224
    """Pixels a side."""
    steps: int = 5
    """Timed, of each; one more warms up."""
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """float32, and bf16 autocast."""
    threads: int = 0
    """0: as PyTorch decides."""
    quick: bool = False
    """Whether it runs at all: 2 pairs of 28 pixels, one step of each; says nothing about speed."""
    json: bool = False
    """Print one JSON object and nothing else."""
    out: Path | None = None
    """A folder for pretrain-<preset>-<pairs>x<size>.json, the same object."""


def pretrain(args: PretrainArgs) -> int:
    from miss.benchmarks import bench_pretrain, record

    if min(args.pairs, args.steps) < 1 or args.threads < 0 or not args.precision:
        raise ValueError("--pairs, --steps: wanted at least 1; --threads 0 or more; --precision fp32, bf16")
    if args.threads:
        torch.set_num_threads(args.threads)
    options = bench_pretrain.Options(args.preset, args.pairs, args.size, args.steps, args.precision)
    if args.quick:
        options = bench_pretrain.Options(args.preset, 2, 28, 1, args.precision, 0.1)
    environment = record.environment(torch.device("cpu")) | {"before": record.moment()}
    found = bench_pretrain.run(options, (lambda text: None) if args.json else print)
    text = json.dumps({**found, "quick": args.quick, "environment": environment | {"after": record.moment()}})
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"pretrain-{options.preset}-{options.pairs}x{options.size}.json").write_text(text + "\n")
    print(text)
    return 0


def answer(args: AnswerArgs) -> int:
    if args.plots:
        import matplotlib  # noqa: F401  (said before the measuring, not after)

    from miss.benchmarks import answer_models, answer_report, answer_settings, bench_answer

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch finds no CUDA device")
    if min(*args.batch, *args.questions_per_image, *args.tokens, args.together, 1) < 1:
        raise ValueError("--batch, --questions-per-image, --tokens, --together: wanted at least 1")
    work = (args.work or answer_models.default_work()).resolve()
    judged = args.judged if args.judged is not None else 200 if args.quick else 10_000
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    settings = answer_settings.settings(args.preset, args.image_size, args.batch, args.questions_per_image, args.tokens)
    options = answer_settings.Options(
        settings,
        args.peers,
        args.precision,
        args.rounds,
        args.quick,
        judged,
        args.together,
        args.data,
        work,
        args.threads,
        args.device,
    )
    so_far: dict[str, dict[str, Any]] = {}
    for result in bench_answer.run(options, say):
        so_far[result["setting"]["label"]] = result
        answer_report.write(args.out, [result])
    found = list(so_far.values())
    answer_report.with_groups(found)
    everything = answer_report.write(args.out, found)
    if args.plots:
        from miss.benchmarks import answer_plots

        for name, picture in answer_plots.plots(everything).items():
            (args.out / name).write_bytes(picture)
    if not args.json:
        print("\n".join(map(answer_report.table, found)))
    print(json.dumps(answer_report.summary(found)))
    return 0


def kernels(args: KernelArgs) -> int:
    from miss.benchmarks import going_on, record, report, suite
    from miss.benchmarks.cases import Cache, Case, Result, Settings
    from miss.benchmarks.ceilings import Ceilings

    device = _device(args)
    if args.out is not None:
        if args.plots:
            import matplotlib  # noqa: F401  (what is not installed is said before ten minutes of measuring, not after)
        args.out.mkdir(parents=True, exist_ok=True)
    cases = suite.select(args.op, args.dtype, args.shapes, device)
    if not cases:
        raise ValueError("none of these operations has a case of these shapes and dtypes")
    say: Callable[[str], None] = (lambda text: None) if args.json else print
    environment = {**record.environment(device), "before": record.moment()}
    before = record.earlier(args.go_on, [case for case, _ in cases], environment)
    say(report.environment(environment))
    ceilings = Ceilings(device)
    first = ceilings.record()
    say(f"{report.ceilings(first)}\n\n{report.heading()}")
    deadline = time.time() + 60 * args.minutes if args.minutes else math.inf
    settings = Settings(device, args.repeats, deadline, args.stall or math.inf)
    path = None if args.out is None else args.out / f"kernels-{device.type}.jsonl"

    def keep(total: Result) -> None:
        if path is not None:
            record.write(path, record.summary(environment, first, total))

    def show(case: Case, cache: Cache, one: Result, total: Result) -> None:
        say(report.block(case, cache, one))
        keep(total)

    usual = signal.signal(signal.SIGTERM, _terminated)  # what it was at is then cut off, and has not died
    try:
        result = suite.run(cases, settings, ceilings, _progress(args.json), show, before, keep)
    finally:
        signal.signal(signal.SIGTERM, usual)
    environment["after"] = record.moment()
    found = {**first, **({} if result.lost else {"after": ceilings.record()})}
    if not result.lost:
        say(report.ceilings(found["after"]))
    run = record.summary(environment, found, result)
    if path is not None:
        record.write(path, run)
        say(f"written: {path}" + (f" and {_draw(path.parent, run)} plots beside it" if args.plots else ""))
    print(json.dumps(run))
    if result.lost:
        print(f"the device is lost: {result.refused[-1]['reason']}; --go-on measures the rest", file=sys.stderr)
        return going_on.AGAIN
    return 1 if any(refused["ours"] for refused in result.refused) else 0


def _terminated(*_: Any) -> None:
    raise SystemExit(143)


def _device(args: KernelArgs) -> torch.device:
    if args.repeats < 1 or args.threads < 0:
        raise ValueError(f"--repeats {args.repeats} --threads {args.threads}: wanted at least 1 and 0")
    if args.stall < 0:
        raise ValueError(f"--stall {args.stall:g}: wanted seconds, or 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch finds no CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device)


def _progress(quiet: bool) -> Callable[[list[Any]], Iterator[Any]]:
    def watched(cases: list[Any]) -> Iterator[Any]:
        from tqdm import tqdm

        # A bar where someone watches, else a line now and then.
        wait = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(cases, unit="case", disable=quiet, mininterval=wait, ncols=100) as bar:
            for case, cache in bar:
                bar.set_postfix_str(f"{case.op} {case.shape}"[:40], refresh=False)
                yield case, cache

    return watched


def _draw(folder: Path, run: dict[str, Any]) -> int:
    from miss.benchmarks import plots

    pictures = plots.plots(run)
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    return len(pictures)


def compare(args: CompareArgs) -> int:
    from dataclasses import asdict

    from miss.benchmarks import compare as comparing
    from miss.benchmarks import record

    if args.limit < 0:
        raise ValueError(f"--limit: got {args.limit}; wanted a percentage of at least 0")
    before, after = record.read(args.before), record.read(args.after)
    found, limit = comparing.compare(before, after), args.limit / 100
    worse = found.regressions(limit)
    if args.json:
        print(json.dumps({**asdict(found), "limit": limit, "regressions": [asdict(c) for c in worse]}))
    else:
        print("\n".join(filter(None, [_differs(before, after), comparing.report(found, limit)])))
        print(f"{len(worse) + len(found.broken)} regressions past {args.limit:g} %, of {len(found.changes)} rows")
    return 1 if worse or found.broken else 0


def _differs(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What of the two environments is not the same."""
    names = ("processor", "gpu", "isa", "threads", "torch", "miss", "commit")
    pairs = {n: (before["environment"].get(n), after["environment"].get(n)) for n in names}
    return "\n".join(f"{name}: {a} before, {b} after" for name, (a, b) in pairs.items() if a != b)


@dataclass
class ServeArgs:
    """Put our server, and peers' servers of the same model, under load: closed loop, Poisson arrivals, saturation."""

    checkpoint: str = "miss-small"
    """A checkpoint folder, or the name of one that ships with the project."""
    precision: tuple[str, ...] = ("auto", "fp32")
    """Of ours; the first is swept over rates and caches, each is held against the peers."""
    peers: tuple[str, ...] = ("hf-fastapi", "litserve")
    """hf-fastapi, litserve, or none; what is not installed is said and left out."""
    limit: float = 2.0
    """Seconds from the scheduled arrival within which a visit's answers are good."""
    rounds: int = 4
    """Of the closed loop, in each of which every server has its turn."""
    turn: float = 2.0
    """Seconds of such a turn, about."""
    seconds: float = 6.0
    """Of arrivals at each rate."""
    threads: int = 0
    """Of every server. 0: as PyTorch decides."""
    tune: bool = False
    """First try a few settings of each peer (pool; batch size and wait, workers, transport), and take the best."""
    parts: tuple[Literal["single", "closed", "open"], ...] = ("single", "closed", "open")
    """One request at a time against the engine alone; the closed loop; Poisson arrivals, which want the closed loop."""
    quick: bool = False
    """Whether it runs at all: one round, short turns and rates; says nothing about speed."""
    data: Path | None = None
    """Folder of the data sets, for SLAKE's images and questions; default $MISS_DATA, then ../shared/data."""
    work: Path | None = None
    """Folder of what peers were converted to; default miss-engine/peers in the user's cache."""
    out: Path = Path("benchmarks/results")
    """For serve.json and serve.md, written after each part, and plots."""
    plots: bool = True
    """Draw them (needs matplotlib)."""
    json: bool = False
    """Print one JSON object and nothing else."""


def serve(args: ServeArgs) -> int:
    if args.plots:
        import matplotlib  # noqa: F401  (said before the measuring, not after)

    from miss.benchmarks import answer_models, bench_serve, serve_report

    if min(args.limit, args.turn, args.seconds) <= 0 or args.rounds < 1 or args.threads < 0 or not args.precision:
        raise ValueError(
            "--limit, --turn, --seconds: wanted above 0; --rounds at least 1; --threads 0 or more; one --precision"
        )
    work = (args.work or answer_models.default_work()).resolve()
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    peers = tuple(name for name in args.peers if name != "none")
    lengths = (1, 0.2, 0.5, 4, 4) if args.quick else (args.rounds, args.turn, args.seconds, 40, 40)
    options = bench_serve.Options(
        args.checkpoint,
        args.precision,
        peers,
        args.limit,
        *lengths,
        args.threads,
        args.tune,
        args.parts,
        args.data,
        work,
    )
    usual = signal.signal(signal.SIGTERM, _terminated)  # the servers then end with it
    try:
        result = bench_serve.run(options, say, lambda known: serve_report.write(args.out, known, False))
    finally:
        signal.signal(signal.SIGTERM, usual)
    result["quick"] = args.quick
    serve_report.write(args.out, result, args.plots)
    if not args.json:
        print(serve_report.table(result))
    print(json.dumps(result))
    return 0


COMMANDS = {
    "serve": (ServeArgs, serve),
    "kernels": (KernelArgs, kernels),
    "answer": (AnswerArgs, answer),
    "pretrain": (PretrainArgs, pretrain),
    "compare": (CompareArgs, compare),
    "merge": (MergeArgs, merge),
}
