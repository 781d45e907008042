"""What `miss data check` and `miss data pack` do with image-text pairs."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miss.engine.data.check import Report
    from miss.engine.data.shards import PackOptions

SHOWN_WORDS = 24


def check(paths: Sequence[Path], images: Path | None, names: Path | None, data: Path | None, language: str) -> "Report":
    """`data`: the folder of data sets whose validation and test images must not be among the pairs; `language`: of
    SLAKE's, whose Chinese validation is another."""
    from miss.engine.data.check import read_splits
    from miss.engine.data.check_pairs import check_pairs
    from miss.engine.data.datasets import detect

    held_out = []
    if data is not None:
        splits, problems = read_splits(detect(data), data, language)
        if problems:
            raise problems[0]
        held_out = [sample for (_, split), rows in splits.items() if split != "train" for sample in rows]
        if not held_out:
            raise ValueError(f"--data {data}: holds no validation or test split to keep out of the pairs")
    return check_pairs(paths, images, names, held_out, progress=sys.stderr.isatty())


def show(facts: dict[str, Any]) -> None:
    for file in facts["files"]:
        print(
            f"{file['file']}: {file['pairs']:,} pairs, {file['images']:,} images, {file['captions']:,} captions, "
            f"{file['malformed']:,} malformed records"
        )
    print(f"images: {facts['images']:,}, of which {len(facts['undecodable'])} cannot be decoded")
    print(f"captions: {facts['captions']:,}, {facts['distinct_captions']:,} distinct")
    for row in facts["most_common"]:
        print(f"  {row['images']:>7,} images: {row['caption'][:100]}")
    words = list(facts["caption_words"].items())
    more = "  …" if len(words) > SHOWN_WORDS else ""
    print("  by words  " + "  ".join(f"{n}: {count}" for n, count in words[:SHOWN_WORDS]) + more)


def pack(
    paths: Sequence[Path],
    images: Path | None,
    names: Path | None,
    out: Path,
    options: "PackOptions",
    skip_corrupt: bool,
    as_json: bool,
) -> None:
    from miss.engine.data.pack_pairs import pack_pairs
    from miss.engine.data.pairs import load_pairs

    start = time.perf_counter()
    pairs = [pair for path in paths for pair in load_pairs(path, images, names)]
    report = pack_pairs(pairs, out, options, sys.stderr.isatty(), skip_corrupt=skip_corrupt)
    seconds = time.perf_counter() - start
    if as_json:
        print(json.dumps({**vars(report), "out": str(out), "seconds": round(seconds, 1)}, ensure_ascii=False))
        return
    for line in report.left_out:
        print(f"left out: {line}")
    print(
        f"{report.num_pairs:,} pairs, {report.num_captions:,} captions, {report.num_images:,} images, "
        f"{report.num_shards} shards, {report.num_bytes / 1e6:.1f} MB, {seconds:.0f} s: {out}"
        + (f"; {len(report.left_out):,} images left out" if report.left_out else "")
    )
