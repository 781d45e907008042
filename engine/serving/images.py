"""Strangers' images as the model's pixels: decoded in few processes, each with a time and a memory limit.

Knows data: URLs, processes and a cache by content; does not know HTTP, questions or the engine.
"""

import asyncio
import binascii
import hashlib
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pybase64

from miss.engine.data.decoding import HEADER, MISTAKE, ONE_THREAD, PIXELS
from miss.engine.data.errors import Reason
from miss.engine.serving.logs import event
from miss.engine.serving.problems import OF_IMAGES, Refused
from miss.engine.serving.settings import Settings

Window = tuple[float, float]
BURNED_IN = "the file says that text is burned into its pixels, which may name a patient"
KEYS = frozenset({"MISS_API_KEY", "RAY_AUTH_TOKEN"})


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
        data = pybase64.b64decode(text, validate=True)  # of 80 KB 0.02 ms, with the standard library's 0.3
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise Refused("image_not_base64", "image_url") from None
    if not data:
        raise Refused("image_empty", "image_url")
    return data


class Decoded(NamedTuple):
    """pixels: uint8 (S, S, 3). notes: warnings about what the file says of itself. name: in hexadecimal, of these
    pixels and no others."""

    pixels: bytes
    notes: list[str]
    name: str


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
            *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=environment(), limit=1 << 20
        )
        return cls(process)

    async def ask(self, data: bytes, asked: dict[str, Any]) -> tuple[int, bytes]:
        """The kind of answer and its bytes.

        Raises:
            WorkerEnded: the process did.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        line = json.dumps({"bytes": len(data), **asked}).encode() + b"\n"
        try:
            if self.process.stdin.is_closing():  # a write would be an error with uvloop
                raise WorkerEnded
            self.process.stdin.writelines([line, data])
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
    """For a child: it imports from where this process does, its number pools are of one thread, and it has no key."""
    own = {name: value for name, value in os.environ.items() if name not in KEYS}
    return {**own, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


@dataclass
class Decoding:
    """An image on its way. num_waiting: who wants it. begun: a process has it, and gives it back in bounded time."""

    task: "asyncio.Task[bytes] | None" = None
    num_waiting: int = 0
    begun: bool = False


class ImagePool:
    """`decode` gives pixels uint8 (S, S, 3) as bytes, `facts` what the file says of itself. Equal images that are asked
    for together are decoded once, and the last ones are kept.

    on_end: told "died" or "late" when a process ended.
    """

    def __init__(self, preprocess: dict[str, Any], settings: Settings, on_end: Callable[[str], None]) -> None:
        self.preprocess, self.settings, self._on_end = preprocess, settings, on_end
        self.hits = self.queries = 0
        self._idle: asyncio.Queue[Worker] = asyncio.LifoQueue()
        self._workers: set[Worker] = set()
        self._running: dict[bytes, Decoding] = {}
        self._replacing: set[asyncio.Task[None]] = set()
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
        return (await self.noted(data, frame, window)).pixels

    async def noted(self, data: bytes, frame: int | None = None, window: Window | None = None) -> Decoded:
        """
        Raises:
            Refused: as `decode`.
        """
        key, answer = await self._ask({"frame": frame, "window": window, "facts": False}, data)
        num_bytes = 3 * self.preprocess["image_size"] ** 2
        return Decoded(answer[:num_bytes], [BURNED_IN] if len(answer) > num_bytes else [], key.hex())

    async def facts(self, data: bytes) -> dict[str, Any]:
        """`Facts` by name.

        Raises:
            Refused: as `decode`.
        """
        _, answer = await self._ask({"frame": None, "window": None, "facts": True}, data)
        found: dict[str, Any] = json.loads(answer)
        return found

    async def _ask(self, asked: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
        """The hash of what was asked, and the answer."""
        key = hashlib.sha256(json.dumps(asked).encode() + b"\n" + data).digest()
        self.queries += 1
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return key, self._kept[key]
        one = self._running.get(key)
        if one is None:
            one = self._running[key] = Decoding()
            one.task = asyncio.create_task(self._work(one, key, data, asked))
        assert one.task is not None
        one.num_waiting += 1
        try:
            return key, await asyncio.shield(one.task)
        finally:
            one.num_waiting -= 1
            if not one.num_waiting and not one.begun:  # all have left before its turn came
                one.task.cancel()
                self._forget(key, one)

    def _forget(self, key: bytes, one: Decoding) -> None:
        if self._running.get(key) is one:
            del self._running[key]
        if one.task is not None and one.task.done() and not one.task.cancelled():
            one.task.exception()  # looked at: those who waited may all have left

    async def _work(self, one: Decoding, key: bytes, data: bytes, asked: dict[str, Any]) -> bytes:
        assert one.task is not None
        one.task.add_done_callback(lambda _: self._forget(key, one))
        for tries_left in (2, 1, 0):
            try:
                kind, answer = await self._try(one, data, asked)
                break
            except WorkerEnded:  # something else may have ended the process: again, in another one
                if not tries_left:
                    raise Refused("image_corrupt", "image_url") from None
        if kind == PIXELS:
            self._keep(key, answer)
            return answer
        if kind == MISTAKE:
            event("image_worker_failed", logging.ERROR, **json.loads(answer))
            raise Refused("internal")
        word = answer.decode()
        raise Refused(OF_IMAGES[Reason(word)] if word in set(Reason) else word, "image_url")

    async def _try(self, one: Decoding, data: bytes, asked: dict[str, Any]) -> tuple[int, bytes]:
        worker, whole = await self._living(), False
        one.begun = True
        try:
            async with asyncio.timeout(self.settings.decode_timeout):
                answer = await worker.ask(data, asked)
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
                self._let_go(worker)

    async def _living(self) -> Worker:
        """A process that waits for work; those that ended meanwhile are replaced, and are no image's fault."""
        while True:
            worker = await self._idle.get()
            if worker.process.returncode is None:
                return worker
            self._on_end("died")
            self._let_go(worker)

    def _let_go(self, worker: Worker) -> None:
        task = asyncio.create_task(self._replace(worker))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _replace(self, worker: Worker) -> None:
        """Another process for one that ended, as soon as there can be one."""
        self._workers.discard(worker)
        await worker.kill()
        while True:
            try:
                await self._hire()
                return
            except OSError:  # no process or no descriptor is to be had just now
                event("no_image_worker")
                await asyncio.sleep(1.0)

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
        for task in [*self._replacing, *(one.task for one in self._running.values() if one.task is not None)]:
            task.cancel()
        for worker in list(self._workers):
            await worker.kill()
