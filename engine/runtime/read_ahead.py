"""Images of questions that come next, hashed, decoded and resized by a few threads before they are asked for.

Knows sources of pairs, bounds and threads; does not know how an image is decoded, or what the engine does meanwhile.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from miss.engine.data.images import declared_pixels, read_image
from miss.engine.runtime.image_source import EarlyImage, Found, ImageReader

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(4, CORES)
# At once in all threads, before they are resized: no more than the largest image that is accepted takes alone.
MOST_PIXELS = 1 << 26


class Gate:
    """Lets work in while all of it together is no more than `most`; what is more than that goes in alone."""

    def __init__(self, most: int) -> None:
        self._most, self._inside, self._changed = most, 0, threading.Condition()

    def run(self, size: int, work: Callable[[], np.ndarray]) -> np.ndarray:
        with self._changed:
            self._changed.wait_for(lambda: self._inside == 0 or self._inside + size <= self._most)
            self._inside += size
        try:
            return work()
        finally:
            with self._changed:
                self._inside -= size
                self._changed.notify_all()


class ReadAhead:
    """The pairs of a source in their order, their images read ahead until `close`.

    reader: what makes keys and pixels. known: whether an image of this key needs no pixels. threads: 0 reads nothing.

    What a source raises is raised when its turn comes, and what is wrong with an image by who asks for it. An object
    that hands out an encoded image is asked in the caller's own thread.
    """

    def __init__(
        self,
        source: Iterator[Sequence[Any]],
        reader: ImageReader,
        known: Callable[[bytes], bool],
        threads: int = THREADS,
        most_pixels: int = MOST_PIXELS,
    ) -> None:
        self._source, self._reader, self._known = source, reader, known
        self._read: deque[Sequence[Any]] = deque()
        self._ended: Exception | None = None
        # Its threads come as they are needed.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="miss-read-ahead") if threads else None
        self._gate = Gate(most_pixels)
        self._found: WeakValueDictionary[bytes, Found] = WeakValueDictionary()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Ends the threads: images under way are finished, those that wait are left."""
        self._ended = StopIteration()
        self._read.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, count: int) -> deque[Sequence[Any]]:
        """The next `count` pairs, fewer only at the end of the source.

        Raises:
            what the source raised among them.
        """
        self.fill(count)
        taken = deque(self._read.popleft() for _ in range(min(count, len(self._read))))
        if len(taken) < count and self._ended is not None and not isinstance(self._ended, StopIteration):
            raise self._ended
        return taken

    def fill(self, count: int) -> None:
        """Asks the source until `count` pairs are read, or being read, and not taken."""
        while len(self._read) < count and self._ended is None:
            try:
                image, *rest = next(self._source)
            except Exception as error:  # raised by `take` once the pairs before it are taken
                self._ended = error
                return
            self._read.append((self._early(image), *rest))

    def _early(self, image: Any) -> Any:
        if self._pool is None or isinstance(image, ValueError):
            return image
        found: Future[Found] = Future()
        if isinstance(image, np.ndarray):  # whose owner may go on writing into it
            found = self._pool.submit(self._find, image.copy())
        elif isinstance(image, str | Path | bytes):
            found = self._pool.submit(self._find, image)
        else:
            try:
                found = self._pool.submit(self._find, read_image(image))
            except Exception as error:
                found.set_exception(error)
        return EarlyImage(image, found)

    def _find(self, image: Any) -> Found:
        """In a thread of the pool: of an image that several ask about, one decodes and the others wait for it."""
        key, read = self._reader.key(image)
        with self._lock:
            found = self._found.get(key)
            if found is None:
                found = self._found[key] = Found(key)
        with found.lock:
            if found.pixels is None and not self._known(key):
                size = _size(image if read is None else read)
                found.pixels = self._gate.run(size, lambda: self._reader.pixels(image, read))
        return found


def _size(content: Any) -> int:
    """The pixels that are in memory while an image is decoded; those of an array are there already."""
    return 0 if isinstance(content, np.ndarray) else declared_pixels(content)
