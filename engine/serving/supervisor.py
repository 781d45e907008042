"""Keeps the engine's process alive, and carries questions to it and answers back.

Knows a process, a socket and frames; does not know HTTP, images or what the engine does inside. When the process ends,
all that it was asked ends as "restarted" at once, and a new one is started.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from miss.engine.serving import frames
from miss.engine.serving.images import environment
from miss.engine.serving.logs import event
from miss.engine.serving.problems import Refused
from miss.engine.serving.settings import ENCODED, Settings

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # between an engine that never got ready and the next try
LOOKS_EACH = 1.0
# On a CPU, where images are encoded no faster together, and answers wait meanwhile.
BETWEEN = {"max_new_images": 2, "steps_between": 8}
MOST_SENT = 4096  # names of images that an engine was given


class CannotStart(ValueError):
    """The first engine did not get ready: the checkpoint or a setting is wrong."""


@dataclass
class Pending:
    """A question that the engine has. again: asks it once more, with its image's pixels."""

    answer: "asyncio.Future[dict[str, Any]]"
    on_text: Callable[[str], None] | None
    again: Callable[[list[int]], None]


@dataclass
class Item:
    """One question of a request, its sampling parameters by name, and whether its attention is wanted."""

    question: str
    params: dict[str, Any] = field(default_factory=dict)
    look: bool = False


