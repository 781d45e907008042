"""miss data check: counts, damaged files, duplicates and leaks of data sets, or of image-text pairs.
miss data pack: data sets, or image-text pairs, decoded, scaled and compressed into a folder that travels.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miss.cli import data_pairs

if TYPE_CHECKING:
    from miss.engine.data.samples import Sample

SHOWN = 20


@dataclass
class CheckArgs:
    """Check data sets: counts, undecodable files, duplicates, images shared by splits, answer lengths.

    Exit code 1 where the data cannot be used as it is: a record or an image that cannot be read, a qid that stands
    twice, an image in two splits. What merely looks alike is a warning.
    """

    datasets: str = ""
    """Comma-separated: slake, vqa-rad, vqa-med-2019, jsonl, packed. Default: all that the folder holds."""
    data: Path | None = None
    """The folder of the data sets, one data set's own folder, or a JSON lines file. Default: $MISS_DATA. With --pairs:
    the data sets whose validation and test images must not be among the pairs. Default: none."""
    pairs: tuple[Path, ...] = ()
    """Check image-text pairs instead: .jsonl, .csv, or folders that `miss data pack --pairs` wrote."""
    images: Path | None = None
    """With --pairs: the folder that image names are relative to. Default: each file's own."""
    names: Path | None = None
    """With --pairs and a .csv: a text file of the image names to take, one a line."""
    language: str = "en"
    """SLAKE's language: en, zh or all."""
    perceptual: bool = True
    """Also find images that look alike, not only those with equal pixels."""
    json: bool = False
    """Print everything as one JSON object."""


def check(args: CheckArgs) -> int:
    _check_pair_flags(args)
    if args.pairs:
        report = data_pairs.check(args.pairs, args.images, args.names, args.data, args.language)
    else:
        from miss.engine.data.check import check as check_data
        from miss.engine.data.datasets import detect, resolve_data_root

        base = resolve_data_root(args.data)
        names = _names(args.datasets) or detect(base)
        report = check_data(names, base, args.language, args.perceptual, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        (data_pairs.show if args.pairs else _show)(report.facts)
        for title, lines in (("warning", report.warnings), ("error", report.errors)):
            for line in lines[:SHOWN]:
                print(f"{title}: {line}")
            if len(lines) > SHOWN:
                print(f"{title}: and {len(lines) - SHOWN} more; --json has all of them")
        print(f"{len(report.errors)} errors, {len(report.warnings)} warnings")
    return 1 if report.errors else 0


@dataclass
class PackArgs:
    """Pack data sets into one folder: images scaled and compressed in tar shards, samples beside them.

    Read it with any of the packed names: --dataset slake --data DIR, or --dataset packed for all. With --pairs: the
    image-text pairs of some files, for pretraining.
    """

    out: Path
    """The folder to write: new, empty, or an older pack."""
    datasets: str = "slake,vqa-rad,vqa-med-2019"
    """Comma-separated: slake, vqa-rad, vqa-med-2019, jsonl."""
    data: Path | None = None
    """The folder of the data sets. Default: $MISS_DATA."""
    splits: str = "train,validate"
    """Comma-separated: train, validate, test."""
    language: str = "all"
    """SLAKE's language: en, zh or all."""
    image_size: int = 256
    """No side becomes longer than this, in pixels."""
    resample: str = "bicubic"
    """bilinear or bicubic: as the checkpoint's preprocessing."""
    quality: int = 84
    """WebP quality, 0 to 100."""
    lossless: bool = False
    """WebP without loss: about three times the size."""
    pairs: tuple[Path, ...] = ()
    """Pack image-text pairs instead: .jsonl, .csv, or packed folders."""
    images: Path | None = None
    """With --pairs: the folder that image names are relative to. Default: each file's own."""
    names: Path | None = None
    """With --pairs and a .csv: a text file of the image names to take, one a line."""
    skip_corrupt: bool = False
    """With --pairs: leave out images that cannot be decoded, and say which, instead of stopping."""
    json: bool = False
    """Print what was written as one JSON object."""


def pack(args: PackArgs) -> int:
    from miss.engine.data.datasets import load_dataset, resolve_data_root
    from miss.engine.data.pack import PackOptions
    from miss.engine.data.pack import pack as pack_data

    _check_pair_flags(args)
    start = time.perf_counter()
    options = PackOptions(args.image_size, args.resample, args.quality, args.lossless)
    if args.pairs:
        data_pairs.pack(args.pairs, args.images, args.names, args.out, options, args.skip_corrupt, args.json)
        return 0
    base = resolve_data_root(args.data)
    splits: dict[tuple[str, str], list[Sample]] = {}
    for name in _names(args.datasets):
        for split in _names(args.splits):
            splits[(name, split)] = load_dataset(name, base, split, args.language)
    if not splits:
        raise ValueError("--datasets and --splits: got nothing; name at least one of each")
    report = pack_data(splits, args.out, options, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - start
    if args.json:
        print(json.dumps({**vars(report), "out": str(args.out), "seconds": round(seconds, 1)}))
    else:
        print(
            f"{report.num_samples:,} samples, {report.num_images:,} images, {report.num_shards} shards, "
            f"{report.num_bytes / 1e6:.1f} MB, {seconds:.0f} s: {args.out}"
        )
    return 0


def _check_pair_flags(args: CheckArgs | PackArgs) -> None:
    given = [name for name in ("images", "names", "skip_corrupt") if getattr(args, name, None)]
    if given and not args.pairs:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --pairs FILE; got no pairs")


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _show(facts: dict[str, Any]) -> None:
    for s in facts["splits"]:
        languages = " ".join(f"{k} {v}" for k, v in s["languages"].items())
        print(
            f"{s['dataset']} {s['split']}: {s['samples']:,} samples of {s['images']:,} images; {s['open']:,} open, "
            f"{s['closed']:,} closed, {s['untyped']:,} untyped; {s['distinct_answers']:,} distinct answers; {languages}"
        )
        lengths = "  ".join(f"{words}: {count}" for words, count in list(s["answer_words"].items())[:12])
        print(f"  answers by words  {lengths}" + ("  …" if len(s["answer_words"]) > 12 else ""))
    kinds = ("same", "exact", "copy", "near")
    shared = ", ".join(f"{sum(p['kind'] == k for p in facts['shared_by_splits'])} {k}" for k in kinds)
    print(f"images: {facts['images']:,}, of which {len(facts['undecodable'])} cannot be decoded")
    print(f"pairs shared by splits of a data set: {shared}")
    print(f"other pairs: {len(facts['duplicates'])} equal or all but equal, {len(facts['near_duplicates'])} alike")


COMMANDS = {"check": (CheckArgs, check), "pack": (PackArgs, pack)}
