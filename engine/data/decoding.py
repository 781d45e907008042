"""Decodes one image into the square that a model takes, here or in a process beside, and says which process died.

Knows images, views and processes; does not know pairs, steps or what the pixels are for.

A process is sent one line of JSON an image, and answers with one byte (pixels or a refusal), a length, and that many
bytes. It ends when its input does, so that it never outlives the program that started it, however that ends.
"""

import json
import os
import queue
import select
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from miss.engine.data.augment import View, augment
from miss.engine.data.errors import ImageError, Reason
from miss.engine.data.images import decode_image
from miss.engine.data.processor import stretch
from miss.engine.data.shards import PackedImage
from miss.models.config import PreprocessConfig

PIXELS, REFUSED, MISTAKE = 0, 1, 2
HEADER = struct.Struct("<BI")
TIMEOUT = 120.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # NumPy's pools: nothing here multiplies


class WorkerDied(ValueError):
    """A decoding process ended, or does not answer; the message names it."""


class Decoder(Protocol):
    """Gives an image's pixels, uint8 (S, S, 3)."""

    def decode(self, image: Path | PackedImage, view: View) -> np.ndarray: ...

    def close(self) -> None: ...


def decode_view(image: Path | PackedImage, view: View, preprocess: PreprocessConfig) -> np.ndarray:
    """A view of an image, as finetuning makes it: decoded, stretched to the model's square, augmented.

    Raises:
        ImageError: it cannot be decoded.
    """
    square = stretch(decode_image(image), preprocess)
    return square if view == View() else augment(square, view, preprocess.background)


class Here:
    """Decodes in the thread that asks."""

    def __init__(self, preprocess: PreprocessConfig) -> None:
        self.preprocess = preprocess

    def decode(self, image: Path | PackedImage, view: View) -> np.ndarray:
        return decode_view(image, view, self.preprocess)

    def close(self) -> None:
        """Nothing is held."""


class Processes:
    """Decodes in processes of its own; as many threads as there are processes may ask at a time."""

    def __init__(self, preprocess: PreprocessConfig, count: int, timeout: float = TIMEOUT) -> None:
        self.workers = [Worker(number, preprocess, timeout) for number in range(count)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)

    def decode(self, image: Path | PackedImage, view: View) -> np.ndarray:
        worker = self._idle.get()
        try:
            return worker.decode(image, view)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends them at once; whoever still waits for an image gets `WorkerDied`."""
        for worker in self.workers:
            worker.process.kill()
        for worker in [self._idle.get() for _ in self.workers]:  # none is in use any more
            worker.close()
            self._idle.put(worker)


class Worker:
    """One decoding process."""

    def __init__(self, number: int, preprocess: PreprocessConfig, timeout: float) -> None:
        self.number, self.timeout = number, timeout
        size = preprocess.image_size
        self._shape = (size, size, 3)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "miss.engine.data.decode_worker", json.dumps(asdict(preprocess))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )

    def decode(self, image: Path | PackedImage, view: View) -> np.ndarray:
        """As `decode_view`.

        Raises:
            WorkerDied: the process has ended, or took longer than the timeout.
        """
        assert self.process.stdin is not None
        line = json.dumps({"image": _as_json(image), "view": asdict(view)}).encode() + b"\n"
        deadline = time.monotonic() + self.timeout
        try:
            self.process.stdin.write(line)
        except (OSError, ValueError):  # a broken pipe; a pipe that was closed here
            raise self._died() from None
        kind, size = HEADER.unpack(self._read(HEADER.size, deadline))
        data = self._read(size, deadline)
        if kind == PIXELS:
            return np.frombuffer(data, np.uint8).reshape(self._shape)
        refusal = json.loads(bytes(data))
        raise ImageError(Reason(refusal["reason"]), refusal["message"])

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self.process.stdout is not None
        data, at = bytearray(size), 0
        while at < size:
            try:
                ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
                count = os.readv(self.process.stdout.fileno(), [memoryview(data)[at:]]) if ready else None
            except (OSError, ValueError):  # closed here
                raise self._died() from None
            if count is None:
                self.process.kill()
                raise WorkerDied(f"{self}: no answer for {self.timeout:.0f} s, stopped; look at the image it was given")
            if count == 0:
                raise self._died()
            at += count
        return data

    def _died(self) -> WorkerDied:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        how = (
            "closed its pipe" if code is None else f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        )
        hint = "; out of memory? take fewer workers" if code == -9 else ""
        return WorkerDied(f"{self} {how}{hint}. The run's last checkpoint can be gone on from")

    def __str__(self) -> str:
        return f"decoding worker {self.number} (process {self.process.pid})"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _as_json(image: Path | PackedImage) -> Any:
    if isinstance(image, PackedImage):
        return {**asdict(image), "shard": str(image.shard)}
    return str(image)
