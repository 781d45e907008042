"""`miss quantize`: a checkpoint packed into int8, float8, int4 or bitsandbytes' forms, and held against its parent.

Knows flags and folders, makes calibration batches of a data set, and asks both models the same questions; does not know
how tensors are packed, or what makes two answers the same.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from miss.cli.flags import Positional
from miss.engine.data.datasets import load_dataset
from miss.engine.data.images import decode_image
from miss.engine.data.loader import Row, Visit, collate
from miss.engine.data.processor import Processor
from miss.engine.data.samples import Sample
from miss.engine.evaluation.agreement import card_section, compared, with_section
from miss.engine.runtime.engine import Engine
from miss.engine.runtime.gate import judged
from miss.engine.runtime.quantize import Options, Packed, QuantizeError, agreement, gap_where_they_part, quantize
from miss.engine.runtime.sampler import SamplingParams
from miss.models.card import default_card
from miss.models.config import MissConfig
from miss.models.packed_loading import load_packed
from miss.models.quantized import linear_modules
from miss.models.vqa import MissVQA, VQABatch
from miss.models.weights import CARD, CONFIG, TOKENIZER, WEIGHTS, load_checkpoint, write_checkpoint

_HEADER = 160  # bytes that a tensor takes in the header of a safetensors file, its name included, at most
_STORED = ("small-mixed", "int4")  # schemes that are unpacked to be run
_IMAGES_A_BATCH, _QUESTIONS_AN_IMAGE = 4, 12


@dataclass
class Args:
    """Pack a checkpoint. With --dataset, errors are judged and compensated by what the answers depend on."""

    src: Annotated[Path, Positional]
    """A checkpoint folder of ours."""
    dst: Annotated[Path, Positional]
    """The folder to write."""
    scheme: Literal["int8", "int8-weight", "fp8", "int4-weight", "nf4", "llm-int8", "int4", "small-mixed"] = (
        "small-mixed"
    )
    """int8: weights and activations. int8-weight, int4-weight (groups of 64), nf4, llm-int8: linear layers, run as they
    are packed. fp8: float8 weights and activations, for GPUs from 8.9 on; a CPU runs it too, slowly. int4: as
    int4-weight, smaller on disk. small-mixed: as exact as --budget allows."""
    budget: int = 40_000_000
    """Bytes of the whole folder (small-mixed)."""
    max_positions: int | None = None
    """Rows of the text position table that are kept, such as 64."""
    dataset: tuple[str, ...] = ()
    """Calibrate on training rows of: slake, vqa-rad, vqa-med-2019, jsonl, packed."""
    data: Path | None = None
    """Folder of the data sets; default $MISS_DATA, then ../shared/data."""
    split: str = "train"
    """The split that calibrates."""
    check_split: str = "validate"
    """The split that the packed model is compared with its parent on; '' compares nothing."""
    num_images: int | None = None
    """Images that calibrate, with up to 12 questions each. Default: 96, fewer where an image costs more than those of
    the small model, at least 16."""
    num_questions: int | None = None
    """Questions that are compared, evenly over the split. Default: all; under 1,000 never pass the gate."""
    compensate: bool = True
    """Whether rounding errors are made good within each layer (GPTQ)."""
    smooth: bool = True
    """Whether outlier channels are scaled where a layer before takes it up (int8)."""
    float_share: float = 0.08
    """Of all products, that may keep their activations as they are, where those of int8 lose the most (int8)."""
    overwrite: bool = False
    """Write although DST is there."""


def main(args: Args) -> int:
    if args.num_images is not None and args.num_images < 1:
        raise QuantizeError(f"num-images: got {args.num_images}; wanted at least 1")
    if args.dst.exists() and (not args.dst.is_dir() or any(args.dst.iterdir())) and not args.overwrite:
        raise QuantizeError(f"{args.dst}: is there already: choose another place, or pass --overwrite")
    model, _ = load_checkpoint(args.src, dtype=torch.float32)
    batches = _batches(args, args.split, args.num_images or _images(model.config)) if args.dataset else []
    reserve = _other_bytes(args, model) + _HEADER * 3 * len(model.state_dict())
    options = Options(
        args.scheme, args.budget - reserve, args.max_positions, args.compensate, args.smooth, args.float_share
    )
    with tqdm(total=len(linear_modules(model)), desc="calibrate, then pack layers", disable=None) as bar:
        packed = quantize(model, options, batches, lambda layer: bar.update())
    report = packed.quantization.report | {"bytes_after": packed.nbytes}
    if batches and args.check_split and args.scheme in _STORED:
        report |= _teacher_forced(args, model)
    del model
    _write(args, packed, report)
    if args.dataset and args.check_split and args.scheme not in _STORED:
        report |= _answers(args)
        _write(args, packed, report)
    total = sum(file.stat().st_size for file in args.dst.iterdir())
    before = sum(file.stat().st_size for file in args.src.iterdir() if file.is_file())
    print(json.dumps({key: value for key, value in report.items() if key != "layers"}))
    print(f"wrote {args.dst}: {total:,} bytes, from {before:,}")
    if args.scheme == "small-mixed" and total > args.budget:
        raise QuantizeError(
            f"{args.dst}: {total:,} bytes with files that stood there, over the budget of {args.budget:,}"
        )
    return 0


def _images(config: MissConfig) -> int:
    """How many images calibrate: as much work as 96 of the small model's."""
    vision = config.vision
    work = vision.num_positions * vision.num_layers * vision.hidden_size**2
    return max(16, min(96, round(96 * 257 * 12 * 384**2 / work)))


