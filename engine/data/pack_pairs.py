"""Image-text pairs as a folder that travels: images in tar shards, captions beside them.

Knows pairs; does not know shards' bytes (shards.py) or models.

Beside the shards stands pairs.jsonl.gz, one JSON object a pair: the image's number, captions, source.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.engine.data import shards
from miss.engine.data.errors import ImageError
from miss.engine.data.pairs import Pair, images_of
from miss.engine.data.paths import DataError
from miss.engine.data.shards import PackedImage, PackOptions


@dataclass(frozen=True)
class PairsReport:
    """What was written, and what was left out: one line for each image that cannot be decoded."""

    num_pairs: int
    num_captions: int
    num_images: int
    num_shards: int
    num_bytes: int
    left_out: list[str]


def pack_pairs(
    pairs: Sequence[Pair],
    out: str | os.PathLike[str],
    options: PackOptions | None = None,
    progress: bool = False,
    shard_bytes: int = shards.SHARD_BYTES,
    skip_corrupt: bool = False,
) -> PairsReport:
    """Writes a packed folder, all of it or nothing.

    Args:
        pairs: in the order in which they will be read.
        out: the folder; it must not exist, be empty, or hold an older pack of pairs.
        options: how images are packed.
        progress: whether a progress bar is shown.
        shard_bytes: a shard is closed once it is as large.
        skip_corrupt: leave out images that cannot be decoded, with their pairs, instead of stopping.

    Raises:
        DataError: there are no pairs, two images have one key, or `out` holds something else.
        ImageError: an image cannot be decoded; the message names it.
        OSError: the folder cannot be written, as on a full disk. Nothing is left behind.
    """
    if not pairs:
        raise DataError("no pairs to pack; wanted at least one")
    images = images_of(pairs)
    refused: list[ImageError] = []
    kept: list[Pair] = []

    def lines(numbers: dict[str, int]) -> list[str]:
        kept.extend(pair for pair in pairs if pair.key in numbers)
        if not kept:
            raise DataError(f"none of {len(images)} images can be decoded, the first: {refused[0]}")
        return [_line(pair, numbers[pair.key]) for pair in kept]

    num_shards, num_bytes = shards.write_folder(
        out,
        "pairs",
        images,
        lines,
        {"sources": sorted({pair.source for pair in pairs})},
        options or PackOptions(),
        progress,
        shard_bytes,
        refused if skip_corrupt else None,
    )
    num_captions = sum(len(pair.captions) for pair in kept)
    num_images = len(images) - len(refused)
    return PairsReport(len(kept), num_captions, num_images, num_shards, num_bytes, [str(e) for e in refused])


def _line(pair: Pair, number: int) -> str:
    row = {"image": number, "captions": list(pair.captions), "source": pair.source}
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def read_packed_pairs(folder: Path) -> list[Pair]:
    """The pairs of a packed folder, in the order in which they were packed.

    Raises:
        DataError: a file is missing, cut short or altered, or holds something else.
    """
    index = shards.read_index(folder)
    if "pairs" not in index:
        raise DataError(f"{folder / shards.INDEX}: the index of another kind of pack; wanted one of pairs")
    with shards.damage_named(folder):
        places = shards.read_places(folder, index)
        rows = shards.read_rows(folder, index, "pairs")
        if not rows or len(rows) != index["pairs"]["rows"]:
            raise DataError(f"{folder}: not as many pairs as were packed; copy or pack the data again")
        return [_pair(row, places) for row in rows]


def _pair(row: dict[str, Any], places: list[tuple[str, PackedImage]]) -> Pair:
    key, image = shards.placed(row["image"], places)
    captions, source = row["captions"], row["source"]
    if (
        not isinstance(captions, list)
        or not captions
        or not all(isinstance(text, str) and text for text in [*captions, source])
    ):
        raise ValueError
    return Pair(image, tuple(captions), key, source)
