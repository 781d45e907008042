"""Data sets as a folder that travels: images decoded, scaled, compressed into tar shards, and every sample beside them.

Knows samples and splits; does not know shards' bytes (shards.py) or models.

Beside the shards stands samples.jsonl.gz, one JSON object a sample.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from miss.engine.data import shards
from miss.engine.data.paths import DataError
from miss.engine.data.samples import Sample
from miss.engine.data.shards import PackedImage, PackOptions, read_index, shrink, verify_shards

__all__ = ["PackOptions", "PackReport", "PackedImage", "pack", "read_index", "read_packed", "shrink", "verify_shards"]

SOURCES = {
    "slake": "SLAKE, Liu et al., ISBI 2021, CC BY 4.0",
    "vqa-rad": "VQA-RAD, Lau et al., Scientific Data 2018, CC0 1.0",
    "vqa-med-2019": "VQA-Med-2019, ImageCLEF, CC BY 4.0",
    "jsonl": "the user's own",
}


@dataclass(frozen=True)
class PackReport:
    """What was written: files and their bytes."""

    num_samples: int
    num_images: int
    num_shards: int
    num_bytes: int


def pack(
    splits: Mapping[tuple[str, str], Sequence[Sample]],
    out: str | os.PathLike[str],
    options: PackOptions | None = None,
    progress: bool = False,
    shard_bytes: int = shards.SHARD_BYTES,
) -> PackReport:
    """Writes a packed folder, all of it or nothing.

    Args:
        splits: the samples of each (data set, split).
        out: the folder; it must not exist, be empty, or hold an older pack of samples.
        options: how images are packed.
        progress: whether a progress bar is shown.
        shard_bytes: a shard is closed once it is as large.

    Raises:
        DataError: `out` holds something else.
        ImageError: an image cannot be decoded; the message names it.
        OSError: the folder cannot be written, as on a full disk. Nothing is left behind.
    """
    images = {s.image_key: s.image for samples in splits.values() for s in samples}
    facts = {
        "sources": {name: SOURCES.get(name, "unknown") for name in sorted({name for name, _ in splits})},
        "splits": [{"dataset": d, "split": s, "samples": len(rows)} for (d, s), rows in splits.items()],
    }
    num_shards, num_bytes = shards.write_folder(
        out,
        "samples",
        images,
        lambda numbers: _sample_lines(splits, numbers),
        facts,
        options or PackOptions(),
        progress,
        shard_bytes,
    )
    return PackReport(sum(len(rows) for rows in splits.values()), len(images), num_shards, num_bytes)


def _sample_lines(splits: Mapping[tuple[str, str], Sequence[Sample]], numbers: dict[str, int]) -> list[str]:
    lines = []
    for (_, split), samples in splits.items():
        for sample in samples:
            row = {f: getattr(sample, f) for f in _TEXT_FIELDS if getattr(sample, f) is not None}
            row |= {"split": split, "image": numbers[sample.image_key]}
            if sample.also_in:
                row["also_in"] = list(sample.also_in)
            lines.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
    return lines


_TEXT_FIELDS = [f.name for f in fields(Sample) if f.name not in ("image", "image_key", "also_in")]


def read_packed(folder: Path, dataset: str | None, split: str, language: str = "en") -> list[Sample]:
    """The samples of a packed folder, in the order in which they were packed.

    Args:
        dataset: one of those that were packed; None all of them.
        split: train, validate, test, or all (train and validate).
        language: en, zh or all, of SLAKE's samples.

    Raises:
        DataError: a file is missing, cut short or altered, or the split was not packed.
    """
    index = read_index(folder)
    wanted = ("train", "validate") if split == "all" else (split,)
    with shards.damage_named(folder):
        there = [(e["dataset"], e["split"]) for e in index["splits"]]
        if not any(s in wanted and dataset in (None, d) for d, s in there):
            shown = ", ".join(f"{d} {s}" for d, s in there)
            raise DataError(f"{folder}: no {split} split of {dataset or 'any data set'} was packed; there are: {shown}")
        places = shards.read_places(folder, index)
        return [
            _sample(row, places)
            for row in _rows(folder, index)
            if row["split"] in wanted
            and dataset in (None, row["dataset"])
            and (row["dataset"] != "slake" or language in ("all", row["language"]))
        ]


def _sample(row: dict[str, Any], places: list[tuple[str, PackedImage]]) -> Sample:
    key, image = shards.placed(row["image"], places)
    text: dict[str, Any] = {f: row.get(f) for f in _TEXT_FIELDS}
    return Sample(**text, image=image, image_key=key, also_in=tuple(row.get("also_in", ())))


def _rows(folder: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    rows = shards.read_rows(folder, index, "samples")
    counts = Counter((row["dataset"], row["split"]) for row in rows)
    if any(counts[(e["dataset"], e["split"])] != e["samples"] for e in index["splits"]):
        raise DataError(
            f"{folder / shards.ROWS['samples']}: not as many samples as were packed; copy or pack the data again"
        )
    return rows
