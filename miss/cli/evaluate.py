"""`miss evaluate`: score a checkpoint, or a file of predictions, on a data set.

Knows flags and where results go; the evaluation scores, and the engine answers only where no predictions are given.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from miss.engine.data.datasets import Sample
    from miss.engine.evaluation.predictions import Mode, Prediction
    from miss.engine.runtime.engine import Engine
    from miss.engine.runtime.sampler import SamplingParams

DEFAULT_CHECKPOINT = "miss-small"
PACKAGES = ("torch", "numpy", "scipy", "pillow", "tokenizers")


@dataclass
class Args:
    """Score answers: exact match, the original's rule and LLaVA-Med's, with 95 % intervals clustered by image.

    Writes metrics.json, predictions.jsonl, report.md and plots. With --predictions no model is loaded.
    """

    dataset: Literal["slake", "vqa-rad", "vqa-med-2019", "jsonl", "packed"]
    """The data set's format; packed: everything in a folder that `miss data pack` wrote."""
    split: str
    """train, validate, test or all."""
    data: Path | None = None
    """The data set's folder, or one that holds it (jsonl: also the file itself). Default: $MISS_DATA."""
    language: str = "en"
    """en, zh or all; only SLAKE has more than one."""
    checkpoint: str | None = None
    """A checkpoint folder, or the name of one that ships with the project. Default: miss-small."""
    predictions: Path | None = None
    """Score this file instead of a model: a JSON list, or JSON lines, of {"qid", "answer"}; one row a question."""
    against: Path | None = None
    """Another file of predictions on the same questions, to compare with (paired, McNemar's exact test)."""
    json: str | None = None
    """Write the metrics under this name too; - is standard output."""
    out: Path | None = None
    """The folder of the results. Default: runs/evaluate-DATASET-SPLIT."""
    limit: int | None = None
    """Only the first N questions."""
    baselines: bool = True
    """Also run the model on blank images, and the question-only lookup from the training split."""
    shuffled: bool = False
    """Also run the model with every question given another question's image."""
    batch_size: int = 16
    """Questions answered together."""
    bootstrap: int = 10_000
    """Resamples behind the intervals; 0: no intervals."""
    seed: int = 0
    """Of the bootstrap, and of the shuffled images."""
    precision: str = "auto"
    """auto, fp32, bf16, fp16, int8, or what a packed checkpoint has: int8-weight, fp8, int4-weight, nf4, llm-int8."""
    device: str = "cpu"
    """cpu or cuda."""
    beams: int | None = None
    """Beam width; 1 is greedy. Default: the checkpoint's."""
    max_new_tokens: int | None = None
    """Longest answer in tokens, the closing one included. Default: the checkpoint's."""


def main(args: Args) -> int:
    problem = _usage_problem(args)
    if problem:
        print(f"miss evaluate: {problem}; see miss evaluate --help", file=sys.stderr)
        return 2
    import matplotlib  # noqa: F401  before the work, not after it, if it is missing

    from miss.engine.data.datasets import load_dataset
    from miss.engine.evaluation.report import json_bytes, summary, write_report
    from miss.engine.evaluation.runner import Options, evaluate

    out = args.out or Path("runs") / f"evaluate-{args.dataset}-{args.split}"
    _check_writable(out)
    everything = _distinct(load_dataset(args.dataset, args.data, args.split, args.language))
    samples = everything[: args.limit]
    train, no_train = _train(args)
    against = None if args.against is None else _from_file(args.against, everything, len(samples))
    options = Options(args.dataset, args.split, args.language, args.bootstrap, args.seed, args.baselines, args.shuffled)
    answers: Any
    if args.predictions is not None:
        answers, source = _from_file(args.predictions, everything, len(samples)), _file_facts(args.predictions)
    else:
        answers, source = _engine(args)
    evaluation = evaluate(samples, answers, options, train, no_train, against)
    evaluation.metrics |= {"limit": args.limit, **source, "environment": environment(args)}
    to_stdout = args.json == "-"
    paths = write_report(evaluation, out, Path(args.json) if args.json and not to_stdout else None)
    if to_stdout:
        sys.stdout.buffer.write(json_bytes(evaluation.metrics, indent=2))
        sys.stdout.flush()
    print(summary(evaluation.metrics), file=sys.stderr if to_stdout else sys.stdout)
    print("written: " + ", ".join(map(str, paths)), file=sys.stderr)
    return 0


