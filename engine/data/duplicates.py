"""Which images are the same picture, or its neighbour in a series: by content, and to the eye.

Knows pixels; does not know data sets or splits.

A picture's fingerprint is a 64-bit perceptual hash (the signs of the low frequencies of a 32 x 32 grey thumbnail
about their median) and that thumbnail. Pictures of one body part have hashes that are close, so a pair counts only if
hash and thumbnail both agree. Measured on VQA-Med-2019 against VQA-RAD: the 38 images that the publisher marks as
being in both, scaled and compressed anew, have at most 4 differing bits and a correlation of at least 0.998; the 15
further pairs up to 16 bits and 0.95 are all neighbouring slices of one patient.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 32
HASH_SIDE = 8
MAX_DISTANCE = 16
MIN_CORRELATION = 0.95
COPY_DISTANCE, COPY_CORRELATION = 6, 0.995


def _cosines() -> np.ndarray:
    """The first 8 rows, without the constant one, of the 32-point DCT-II: (8, 32)."""
    k, n = np.arange(1, HASH_SIDE + 1)[:, None], np.arange(SIDE)[None, :]
    return np.cos(np.pi * (2 * n + 1) * k / (2 * SIDE))


_COSINES = _cosines()


@dataclass(frozen=True)
class Fingerprint:
    """`digest`: SHA-256 of the decoded pixels. `bits` (64,): the hash as +1 and -1. `thumbnail` (1024,): grey, of mean
    0 and length 1 (all 0 where the picture is of one grey)."""

    digest: str
    bits: np.ndarray
    thumbnail: np.ndarray


def fingerprint(pixels: np.ndarray) -> Fingerprint:
    """The fingerprint of decoded pixels, uint8 (H, W, 3)."""
    digest = hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.float32)
    waves = _COSINES @ values @ _COSINES.T
    bits = np.where(waves > np.median(waves), 1, -1).astype(np.int8).ravel()
    flat = values.ravel() - values.mean()
    length = float(np.linalg.norm(flat))
    return Fingerprint(digest, bits, (flat / length if length > 0 else flat * 0).astype(np.float32))


@dataclass(frozen=True)
class Match:
    """Two images that look alike: indices into the two lists, differing bits of 64, correlation of the thumbnails.

    `exact`: their pixels are equal.
    """

    a: int
    b: int
    distance: int
    correlation: float
    exact: bool

    @property
    def kind(self) -> str:
        """exact, copy (scaled or compressed anew, or all but that) or near (a neighbouring slice, say)."""
        is_copy = self.distance <= COPY_DISTANCE and self.correlation >= COPY_CORRELATION
        return "exact" if self.exact else "copy" if is_copy else "near"


def near_duplicates(
    images_a: Sequence[Fingerprint | np.ndarray],
    images_b: Sequence[Fingerprint | np.ndarray] | None = None,
    max_distance: int = MAX_DISTANCE,
    min_correlation: float = MIN_CORRELATION,
) -> list[Match]:
    """Pairs of images of two lists (or of one, each pair once) that show the same picture or nearly so.

    Args:
        images_a, images_b: fingerprints, or decoded pixels uint8 (H, W, 3).
        max_distance: of 64 bits, how many may differ.
        min_correlation: of the two 32 x 32 thumbnails, at least.
    """
    a = [_as_fingerprint(image) for image in images_a]
    b = a if images_b is None else [_as_fingerprint(image) for image in images_b]
    if not a or not b:
        return []
    bits_b = np.stack([f.bits for f in b]).astype(np.float32)
    small_b = np.stack([f.thumbnail for f in b])
    found = []
    for start in range(0, len(a), 512):  # in blocks: thousands of images against thousands
        block = a[start : start + 512]
        distance = (64 - np.stack([f.bits for f in block]).astype(np.float32) @ bits_b.T) / 2
        alike = np.stack([f.thumbnail for f in block]) @ small_b.T
        for i, j in zip(*np.nonzero((distance <= max_distance) & (alike >= min_correlation)), strict=True):
            exact = block[i].digest == b[j].digest
            found.append(Match(start + int(i), int(j), int(distance[i, j]), float(alike[i, j]), exact))
        found += _flat_and_equal(block, b, start)
    if images_b is None:
        found = [m for m in found if m.a < m.b]
    return sorted(found, key=lambda m: (m.a, m.b))


def _flat_and_equal(block: Sequence[Fingerprint], b: Sequence[Fingerprint], start: int) -> list[Match]:
    """Pictures of one grey have nothing to correlate: they match only where their pixels are equal."""
    flat: dict[str, list[int]] = {}
    for j, image in enumerate(b):
        if not image.thumbnail.any():
            flat.setdefault(image.digest, []).append(j)
    return [
        Match(start + i, j, 0, 1.0, True)
        for i, image in enumerate(block)
        if not image.thumbnail.any()
        for j in flat.get(image.digest, [])
    ]


def _as_fingerprint(image: Fingerprint | np.ndarray) -> Fingerprint:
    return image if isinstance(image, Fingerprint) else fingerprint(image)