class Supervisor:
    """`start`, `ask`, `stop`. `model`: what the engine said of itself when it was ready."""

    def __init__(self, settings: Settings, on_restart: Callable[[], None]) -> None:
        self.settings, self._on_restart = settings, on_restart
        self.model: dict[str, Any] = {}
        self.process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ids = itertools.count()
        self._pending: dict[int, Pending] = {}
        self._sent: OrderedDict[str, None] = OrderedDict()
        self._looks: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._life: asyncio.Task[None] | None = None
        self._failed: str | None = None

    @property
    def ready(self) -> bool:
        return self._writer is not None

    async def start(self) -> None:
        """Returns when the engine has answered its first question.

        Raises:
            CannotStart: it could not.
        """
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._life = asyncio.create_task(self._live(first))
        await first

    async def _live(self, first: "asyncio.Future[None]") -> None:
        """Engine after engine, until cancelled."""
        pause = FIRST_PAUSE
        while True:
            start = time.monotonic()
            try:
                was_ready = await self._one(first)
            except OSError:  # no process or no descriptor is to be had just now
                was_ready = False
            if not first.done():
                first.set_exception(CannotStart(self._failed or "the engine's process ended before it was ready"))
                return
            event("engine_ended", was_ready=was_ready, seconds=round(time.monotonic() - start, 3))
            self._on_restart()
            pause = FIRST_PAUSE if was_ready else min(2 * pause, LONGEST_PAUSE)
            if not was_ready:
                await asyncio.sleep(pause)

    async def _one(self, first: "asyncio.Future[None]") -> bool:
        """One process' life -> whether it was ever ready."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = await self._spawn(theirs)
        except OSError:
            ours.close()
            raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        watch = None
        try:
            while True:
                message, _ = await frames.read(reader)
                if message["op"] == "ready":
                    self.model, self._writer = message, writer
                    self._sent.clear()
                    watch = asyncio.create_task(self._watch(self.process))
                    event("engine_ready", seconds=round(message["load_seconds"], 3))
                    if not first.done():
                        first.set_result(None)
                self._handle(message)
        except (EOFError, OSError):
            return watch is not None
        finally:
            self._writer = None
            if watch is not None:
                watch.cancel()
            self._end_all()
            writer.close()
            await self._reap(self.process)

    async def _spawn(self, theirs: socket.socket) -> asyncio.subprocess.Process:
        s = self.settings
        config = {
            "question_slots": s.max_batch_size,
            "answer_slots": 3 * max(s.max_batch_size, 16),
            "max_prefill_questions": s.max_batch_size,
            "max_waiting": 2 * s.max_waiting,  # the server's own bound comes first
            "max_waiting_pixels": 2 * s.max_waiting_pixels,
            "cache_bytes": ENCODED * s.cache_bytes,
            **(BETWEEN if s.device == "cpu" else {}),
        }
        given = {
            **{"checkpoint": s.checkpoint, "precision": s.precision, "device": s.device, "threads": s.threads},
            **{"config": config, "max_wait": s.max_wait},
        }
        env = environment()
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # of the engine: the user's own, or its flag's
            env.pop(name)
            if name in os.environ or s.threads:
                env[name] = str(s.threads or os.environ[name])
        command = [sys.executable, "-P", "-m", "miss.engine.serving.engine_process"]
        return await asyncio.create_subprocess_exec(
            *command, str(theirs.fileno()), json.dumps(given), pass_fds=[theirs.fileno()], env=env
        )

    async def _reap(self, process: asyncio.subprocess.Process, patience: float = 2.0) -> None:
        """Waits for its end, and ends it where it does not end by itself."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()

    def _handle(self, message: dict[str, Any]) -> None:
        if message["op"] == "failed":
            self._failed = message["message"]
        elif message["op"] == "stats":
            look = self._looks.pop(message["id"], None)
            if look is not None and not look.done():
                look.set_result(message["stats"])
        elif message["op"] == "pixels":
            waiting = [number for number in message["ids"] if number in self._pending]
            if waiting:
                self._pending[waiting[0]].again(waiting)
        elif message["op"] in ("text", "answer", "error"):
            pending = self._pending.get(message["id"])  # none: it was cancelled meanwhile
            if pending is not None and not pending.answer.done():
                self._tell(pending, message)

    def _tell(self, pending: Pending, message: dict[str, Any]) -> None:
        if message["op"] == "answer":
            pending.answer.set_result({**message["answer"], "prompt_tokens": message["prompt_tokens"]})
        elif message["op"] == "error":
            pending.answer.set_exception(Refused(message["code"]))
        elif pending.on_text is not None:
            pending.on_text(message["text"])

    def _end_all(self) -> None:
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(Refused("restarted"))
        for look in self._looks.values():
            look.cancel()
        self._looks.clear()

    async def ask(
        self,
        pixels: bytes,
        items: list[Item],
        timeout: float | None,
        on_text: Callable[[str], None] | None = None,
        name: str | None = None,
    ) -> list[dict[str, Any]]:
        """Answers in the order of the items, all about one image; `Answer`'s fields, and `prompt_tokens`.

        Whoever is cancelled while waiting cancels the work. name: in hexadecimal, of these pixels and no others; None:
        their hash. An image that the engine was given before is named only.

        Raises:
            Refused: one of the questions has no answer; the others are cancelled.
        """
        if self._writer is None:
            raise Refused("not_ready")
        loop, writer, size = asyncio.get_running_loop(), self._writer, self.model["preprocess"]["image_size"]
        message = {"op": "ask", "timeout": timeout, "stream": on_text is not None, "shape": [size, size, 3]}
        message["image"] = name = name or hashlib.sha256(pixels).hexdigest()
        asked = {
            next(self._ids): {"question": item.question, "params": item.params, "look": item.look} for item in items
        }

        def send(numbers: list[int], data: bytes = pixels) -> None:
            if self._writer is writer:
                frames.write(writer, {**message, "items": [{"id": n, **asked[n]} for n in numbers]}, data)

        mine = {number: Pending(loop.create_future(), on_text, send) for number in asked}
        self._pending |= mine
        known = self._note(name) and not any(item.look for item in items)
        send(list(mine), b"" if known else pixels)
        waiting = [pending.answer for pending in mine.values()]
        try:
            return list(await asyncio.gather(*waiting))
        finally:
            left = [
                number for number, pending in mine.items() if not pending.answer.done() or pending.answer.cancelled()
            ]
            if left and self._writer is writer:
                frames.write(writer, {"op": "cancel", "ids": left})
            for number, pending in mine.items():
                del self._pending[number]
                pending.answer.cancel()
                if not pending.answer.cancelled():
                    pending.answer.exception()  # looked at: another one's was raised

    def _note(self, name: str) -> bool:
        """Whether the engine was given this image already; from now on it was."""
        known = name in self._sent
        self._sent[name] = None
        self._sent.move_to_end(name)
        if len(self._sent) > MOST_SENT:
            self._sent.popitem(last=False)
        return known

    async def stats(self, timeout: float = 1.0) -> dict[str, Any] | None:
        """The engine's own counts now; None where it does not say in time."""
        if self._writer is None:
            return None
        number = next(self._ids)
        look = self._looks[number] = asyncio.get_running_loop().create_future()
        frames.write(self._writer, {"op": "stats", "id": number})
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(look)
        except TimeoutError:
            return None
        except asyncio.CancelledError:
            if look.cancelled():  # the engine ended meanwhile
                return None
            raise
        finally:
            self._looks.pop(number, None)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kills an engine that has work and makes no progress, or does not say anything at all."""
        last, since = None, time.monotonic()
        while True:
            await asyncio.sleep(LOOKS_EACH)
            stats = await self.stats(self.settings.hang_timeout)
            mark = None
            if stats is not None:
                idle = not (stats["waiting"] or stats["running"])
                mark = None if idle else [stats[k] for k in ("num_encoded_images", "num_decoded_rows", "answered")]
                if idle or mark != last:
                    last, since = mark, time.monotonic()
            if time.monotonic() - since > self.settings.hang_timeout:
                event("engine_hangs", seconds=round(time.monotonic() - since, 1))
                process.kill()
                return

    async def stop(self) -> None:
        """Ends the engine; nothing is asked any more."""
        if self._life is not None:
            self._life.cancel()
            with contextlib.suppress(asyncio.CancelledError, CannotStart):
                await self._life
