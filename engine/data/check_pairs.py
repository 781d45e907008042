"""Looks image-text pairs over before a model is pretrained on them: what is there, what cannot be used, what is equal.

Knows pairs, decoding and fingerprints of images; does not know models or how a report is shown.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miss.engine.data.check import Report, split_undecodable
from miss.engine.data.leaks import exclude_held_out, fingerprints_of
from miss.engine.data.pairs import Pair, images_of, normalise_caption, scan_pairs
from miss.engine.data.samples import Sample

SHOWN_CAPTIONS = 10


def check_pairs(
    paths: Sequence[Path],
    images: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | None = None,
    held_out: Sequence[Sample] = (),
    progress: bool = False,
) -> Report:
    """Checks files of pairs, or packed folders, together.

    Args:
        images, names: as for `load_pairs`.
        held_out: samples whose images must not be among the pairs.
        progress: whether a progress bar is shown.

    Raises:
        DataError: a file is missing, or holds no record; two images have one key.
    """
    pairs: list[Pair] = []
    errors: list[str] = []
    files = []
    for path in paths:
        found, problems = scan_pairs(path, images, names)
        files.append({"file": str(path), **_counts(found), "malformed": len(problems)})
        pairs += found
        errors += [str(problem) for problem in problems]
    fingerprints = fingerprints_of(images_of(pairs), "images" if progress else "")
    prints, undecodable = split_undecodable(fingerprints)
    equal_images: dict[str, list[str]] = {}
    for key, value in prints.items():
        equal_images.setdefault(value.digest, []).append(key)
    groups = [keys for keys in equal_images.values() if len(keys) > 1]
    leaks = exclude_held_out(pairs, held_out, progress=progress, known=fingerprints)[1].leaks if held_out else []
    facts = {
        "files": files,
        **_counts(pairs),
        **_captions(pairs),
        "undecodable": undecodable,
        "equal_images": groups,
        "held_out": [vars(leak) for leak in leaks],
    }
    errors += [f"{u['image']}: {u['message']}" for u in undecodable]
    errors += [f"{leak.image_key} is held out: {leak.like} ({leak.kind})" for leak in leaks if leak.kind != "near"]
    return Report(facts, errors, _warnings(facts))


def _counts(pairs: Sequence[Pair]) -> dict[str, int]:
    return {
        "pairs": len(pairs),
        "images": len({pair.key for pair in pairs}),
        "captions": sum(len(pair.captions) for pair in pairs),
    }


def _captions(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How captions repeat and how long they are. Equal: but for capitals, white space and closing punctuation."""
    shown = {normalise_caption(text): text for pair in reversed(pairs) for text in reversed(pair.captions)}
    beside = {(pair.key, normalise_caption(text)) for pair in pairs for text in pair.captions}
    images = Counter(text for _, text in beside)
    words = Counter(len(text.split()) for pair in pairs for text in pair.captions)
    sharing = sum(any(images[normalise_caption(text)] > 1 for text in pair.captions) for pair in pairs)
    common = sorted(images.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_CAPTIONS]
    return {
        "distinct_captions": len(images),
        "pairs_with_another_s_caption": sharing,
        "most_common": [{"caption": shown[text], "images": n} for text, n in common if n > 1],
        "caption_words": {str(n): words[n] for n in sorted(words)},
        "longest_caption_characters": max((len(text) for pair in pairs for text in pair.captions), default=0),
    }


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = []
    if facts["pairs_with_another_s_caption"]:
        found.append(
            f"{facts['pairs_with_another_s_caption']:,} of {facts['pairs']:,} pairs have a caption that another image "
            f"has, too: equal captions are never negatives, but teach less"
        )
    if facts["equal_images"]:
        found.append(f"{len(facts['equal_images'])} images stand under more than one name, with equal pixels")
    if near := sum(leak["kind"] == "near" for leak in facts["held_out"]):
        found.append(f"{near} images look like held-out ones, as neighbours in a series do")
    return found
