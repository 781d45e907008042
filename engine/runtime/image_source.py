"""What callers hand in as an image: its key by content, and its pixels as the model takes them.

Knows files, bytes and the processor; does not know models, caches or requests.
"""

import hashlib
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from miss.engine.data.images import ImageSource, decode_image, read_image
from miss.engine.data.processor import Processor

Image = str | Path | bytes | np.ndarray | ImageSource
"""A path, encoded bytes, decoded pixels uint8 (H, W, 3), or an entry of a packed data set."""


@dataclass(eq=False)
class Found:
    """An image's key, and its pixels where they were wanted. lock: held by who makes them."""

    key: bytes
    pixels: np.ndarray | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class EarlyImage:
    """An image whose key and pixels another thread finds (`read_ahead.py`)."""

    def __init__(self, image: Image, found: "Future[Found]") -> None:
        self.image, self._found = image, found

    def found(self) -> Found:
        """Waits for it; what was wrong with the image is raised here, however often it is asked."""
        return self._found.result()


class PixelsWanted(ValueError):
    """An image that came by its name alone is not kept; it is to be sent again with its pixels."""


@dataclass(frozen=True)
class NamedImage:
    """Pixels as the model takes them, uint8 (S, S, 3), under a name that stands for their content; without them an
    image that was given before."""

    name: bytes
    pixels: np.ndarray | None = None


_SETTLED_NS = 2_000_000_000  # a file written later may still change within one tick of its clock
_MOST_PATHS = 4096


class ImageReader:
    """Keys and pixels of images; of a path's file the key is remembered while its time, size and inode stay.

    `stamp`: what else decides an image's tokens: the weights.
    """

    def __init__(self, processor: Processor, stamp: str) -> None:
        self.processor = processor
        self._prefix = hashlib.sha256(f"{processor.fingerprint}\n{stamp}\n".encode())
        self._known: dict[str, tuple[tuple[int, int, int], bytes]] = {}
        self._lock = threading.Lock()

    def key(self, image: Image | EarlyImage | NamedImage) -> tuple[bytes, bytes | np.ndarray | Found | None]:
        """SHA-256 over content, preprocessing and weights; and what was read on the way, for `pixels`.

        Raises:
            ValueError: there is no such file, or the pixels are not uint8 (H, W, 3).
        """
        if isinstance(image, EarlyImage):
            found = image.found()
            return found.key, found
        if isinstance(image, NamedImage):
            return self._hash(b"name\n", image.name), image.pixels
        if isinstance(image, np.ndarray):
            _check(image)
            return self._hash(repr(image.shape).encode() + b"\n", np.ascontiguousarray(image).data), image
        if not isinstance(image, str | Path):
            data = read_image(image)
            return self._hash(b"file\n", data), data
        path, state = os.fspath(image), _state(image)
        with self._lock:
            known = self._known.get(path)
        if known is not None and known[0] == state:
            return known[1], None
        data = read_image(image)
        key = self._hash(b"file\n", data)
        if state is not None and time.time_ns() - state[0] > _SETTLED_NS and _state(image) == state:
            self._remember(path, state, key)
        return key, data

    def pixels(self, image: Image | EarlyImage | NamedImage, read: bytes | np.ndarray | Found | None) -> np.ndarray:
        """uint8 (S, S, 3), from what `key` has read where it has.

        Raises:
            ImageError: the image cannot be decoded.
            PixelsWanted: it is a name without pixels.
        """
        if isinstance(image, NamedImage):
            if image.pixels is None:
                raise PixelsWanted("this image is not kept; send its pixels, too")
            return image.pixels
        if isinstance(image, EarlyImage):
            assert isinstance(read, Found), "`key` gave it"
            return self.pixels(image.image, None) if read.pixels is None else read.pixels
        source = image if read is None else read
        assert not isinstance(source, Found), "an image that was read early comes with what was found"
        return self.processor.image(source if isinstance(source, np.ndarray) else decode_image(source))

    def _hash(self, kind: bytes, data: bytes | memoryview) -> bytes:
        found = self._prefix.copy()
        found.update(kind)
        found.update(data)
        return found.digest()

    def _remember(self, path: str, state: tuple[int, int, int], key: bytes) -> None:
        with self._lock:
            if len(self._known) >= _MOST_PATHS:
                self._known.clear()
            self._known[path] = (state, key)


def _state(path: str | Path) -> tuple[int, int, int] | None:
    """What changes when a file does: its time in nanoseconds, size and inode; None where it cannot be asked."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # `read_image` says it in its own words
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"decoded pixels: got {image.dtype} {image.shape}; wanted uint8 (height, width, 3)")
