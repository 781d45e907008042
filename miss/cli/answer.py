"""`miss answer`: questions about one image, or a file of questions about many.

Knows flags and output; the engine does the answering.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from miss.cli.flags import Append

if TYPE_CHECKING:
    from miss.engine.runtime.engine import Answer, Engine
    from miss.engine.runtime.sampler import SamplingParams

NOTICE = "research only, not for diagnosis"


@dataclass
class Args:
    """Answer questions about medical images (research only, not for diagnosis).

    One image:   miss answer --image scan.png --question "is there a mass?" [--question …]
    Many:        miss answer --batch questions.jsonl --output answers.jsonl
    A choice:    miss answer --image scan.png --question "is there a mass?" --constrain answers.txt
    """

    image: Path | None = None
    """Image file: PNG, JPEG, WebP, BMP, TIFF or DICOM."""
    question: Annotated[list[str], Append] = field(default_factory=list)
    """A question about the image; may be given more than once."""
    batch: Path | None = None
    """JSON lines with `image` (relative to the file's folder or --root), `question`, and optionally `qid`."""
    output: Path | None = None
    """With --batch: one JSON line an answer; lines that are already there are kept, so that a run can be resumed."""
    root: Path | None = None
    """With --batch: the folder that image paths are relative to, and may not leave."""
    checkpoint: str = "miss-small"
    """A checkpoint folder, or the name of one that ships with the project."""
    precision: str = "auto"
    """auto, fp32, bf16, fp16 or int8."""
    device: str = "cpu"
    """cpu or cuda."""
    beams: int | None = None
    """Beam width; 1 is greedy. Default: the checkpoint's."""
    max_new_tokens: int | None = None
    """Longest answer in tokens, the closing one included. Default: the checkpoint's."""
    alternatives: int = 2
    """How many other answers to show."""
    candidates: Path | None = None
    """A file of answers, one a line: each is scored in full, the likeliest is the answer, the next ones follow."""
    constrain: Path | None = None
    """A file of answers, one a line: only these are allowed; token by token, by renormalised probabilities."""
    sample: bool = False
    """Draw answers instead of taking the likeliest."""
    temperature: float | None = None
    """With --sample: above 1 is bolder, below 1 more careful. Default: 1."""
    top_p: float | None = None
    """With --sample: only from the likeliest tokens that together reach this share. Default: 1, all."""
    top_k: int | None = None
    """With --sample: only from this many likeliest tokens. Default: 0, all."""
    seed: int | None = None
    """With --sample: the same seed gives the same answers. Default: a new one each time."""
    attention_map: Path | None = None
    """With --image: a PNG of where the model looked, for each token of the answer; OUT-2.png for a second question."""
    batch_size: int = 16
    """With --batch: questions answered together."""
    json: bool = False
    """Print one JSON object a question."""


def main(args: Args) -> int:
    problem = _usage_problem(args)
    if problem:
        print(f"miss answer: {problem}; see miss answer --help", file=sys.stderr)
        return 2
    try:
        params = _params(args)
    except UsageError as error:
        print(f"miss answer: {error}; see miss answer --help", file=sys.stderr)
        return 2
    return _answer_file(args, params) if args.batch else _answer_image(args, params)


class UsageError(ValueError):
    """Flags, or a file that a flag names, that cannot be meant so."""


def _params(args: Args) -> "SamplingParams":
    from miss.engine.runtime.sampler import SamplingParams

    sampling: dict[str, Any] = {}
    if args.sample:
        given = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "seed": args.seed}
        sampling = {"temperature": 1.0} | {name: value for name, value in given.items() if value is not None}
        if not sampling["temperature"] > 0:
            raise UsageError(f"--temperature: got {args.temperature}; wanted a number above 0")
    return SamplingParams(
        args.beams,
        args.max_new_tokens,
        args.alternatives,
        candidates=_read_answers("--candidates", args.candidates),
        constrain=_read_answers("--constrain", args.constrain),
        **sampling,
    )


