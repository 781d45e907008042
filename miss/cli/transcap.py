"""`miss transcap`: captions for images that have labels only, by templates or a language model, cleaned, sourced.

Knows flags and what to show; the transcap room does the rest.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miss.engine.transcap.writer import Writer

WRITERS = ("template", "local", "endpoint")
NUM_EXAMPLES = 20


@dataclass
class Args:
    """Write captions for label rows: labels -> prompts -> a writer -> cleaning -> captions.jsonl and captions.csv.

    miss transcap --labels labels.jsonl --out runs/captions --writer template

    --labels, --writer and --prompt may name several: each combination gets a folder of its own in --out, and
    --out/table.md shows them side by side. A run that was stopped goes on where it was by the same command.
    """

    labels: tuple[Path, ...]
    """MedNIST's labels.jsonl, VQA-Med-2019's rows, SLAKE's or VQA-RAD's train.json, or JSONL rows {"image": NAME,
    "labels": {KEY: VALUE}}."""
    out: Path
    """Folder for captions.jsonl, captions.csv, sets.jsonl (every candidate and why it was rejected), report.json."""
    writer: tuple[str, ...] = ("template",)
    """template (sentence frames, no model), local (a small language model here), endpoint (a server over HTTP)."""
    prompt: tuple[str, ...] = ("rewrite",)
    """rewrite (a plain sentence, to be said in other words), labels (the labels as a list). Templates have none."""
    k: int = 5
    """Captions an image."""
    pool: int = 10
    """Captions a label set at most, where many images share it; every image draws k of them."""
    candidates: int = 16
    """What a writer is asked for, a label set."""
    batch: int = 4
    """Label sets between two writes to the disk: what a crash can lose."""
    limit: int | None = None
    """At most so many label sets, drawn by the seed."""
    seed: int = 0
    """Decides what is sampled, and which captions an image draws."""
    resume: str = "auto"
    """auto: go on with what --out holds, if anything; none: start anew."""
    fill: bool = True
    """Fill up to k with template captions where a language model's were rejected (marked "filled")."""
    split: str = "train"
    """Rows that name another split are left out; all: keep every row."""
    keep_shared: bool = False
    """Keep images that are marked as also being in VQA-RAD."""
    model: str | None = None
    """local: a .gguf file or a folder (default: the packaged SmolLM2-135M); endpoint: the model's name."""
    temperature: float = 0.7
    """Of sampling."""
    top_p: float = 0.95
    """Of sampling."""
    max_tokens: int = 48
    """Of one caption."""
    url: str = ""
    """endpoint: where the API starts, such as http://127.0.0.1:8000/v1."""
    key_variable: str = "MISS_TRANSCAP_KEY"
    """endpoint: the environment variable that holds the API key; it is read from nowhere else and written nowhere."""
    timeout: float = 60.0
    """endpoint: seconds until a whole answer must be there."""
    retries: int = 6
    """endpoint: how often a request is made again after 429, 5xx, a timeout or a broken answer."""
    rate: float = 60.0
    """endpoint: requests a minute at most."""
    parallel: int = 4
    """endpoint: requests at a time."""
    json: bool = False
    """Print the reports as JSON."""


def main(args: Args) -> int:
    from miss.engine.transcap import tables
    from miss.engine.transcap.labels import read_labels

    _check(args)
    loaded = {path: read_labels(path, args.split, args.keep_shared) for path in args.labels}
    runs = list(combinations(args))
    reports = []
    for path, name, prompt in runs:
        folder = args.out / label(path, name, prompt) if len(runs) > 1 else args.out
        report = write(args, loaded[path], make_writer(args, name, prompt), folder, label(path, name, prompt))
        reports.append((path, folder, report))
    if len(runs) > 1:
        _compare(args, reports)
    if args.json:
        found = [{"labels": str(path), "out": str(folder), **report} for path, folder, report in reports]
        print(json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False))
        return 0
    print(tables.markdown([tables.row(stem(path), report) for path, _, report in reports]), end="")
    for _, folder, report in reports:
        show(folder, report)
    return 0


def _check(args: Args) -> None:
    for name in args.writer:
        if name not in WRITERS:
            raise ValueError(f"--writer: got {name!r}; accepted: {', '.join(WRITERS)}")
    if not args.labels or not args.writer or not args.prompt:
        raise ValueError("--labels, --writer and --prompt: wanted at least one each")
    stems = [stem(path) for path in args.labels]
    if len(set(stems)) < len(stems):
        raise ValueError(f"--labels: {', '.join(stems)}: two runs would share a folder; give files of different names")


