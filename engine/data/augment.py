"""Light augmentation of square uint8 images: rotation, crop, brightness, contrast, as a pure function of numbers.

Knows pixels and hashes; does not know data sets or models. Never a flip: left and right are findings in medicine.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

_MASK = 0xFFFFFFFFFFFFFFFF


def hash64(*numbers: int) -> int:
    """64 well mixed bits of some integers, the same on every machine and version (splitmix64's finaliser, chained)."""
    z = 0
    for number in numbers:
        z = (z ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
        z ^= z >> 31
    return z


def hash64_each(last: np.ndarray, *numbers: int) -> np.ndarray:
    """`hash64(*numbers, n)` of every n in `last`, as uint64."""
    z = np.uint64(hash64(*numbers)) ^ last.astype(np.uint64)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(*numbers: int) -> float:
    """A number in [0, 1) that depends on the integers alone."""
    return (hash64(*numbers) >> 11) / (1 << 53)


@dataclass(frozen=True)
class Limits:
    """How far an augmentation may go: degrees, least share of the area that is kept, shares of brightness, contrast."""

    rotate_degrees: float
    crop_share: float
    brightness: float
    contrast: float


@dataclass(frozen=True)
class View:
    """One augmentation: `side` is the crop's side and `left`, `top` its corner, all in shares of the image's side."""

    degrees: float = 0.0
    side: float = 1.0
    left: float = 0.0
    top: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0


def draw_view(limits: Limits, *key: int) -> View:
    """The view that belongs to a key, for example (seed, image, visit)."""
    u = [uniform(*key, i) for i in range(6)]
    side = math.sqrt(limits.crop_share + (1 - limits.crop_share) * u[0])
    return View(
        degrees=limits.rotate_degrees * (2 * u[1] - 1),
        side=side,
        left=(1 - side) * u[2],
        top=(1 - side) * u[3],
        brightness=1 + limits.brightness * (2 * u[4] - 1),
        contrast=1 + limits.contrast * (2 * u[5] - 1),
    )


def augment(pixels: np.ndarray, view: View, background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """A view of an image: uint8 (S, S, 3) -> uint8 (S, S, 3); corners that rotation uncovers get the background.

    Rotation about the centre and the crop are one bicubic resampling; then brightness (a factor), then contrast
    (distances to the mean grey).
    """
    size = pixels.shape[0]
    angle = math.radians(view.degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    # Output pixel (x, y) is read from: the crop's corner + side * (x, y), turned about the image's centre.
    x0, y0, half = view.left * size, view.top * size, size / 2
    a, b = view.side * cos, view.side * sin
    c = half + (x0 - half) * cos + (y0 - half) * sin
    d, e = -view.side * sin, view.side * cos
    f = half - (x0 - half) * sin + (y0 - half) * cos
    image = Image.fromarray(pixels)
    if (view.degrees, view.side) != (0.0, 1.0):
        image = image.transform(
            image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC, fillcolor=background
        )
    if (view.brightness, view.contrast) == (1.0, 1.0):
        return np.asarray(image)
    values = np.asarray(image, dtype=np.float32) * view.brightness
    grey = values.mean()
    return np.clip(np.rint((values - grey) * view.contrast + grey), 0, 255).astype(np.uint8)