def _read_answers(flag: str, path: Path | None) -> tuple[str, ...] | None:
    """One answer a line; empty lines are left out."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{flag} {path}: not text in UTF-8; wanted one answer a line") from None
    answers = tuple(line.strip() for line in lines if line.strip())
    if not answers:
        raise UsageError(f"{flag} {path}: the file has no answers; wanted one a line")
    return answers


def _usage_problem(args: Args) -> str | None:
    if args.batch and (args.image or args.question):
        return "got --batch together with --image or --question; give one or the other"
    if args.batch and not args.output:
        return "--batch needs --output FILE"
    if not args.batch and not (args.image and args.question):
        return "wants --image FILE and --question TEXT, or --batch FILE and --output FILE"
    if args.batch and args.attention_map:
        return "got --batch together with --attention-map; it draws the answers about one --image"
    return _choice_problem(args)


def _choice_problem(args: Args) -> str | None:
    """Two ways of choosing answers, or what only sampling has without it."""
    beams = args.beams is not None and args.beams > 1
    ways = {"--candidates": args.candidates, "--constrain": args.constrain, "--sample": args.sample, "--beams": beams}
    given = [flag for flag, value in ways.items() if value]
    if len(given) > 1:
        return f"got {given[0]} together with {given[1]}; give one or the other"
    only = {"--temperature": args.temperature, "--top-p": args.top_p, "--top-k": args.top_k, "--seed": args.seed}
    for flag, value in only.items():
        if value is not None and not args.sample:
            return f"got {flag} without --sample; it is about drawing answers"
    return None


def _load(args: Args) -> "Engine":
    from miss.engine.runtime.engine import Engine

    engine = Engine.load(args.checkpoint, args.precision, args.device)
    for note in engine.notes:
        print(f"note: {engine.name} {note}", file=sys.stderr)
    return engine


def _answer_image(args: Args, params: "SamplingParams") -> int:
    engine = _load(args)
    assert args.image
    pairs = [(args.image, question) for question in args.question]
    for number, answer in enumerate(engine.answer_many(pairs, params, batch_size=64)):
        question = args.question[number]
        if args.attention_map:
            _draw_map(engine, args.image, question, answer, _numbered(args.attention_map, number))
        if args.json:
            print(json.dumps(_record(answer, engine), ensure_ascii=False))
        else:
            _show(question, answer, engine)
    if not args.json:
        print(f"\n{engine.name}, {NOTICE}")
    return 0


def _numbered(path: Path, number: int) -> Path:
    """The file of the first question as it was named; OUT-2.png, OUT-3.png … for further ones."""
    return path if number == 0 else path.with_stem(f"{path.stem}-{number + 1}")


def _draw_map(engine: "Engine", image: Path, question: str, answer: "Answer", path: Path) -> None:
    from miss.engine.data.images import decode_image
    from miss.engine.runtime.attention_maps import attention_maps, draw

    pixels, processor = decode_image(image), engine.processor
    asked = processor.question(question)
    maps = attention_maps(engine.model, processor, processor.image(pixels), asked, answer.token_ids)
    draw(maps, pixels, path, question, answer.text)
    print(f"where the model looked: {path}", file=sys.stderr)


def _record(answer: "Answer", engine: "Engine") -> dict[str, Any]:
    record = {"answer": answer.text, **answer.to_dict(), "model": engine.name}
    del record["text"]
    record["seconds"] = {"load": engine.load_seconds, **answer.seconds}
    return record


def _show(question: str, answer: "Answer", engine: "Engine") -> None:
    others = ", ".join(f"{a.text or '(nothing)'} {a.score:.2f}" for a in answer.alternatives)
    print(f"\nQ  {question}\nA  {answer.text or '(nothing)'}")
    print(f"   score {answer.score:.2f}" + (f"   or: {others}" if others else ""))
    print(f"   {answer.seconds['total']:.2f} s (model loaded in {engine.load_seconds:.2f} s)")
    for warning in answer.warnings:
        print(f"   note: {warning}")


def _answer_file(args: Args, params: "SamplingParams") -> int:
    """Answers the rows that the output does not hold yet; a row that cannot be served gets its error in place."""
    assert args.batch and args.output
    rows = _read_rows(args.batch)
    done = _resume(args.output, rows)
    engine = _load(args)
    from tqdm import tqdm

    failed, start = 0, time.perf_counter()
    with open(args.output, "a", encoding="utf-8") as out, tqdm(total=len(rows), initial=done, unit="answer") as bar:
        for row, result in zip(rows[done:], _results(args, engine, rows[done:], params), strict=True):
            failed += "error" in result
            out.write(json.dumps({**_identity(row), **result}, ensure_ascii=False) + "\n")
            out.flush()
            bar.update()
        os.fsync(out.fileno())
    took = time.perf_counter() - start
    print(f"{len(rows) - done} answered now ({failed} failed), {done} kept, {took:.1f} s: {args.output}")
    return 1 if failed else 0


def _results(
    args: Args, engine: "Engine", rows: list[dict[str, Any]], params: "SamplingParams"
) -> Iterator[dict[str, Any]]:
    from miss.engine.data.paths import safe_path

    root = args.root or args.batch.parent  # type: ignore[union-attr]

    def pairs() -> Iterator[tuple[Any, str]]:
        for row in rows:
            try:
                yield safe_path(root, row["image"]), row["question"]
            except ValueError as error:
                yield error, row["question"]  # the engine hands it back in place

    for result in engine.answer_many(pairs(), params, args.batch_size, on_error="return"):
        if isinstance(result, ValueError):
            yield {"error": " ".join(str(result).split())}
        else:
            yield _record(result, engine)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}, line {number}: not JSON; wanted one object a line") from None
            if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("image", "question")):
                raise ValueError(f'{path}, line {number}: wanted an object with texts "image" and "question"')
            rows.append(row)
    return rows


def _identity(row: dict[str, Any]) -> dict[str, Any]:
    return {k: row[k] for k in ("qid", "image", "question") if k in row}


def _resume(output: Path, rows: list[dict[str, Any]]) -> int:
    """How many rows the output already answers; a last line that was cut short is removed.

    Raises:
        ValueError: the output belongs to another batch.
    """
    if not output.exists():
        return 0
    whole, size = 0, 0
    with open(output, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            size += len(line)
            if whole >= len(rows) or not _answers(line, rows[whole]):
                raise ValueError(
                    f"{output}, line {whole + 1} does not answer row {whole + 1} of the batch: "
                    "it belongs to another run; choose another --output or remove it"
                )
            whole += 1
    os.truncate(output, size)
    return whole


def _answers(line: bytes, row: dict[str, Any]) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and _identity(found) == _identity(row)