def combinations(args: Args) -> Iterator[tuple[Path, str, str]]:
    """(labels, writer, prompt) of every run; templates have no prompt and run once."""
    for path in args.labels:
        for writer in dict.fromkeys(args.writer):
            for prompt in dict.fromkeys(args.prompt) if writer != "template" else [""]:
                yield path, writer, prompt


def stem(path: Path) -> str:
    return f"{path.resolve().parent.name}-{path.stem}"


def label(path: Path, writer: str, prompt: str) -> str:
    return "-".join(filter(None, (stem(path), writer, prompt)))


def make_writer(args: Args, name: str, prompt: str) -> "Writer":
    from miss.engine.transcap.prompts import get_prompt
    from miss.engine.transcap.template import TemplateWriter

    if name == "template":
        return TemplateWriter()
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
    if name == "local":
        from miss.engine.transcap.local import LocalWriter, find_model

        return LocalWriter(find_model(args.model), get_prompt(prompt), **sampling)  # type: ignore[arg-type]
    from miss.engine.transcap.endpoint import Endpoint, EndpointWriter

    endpoint = Endpoint(
        args.url, args.model or "", args.key_variable, args.timeout, args.retries, args.rate, args.parallel
    )
    return EndpointWriter(endpoint, get_prompt(prompt), **sampling)  # type: ignore[arg-type]


def write(args: Args, labels: Any, writer: "Writer", folder: Path, name: str) -> dict[str, Any]:
    from tqdm import tqdm

    from miss.engine.transcap.run import TransCapConfig, choose_sets, run

    config = TransCapConfig(args.k, args.pool, args.candidates, args.batch, args.limit, args.seed, args.fill)
    total = len(choose_sets(labels, config))
    counts = {"kept": 0, "rejected": 0, "tokens": 0}
    with tqdm(total=total, desc=name, unit="set", disable=not sys.stderr.isatty()) as bar:

        def tell(done: int, batch: dict[str, Any] | None) -> None:
            if batch is None and done:
                print(f"{name}: going on behind {done} of {total} label sets", file=sys.stderr)
            for record in batch["sets"] if batch else []:
                counts["kept"] += sum(not c.get("filled") for c in record["captions"])
                counts["rejected"] += len(record["rejected"])
                counts["tokens"] += sum(record["tokens"].values())
            bar.set_postfix(counts, refresh=False)
            bar.update(done - bar.n)

        return run(labels, writer, folder, config, args.resume, tell)


def _compare(args: Args, reports: list[tuple[Path, Path, dict[str, Any]]]) -> None:
    """table.md and examples.md of several runs."""
    from miss.engine.transcap import tables
    from miss.engine.transcap.store import write_atomic

    table = tables.markdown([tables.row(stem(path), report) for path, _, report in reports])
    write_atomic(args.out / "table.md", table.encode())
    modelled = [(p, f, r) for p, f, r in reports if r["settings"]["writer"] != "template"]
    runs = []
    for path, folder, report in modelled or reports:
        records = [json.loads(line) for line in (folder / "sets.jsonl").read_text(encoding="utf-8").splitlines()]
        runs.append((label(path, report["settings"]["writer"], report["settings"].get("prompt", "")), records))
    write_atomic(args.out / "examples.md", tables.examples(runs, NUM_EXAMPLES, args.seed).encode())


def show(folder: Path, report: dict[str, Any]) -> None:
    """A run in a few lines, what was left out included."""
    tokens = ", ".join(f"{count:,} {kind}" for kind, count in report["tokens"].items())
    print(
        f"{folder}: {report['images']:,} images of {report['label_sets']:,} label sets "
        f"(of {report['label_sets_in_file']:,}), {report['kept']:,} captions kept, {report['filled']:,} filled, "
        f"{report['rejected']:,} rejected, "
        f"{report['seconds']:.1f} s" + (f"; tokens: {tokens}" if tokens else "")
    )
    for what, count in report["left_out"].items():
        print(f"  left out: {count:,} {what}")
    if report["images_without_caption"]:
        names = report["images_without_caption"]
        print(
            f"  no caption was kept for {len(names):,} images: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        )