def _write(args: Args, packed: Packed, report: dict[str, Any]) -> None:
    """The folder, read back as a check."""
    found = replace(packed.quantization, report=report)
    card = (args.src / CARD).read_text(encoding="utf-8") if (args.src / CARD).is_file() else default_card(packed.config)
    if args.scheme not in _STORED:
        card = with_section(card, card_section(args.scheme, report))
    tokenizer = (args.src / TOKENIZER).read_bytes() if (args.src / TOKENIZER).is_file() else None
    write_checkpoint(
        packed.config, packed.tensors, args.dst, tokenizer=tokenizer, card=card, quantization=found.to_dict()
    )
    load_packed(args.dst)


def _other_bytes(args: Args, model: MissVQA) -> int:
    """Bytes of the folder's other files, and of what its configuration will say about the packing."""
    config = json.loads((args.src / CONFIG).read_text(encoding="utf-8"))
    names = [file for file in args.src.iterdir() if file.name not in (CONFIG, WEIGHTS)]
    return (
        sum(file.stat().st_size for file in names)
        + 2 * len(json.dumps(config))
        + 4096
        + 160 * len(linear_modules(model))
    )


def _batches(args: Args, split: str, num_images: int) -> list[VQABatch]:
    """Questions of `num_images` images, spread evenly over the data sets."""
    processor = Processor.from_folder(args.src)
    batches: list[VQABatch] = []
    for dataset in args.dataset:
        samples = load_dataset(dataset, args.data, split)
        batches += _batches_of(processor, samples, max(1, num_images // len(args.dataset)))
    return batches


def _batches_of(processor: Processor, samples: list[Sample], num_images: int) -> Iterator[VQABatch]:
    by_image: dict[str, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image_key, []).append(sample)
    keys = sorted(by_image)
    keys = keys[:: max(1, len(keys) // num_images)][:num_images]
    for start in range(0, len(keys), _IMAGES_A_BATCH):
        chosen = [by_image[key] for key in keys[start : start + _IMAGES_A_BATCH]]
        chosen = [asked[:: max(1, len(asked) // _QUESTIONS_AN_IMAGE)][:_QUESTIONS_AN_IMAGE] for asked in chosen]
        pixels = torch.stack([torch.from_numpy(processor.image(decode_image(asked[0].image))) for asked in chosen])
        rows = [
            [Row(s.qid, processor.question(s.question), processor.answer(s.answer)) for s in asked] for asked in chosen
        ]
        visits = [Visit(i, 0, tuple(range(len(asked)))) for i, asked in enumerate(rows)]
        yield collate(visits, rows, pixels, None).batch


def _teacher_forced(args: Args, child: MissVQA) -> dict[str, Any]:
    """How far a model that is packed for storage alone is from its parent, on rows that did not calibrate it."""
    parent, _ = load_checkpoint(args.src, dtype=torch.float32)
    batches = _batches(args, args.check_split, args.num_images or _images(parent.config))
    return {"agreement": agreement(parent, child, batches)}


def _answers(args: Args) -> dict[str, Any]:
    """Both models asked every question of the check split, greedily: what the gate is judged by."""
    samples = [s for name in args.dataset for s in load_dataset(name, args.data, args.check_split)]
    if args.num_questions is not None:
        samples = samples[:: max(1, len(samples) // args.num_questions)][: args.num_questions]
    samples.sort(key=lambda sample: sample.image_key)
    parent = Engine.load(args.src, "fp32")
    wanted = _ask(parent, samples, "parent's answers")
    got = _ask(Engine.load(args.dst, args.scheme), samples, "packed answers")
    gaps = [
        gap_where_they_part(
            parent.model,
            torch.from_numpy(parent.processor.image(decode_image(sample.image))),
            parent.processor.question(sample.question),
            a[1],
            b[1],
        )
        for sample, a, b in zip(samples, wanted, got, strict=True)
        if a[1] != b[1]
    ]
    found = compared(samples, wanted, got, gaps)
    row = found["table"]["all"]
    return {"answers": found, "gate": judged(row["questions"], row["same"], row["parent_right"], row["right"])}


def _ask(engine: Engine, samples: list[Sample], what: str) -> list[tuple[str, list[int]]]:
    pairs = ((sample.image, sample.question) for sample in samples)
    answers = engine.answer_many(pairs, SamplingParams(num_beams=1, num_alternatives=0))
    return [(a.text, a.token_ids) for a in tqdm(answers, total=len(samples), desc=what, disable=None)]
