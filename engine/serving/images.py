"""Strangers' images as the model's pixels: decoded in few processes, each with a time and a memory limit.

Knows data: URLs, processes and a cache by content; does not know HTTP, questions or the engine.
"""

import asyncio
import base64
import binascii
import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from miss.engine.data.decoding import HEADER, ONE_THREAD, PIXELS
from miss.engine.data.errors import Reason
from miss.engine.serving.problems import OF_IMAGES, Refused
from miss.engine.serving.settings import Settings

Window = tuple[float, float]


def from_data_url(url: str) -> bytes:
    """The bytes of a data: URL; nothing else is fetched.

    Raises:
        Refused: it is another URL, or not base64.
    """
    head, comma, text = url.partition(",")
    if head[:5].lower() != "data:" or not comma or not head.lower().endswith(";base64"):
        raise Refused("image_url_refused", "image_url")
    return from_base64(text)


def from_base64(text: str) -> bytes:
    """
    Raises:
        Refused: it is not base64, or nothing.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise Refused("image_not_base64", "image_url") from None
    if not data:
        raise Refused("image_empty", "image_url")
    return data


class WorkerEnded(Exception):
    """A decoding process ended, by itself or because its time was over."""


class Worker:
    """One decoding process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, preprocess: dict[str, Any], settings: Settings) -> "Worker":
        given = {
            "preprocess": preprocess,
            "limits": asdict(settings.image_limits),
            "memory": settings.decode_memory,
        }
        command = [sys.executable, "-P", "-m", "miss.engine.serving.image_worker", json.dumps(given)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=environment()
        )
        return cls(process)

    async def decode(self, data: bytes, frame: int | None, window: Window | None) -> tuple[int, bytes]:
        """The kind of answer and its bytes.

        Raises:
            WorkerEnded: the process did.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        line = json.dumps({"bytes": len(data), "frame": frame, "window": window}).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.write(data)
            await self.process.stdin.drain()
            kind, size = HEADER.unpack(await self.process.stdout.readexactly(HEADER.size))
            return kind, await self.process.stdout.readexactly(size)
        except (OSError, asyncio.IncompleteReadError):
            raise WorkerEnded from None

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def environment() -> dict[str, str]:
    """For a child: it imports from where this process does, and its number pools are of one thread."""
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


class ImagePool:
    """`decode` gives pixels uint8 (S, S, 3) as bytes. Equal images that are asked for together are decoded once, and
    the last ones are kept.

    on_end: told "died" or "late" when a process ended.
    """

    def __init__(self, preprocess: dict[str, Any], settings: Settings, on_end: Callable[[str], None]) -> None:
        self.preprocess, self.settings, self._on_end = preprocess, settings, on_end
        self.hits = self.queries = 0
        self._idle: asyncio.Queue[Worker] = asyncio.LifoQueue()
        self._workers: set[Worker] = set()
        self._running: dict[bytes, asyncio.Task[bytes]] = {}
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._kept_bytes = 0

    async def start(self) -> None:
        for _ in range(self.settings.decoders):
            await self._hire()

    async def _hire(self) -> None:
        worker = await Worker.start(self.preprocess, self.settings)
        self._workers.add(worker)
        self._idle.put_nowait(worker)

    async def decode(self, data: bytes, frame: int | None = None, window: Window | None = None) -> bytes:
        """
        Raises:
            Refused: with one of the words of images.
        """
        key = hashlib.sha256(repr((frame, window)).encode() + b"\n" + data).digest()
        self.queries += 1
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(self._decode(key, data, frame, window))
            task.add_done_callback(lambda task: self._done(key, task))
        # Whoever leaves does not end it: others may wait for it too, and its own time limit will.
        return await asyncio.shield(task)

    def _done(self, key: bytes, task: "asyncio.Task[bytes]") -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # looked at: those who waited may all have left

    async def _decode(self, key: bytes, data: bytes, frame: int | None, window: Window | None) -> bytes:
        try:
            kind, answer = await self._ask(data, frame, window)
        except WorkerEnded:  # something else may have ended the process: once more, in a new one
            try:
                kind, answer = await self._ask(data, frame, window)
            except WorkerEnded:
                raise Refused("image_corrupt", "image_url") from None
        if kind == PIXELS:
            self._keep(key, answer)
            return answer
        word = answer.decode()
        raise Refused(OF_IMAGES[Reason(word)] if word in set(Reason) else word, "image_url")

    async def _ask(self, data: bytes, frame: int | None, window: Window | None) -> tuple[int, bytes]:
        worker, whole = await self._idle.get(), False
        try:
            async with asyncio.timeout(self.settings.decode_timeout):
                answer = await worker.decode(data, frame, window)
            whole = True
            return answer
        except TimeoutError:
            self._on_end("late")
            raise Refused("image_too_slow", "image_url") from None
        except WorkerEnded:
            self._on_end("died")
            raise
        finally:
            if whole:
                self._idle.put_nowait(worker)
            else:
                self._workers.discard(worker)
                await worker.kill()
                await self._hire()

    def _keep(self, key: bytes, pixels: bytes) -> None:
        if len(pixels) > self.settings.cache_bytes:
            return
        self._kept[key] = pixels
        self._kept_bytes += len(pixels)
        while self._kept_bytes > self.settings.cache_bytes:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    @property
    def processes(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    async def close(self) -> None:
        for worker in list(self._workers):
            await worker.kill()