def _usage_problem(args: Args) -> str | None:
    if args.predictions is not None and args.checkpoint is not None:
        return "got --predictions together with --checkpoint; give one or the other"
    for name, least in (("limit", 1), ("batch_size", 1), ("bootstrap", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            return f"--{name.replace('_', '-')}: got {value}; wanted at least {least}"
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        return f"--out: {args.out} is a file; wanted a folder"
    if args.json not in (None, "-") and Path(str(args.json)).is_dir():
        return f"--json: {args.json} is a folder; wanted a file, or - for standard output"
    return None


def _check_writable(folder: Path) -> None:
    """Fails before the work where the results could not be written after it."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {there}; give --out a folder that can be written to")


def _distinct(samples: "list[Sample]") -> "list[Sample]":
    """qids are unique within a data set; where several come packed together, they get its name in front."""
    if len({s.dataset for s in samples}) <= 1:
        return samples
    return [dataclasses.replace(s, qid=f"{s.dataset}/{s.qid}") for s in samples]


def _train(args: Args) -> "tuple[list[Sample] | None, str]":
    """The training split, or None and why there is none to compare with."""
    from miss.engine.data.datasets import DataError, load_dataset

    if args.split in ("train", "all"):
        return None, "the evaluated rows are training rows"
    if args.data is not None and args.data.is_file():
        return None, "one file has no training split beside it"
    try:
        train = load_dataset(args.dataset, args.data, "train", args.language)
    except DataError as error:
        return None, str(error)
    return (train, "") if train else (None, "the training split is empty")


def _from_file(path: Path, everything: "Sequence[Sample]", num: int) -> "list[Prediction]":
    """The file's predictions for the first `num` samples; the file must answer the whole split, or just these."""
    from miss.engine.evaluation.predictions import join, read_predictions

    predictions = read_predictions(path)
    expected = everything[:num] if len(predictions) == num else everything
    return join(expected, predictions, str(path))[:num]


def _file_facts(path: Path) -> dict[str, Any]:
    return {"checkpoint": None, "predictions": {"file": path.name, "sha256": _sha256(path)}}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _engine(args: Args) -> "tuple[EngineAnswerer, dict[str, Any]]":
    """The checkpoint as an answerer, and what the record says of it."""
    from miss.engine.runtime.engine import Engine, find_checkpoint
    from miss.engine.runtime.sampler import SamplingParams

    name = args.checkpoint or DEFAULT_CHECKPOINT
    params = SamplingParams(num_beams=args.beams, max_new_tokens=args.max_new_tokens, num_alternatives=0)
    engine = Engine.load(name, args.precision, args.device)
    for note in engine.notes:
        print(f"miss evaluate: {name}: {note}", file=sys.stderr)
    weights = find_checkpoint(name) / "model.safetensors"
    facts = {
        "checkpoint": name,
        "model": {
            "name": engine.name,
            "sha256": _sha256(weights),
            "processor": engine.processor.fingerprint,
            "precision": args.precision,
            "device": args.device,
            "beams": args.beams,
            "max_new_tokens": args.max_new_tokens,
        },
    }
    return EngineAnswerer(engine, params, args.batch_size, args.seed), facts


class EngineAnswerer:
    """An engine as the evaluation wants to be handed one: samples and a mode in, predictions out."""

    def __init__(self, engine: "Engine", params: "SamplingParams", batch_size: int, seed: int) -> None:
        self.engine, self.params, self.batch_size, self.seed = engine, params, batch_size, seed

    def __call__(self, samples: "Sequence[Sample]", mode: "Mode") -> "Iterator[Prediction]":
        """Answers image by image, so that the questions of one image share its encoding."""
        from miss.engine.evaluation.baselines import other_images
        from miss.engine.evaluation.predictions import Prediction

        shown = other_images(samples, self.seed) if mode == "shuffled" else samples
        # A constant image stays constant under resizing: the background at the model's own size is that at any size.
        blank = self.engine.processor.blank
        order = sorted(range(len(samples)), key=lambda i: samples[i].image_key)
        pairs = ((blank if mode == "blank" else _source(shown[i]), samples[i].question) for i in order)
        answers = self.engine.answer_many(pairs, self.params, batch_size=self.batch_size)
        for i, answer in zip(order, answers, strict=True):
            seconds = answer.seconds["total"]
            yield Prediction(samples[i].qid, answer.text, answer.score, answer.logprob, seconds)


def _source(sample: "Sample") -> "Path | bytes":
    return sample.image if isinstance(sample.image, Path) else sample.image.read_bytes()


def environment(args: Args) -> dict[str, Any]:
    """Where and with what the figures came about; no names of people or machines."""
    import miss

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "miss": miss.__version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "packages": versions,
        "device": None if args.predictions is not None else args.device,
    }


def _revision() -> str | None:
    """The commit of the clone that runs, "+" where files differ from it; None outside of a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        # No git on this machine, or one that refuses the folder: the record says null.
        return None
