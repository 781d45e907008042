"""Keeps images that are evaluated on out of training: the same, copies of them, and neighbours from the same series.

Knows samples and fingerprints of images; does not know what is trained.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from miss.engine.data.duplicates import Fingerprint, fingerprint, near_duplicates
from miss.engine.data.errors import ImageError
from miss.engine.data.images import decode_image
from miss.engine.data.pairs import Pair, images_of
from miss.engine.data.samples import Sample

_ORDER = ("exact", "copy", "near")


def _fingerprint(image: Any) -> Fingerprint:
    return fingerprint(decode_image(image))


_remembered = functools.lru_cache(maxsize=1 << 14)(_fingerprint)


@dataclass(frozen=True)
class Leak:
    """A training image that was left out: `kind` is marked (by the publisher), same, exact, copy or near."""

    image_key: str
    like: str
    kind: str
    num_samples: int


@dataclass(frozen=True)
class LeakReport:
    """What `exclude_leaks` left out."""

    num_samples: int
    num_kept: int
    leaks: list[Leak] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = sorted({leak.kind for leak in self.leaks})
        counts = ", ".join(f"{sum(leak.kind == k for leak in self.leaks)} {k}" for k in kinds)
        return f"{self.num_samples - self.num_kept} of {self.num_samples} samples left out ({counts or 'no'} images)"


def exclude_leaks(
    train: Sequence[Sample], held_out: Sequence[Sample], kin: Sequence[Sample] = ()
) -> tuple[list[Sample], LeakReport]:
    """The training samples whose images are not held out, and what was left out.

    Left out are images that the publisher marks as being in a held-out data set, that have a held-out image's key or
    pixels, or, across data sets, that look like one. Within a data set the publisher's split stands where images
    differ: SLAKE's has 82 training images that are neighbours of validation images.

    Args:
        train: what would be trained on.
        held_out: what will be evaluated on.
        kin: further samples of held-out data sets, whose images only other data sets must avoid: VQA-RAD's official
            test asks about its training images, too.

    Raises:
        ImageError: an image cannot be decoded.
    """
    if not held_out:
        return list(train), LeakReport(len(train), len(train))
    leaks = _marked(train, held_out) | _same_key(train, held_out)
    leaks |= _alike([s for s in train if s.image_key not in leaks], [*held_out, *kin], {s.image_key for s in held_out})
    kept = [s for s in train if s.image_key not in leaks]
    report = []
    for key, (like, kind) in leaks.items():
        report.append(Leak(key, like, kind, sum(s.image_key == key for s in train)))
    return kept, LeakReport(len(train), len(kept), sorted(report, key=lambda leak: leak.image_key))


def exclude_held_out(
    pairs: Sequence[Pair],
    held_out: Sequence[Sample],
    kinds: Sequence[str] = ("exact", "copy", "near"),
    progress: bool = False,
    known: Mapping[str, Fingerprint | ImageError] | None = None,
) -> tuple[list[Pair], LeakReport]:
    """The pairs whose images are not held out, told by content alone, and what was left out.

    A pair whose image cannot be decoded is kept: training sets it aside.

    Args:
        pairs: what would be pretrained on.
        held_out: what will be evaluated on: every validation split.
        kinds: exact (equal pixels), copy (scaled or compressed anew), near (a neighbouring slice, say).
        progress: whether progress bars are shown.
        known: the fingerprints of the pairs' images by key, where they are already there.

    Raises:
        DataError: two images of the pairs have one key.
        ImageError: a held-out image cannot be decoded.
    """
    others = fingerprints(held_out, "held-out images" if progress else "")
    if known is None:
        known = fingerprints_of(images_of(pairs), "pairs' images" if progress else "")
    prints = {key: value for key, value in known.items() if not isinstance(value, ImageError)}
    keys, other_keys = list(prints), list(others)
    found: dict[str, tuple[str, str]] = {}
    for match in near_duplicates(list(prints.values()), list(others.values())):
        before = found.get(keys[match.a])
        if match.kind in kinds and (before is None or _ORDER.index(match.kind) < _ORDER.index(before[1])):
            found[keys[match.a]] = (other_keys[match.b], match.kind)
    counts = Counter(pair.key for pair in pairs)
    leaks = [Leak(key, like, kind, counts[key]) for key, (like, kind) in sorted(found.items())]
    kept = [pair for pair in pairs if pair.key not in found]
    return kept, LeakReport(len(pairs), len(kept), leaks)


def _marked(train: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, tuple[str, str]]:
    names = {s.dataset for s in held_out}
    return {s.image_key: (name, "marked") for s in train for name in s.also_in if name in names}


def _same_key(train: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, tuple[str, str]]:
    held = {s.image_key for s in held_out}
    return {s.image_key: (s.image_key, "same") for s in train if s.image_key in held}


def _alike(train: Sequence[Sample], avoided: Sequence[Sample], held: set[str]) -> dict[str, tuple[str, str]]:
    prints, others = fingerprints(train), fingerprints(avoided)
    keys, other_keys = list(prints), list(others)
    sets = {s.image_key: s.dataset for s in (*train, *avoided)}
    found: dict[str, tuple[str, str]] = {}
    for match in near_duplicates(list(prints.values()), list(others.values())):
        key, like = keys[match.a], other_keys[match.b]
        across = sets[key] != sets[like]
        if key not in found and (across or (match.exact and like in held)):
            found[key] = (like, match.kind)
    return found


def fingerprints(samples: Iterable[Sample], progress: str = "") -> dict[str, Fingerprint]:
    """The fingerprint of each image, by its key, decoded on all cores; `progress` names a progress bar.

    Raises:
        ImageError: an image cannot be decoded.
    """
    found = fingerprints_of({s.image_key: s.image for s in samples}, progress, _remembered)
    for value in found.values():
        if isinstance(value, ImageError):
            raise value
    return {key: value for key, value in found.items() if not isinstance(value, ImageError)}


def fingerprints_of(
    images: Mapping[str, Any], progress: str = "", read: Callable[[Any], Fingerprint] = _fingerprint
) -> dict[str, Fingerprint | ImageError]:
    """The fingerprint of each image, or why it has none, by its key."""

    def one(image: Any) -> Fingerprint | ImageError:
        try:
            return read(image)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results: Iterable[Fingerprint | ImageError] = pool.map(one, images.values())
        if progress:
            from tqdm import tqdm

            results = tqdm(results, total=len(images), desc=progress, unit="image", leave=False)
        return dict(zip(images, results, strict=True))
