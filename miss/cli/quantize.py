"""`miss quantize`: a checkpoint packed into int8 and int4, within a number of bytes.

Knows flags and folders, and makes calibration batches of a data set; does not know how tensors are packed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from miss.engine.data.datasets import load_dataset
from miss.engine.data.images import decode_image
from miss.engine.data.loader import Row, Visit, collate
from miss.engine.data.processor import Processor
from miss.engine.data.samples import Sample
from miss.engine.runtime.quantize import Options, Packed, QuantizeError, agreement, quantize
from miss.models.card import default_card
from miss.models.quantized import linear_modules
from miss.models.vqa import MissVQA, VQABatch
from miss.models.weights import CARD, CONFIG, TOKENIZER, WEIGHTS, load_checkpoint, write_checkpoint

_HEADER = 160  # bytes that a tensor takes in the header of a safetensors file, its name included, at most
_IMAGES_A_BATCH, _QUESTIONS_AN_IMAGE = 4, 12


@dataclass
class Args:
    """Pack a checkpoint. With --dataset, errors are judged and compensated by what the answers depend on."""

    src: Annotated[Path, tyro.conf.Positional]
    """A checkpoint folder of ours."""
    dst: Annotated[Path, tyro.conf.Positional]
    """The folder to write."""
    scheme: Literal["int8", "int4", "small-mixed"] = "small-mixed"
    """int8: all matrices. int4: linear layers by groups of 64. small-mixed: as exact as --budget allows."""
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
    num_images: int = 96
    """Images that calibrate, and as many that compare, with up to 12 questions each."""
    compensate: bool = True
    """Whether rounding errors are made good within each layer (GPTQ)."""
    overwrite: bool = False
    """Write although DST is there."""


def main(args: Args) -> int:
    if args.num_images < 1:
        raise QuantizeError(f"num-images: got {args.num_images}; wanted at least 1")
    if args.dst.exists() and (not args.dst.is_dir() or any(args.dst.iterdir())) and not args.overwrite:
        raise QuantizeError(f"{args.dst}: is there already: choose another place, or pass --overwrite")
    model, _ = load_checkpoint(args.src, dtype=torch.float32)
    batches = _batches(args, args.split) if args.dataset else []
    card = (args.src / CARD).read_text(encoding="utf-8") if (args.src / CARD).is_file() else None
    reserve = _other_bytes(args) + _HEADER * 3 * len(model.state_dict())
    options = Options(args.scheme, args.budget - reserve, args.max_positions, args.compensate)
    with tqdm(total=len(linear_modules(model)), desc="calibrate, then pack layers", disable=None) as bar:
        packed = quantize(model, options, batches, lambda layer: bar.update())
    if batches and args.check_split:
        packed = _checked(args, packed, model)
    tokenizer = (args.src / TOKENIZER).read_bytes() if (args.src / TOKENIZER).is_file() else None
    write_checkpoint(
        packed.config,
        packed.tensors,
        args.dst,
        tokenizer=tokenizer,
        card=card or default_card(packed.config),
        quantization=packed.quantization.to_dict(),
    )
    load_checkpoint(args.dst)
    total = sum(file.stat().st_size for file in args.dst.iterdir())
    before = sum(file.stat().st_size for file in args.src.iterdir() if file.is_file())
    print(json.dumps(packed.quantization.report))
    print(f"wrote {args.dst}: {total:,} bytes, from {before:,}")
    if args.scheme == "small-mixed" and total > args.budget:
        raise QuantizeError(
            f"{args.dst}: {total:,} bytes with files that stood there, over the budget of {args.budget:,}"
        )
    return 0


def _other_bytes(args: Args) -> int:
    """Bytes of the folder's other files, and of what its configuration will say about the packing."""
    config = json.loads((args.src / CONFIG).read_text(encoding="utf-8"))
    names = [file for file in args.src.iterdir() if file.name not in (CONFIG, WEIGHTS)]
    return sum(file.stat().st_size for file in names) + 2 * len(json.dumps(config)) + 8192


def _batches(args: Args, split: str) -> list[VQABatch]:
    """Questions of `num_images` images, spread evenly over the data sets."""
    processor = Processor.from_folder(args.src)
    batches: list[VQABatch] = []
    for dataset in args.dataset:
        samples = load_dataset(dataset, args.data, split)
        batches += _batches_of(processor, samples, max(1, args.num_images // len(args.dataset)))
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


def _checked(args: Args, packed: Packed, child: MissVQA) -> Packed:
    """Adds to the report how far the packed model is from its parent on rows that did not calibrate it."""
    parent, _ = load_checkpoint(args.src, dtype=torch.float32)
    found = agreement(parent, child, _batches(args, args.check_split))
    report = packed.quantization.report | {"agreement": found}
    return replace(packed, quantization=replace(packed.quantization, report=report))
