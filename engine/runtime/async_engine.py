"""An engine for asyncio: questions are awaited, one thread of its own steps.

Knows event loops and threads; does not know how the engine answers.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from miss.engine.runtime.answers import Answer
from miss.engine.runtime.attention_maps import AttentionMaps
from miss.engine.runtime.engine import Engine
from miss.engine.runtime.image_source import Image
from miss.engine.runtime.many import outcome
from miss.engine.runtime.request import Request, RequestError
from miss.engine.runtime.sampler import SamplingParams

_READING = 0.005  # what questions that are being read are waited for: longer than one takes, shorter than a step


class Closed(RequestError):
    code = "closed"


@dataclass(frozen=True)
class Event:
    """What has come of an answer: its text and tokens so far, each event's a beginning of the next one's; `answer` is
    set in the last event."""

    text: str
    token_ids: list[int]
    answer: Answer | None = None


class AsyncEngine:
    """`await answer(…)`, `async for event in stream(…)`, then `await aclose()`, or `async with`.

    Awaits may come from several event loops. Images are read in a few threads, so that no loop waits for a file. An
    await or a stream that is cancelled, or left, ends its request: its slots are free one step later.

    engine: one, or what makes one, which the thread that steps then calls. On a CPU that is worth much: each thread
    that ever ran a parallel part keeps OpenMP workers of its own, and with more of them than cores OpenMP no longer
    waits by spinning. Of an int8 miss-small on two cores an answer took 13.4 ms where another thread had loaded it,
    8.1 so.
    max_wait: seconds that an idle engine waits for a whole batch. At 0 it waits only, and not long, for what is being
    read already, so that questions asked together are encoded together. One that works takes up others between steps.
    """

    def __init__(self, engine: Engine | Callable[[], Engine], num_readers: int = 2, max_wait: float = 0.0) -> None:
        """
        Raises:
            Exception: what making the engine raises.
        """
        self.max_wait = max_wait
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="miss-read")
        self._change = threading.Condition()
        self._closing, self._num_reading = False, 0
        self._looks: deque[tuple[Future[AttentionMaps], tuple[np.ndarray, str, list[int]]]] = deque()
        made: Future[Engine] = Future()
        self._worker = threading.Thread(target=self._live, args=(engine, made), name="miss-step", daemon=True)
        self._worker.start()
        self.engine = made.result()

    async def answer(
        self, image: Image, question: str, params: SamplingParams | None = None, timeout: float | None = None
    ) -> Answer:
        """As `Engine.answer`.

        Raises:
            ValueError: as `Engine.answer`; `Closed` after `aclose` began.
        """
        async with contextlib.aclosing(self._events(image, question, params, timeout, streams=False)) as events:
            answers = [event.answer async for event in events]
        assert len(answers) == 1 and answers[0] is not None, "one event, its answer in it"
        return answers[0]

    def stream(
        self, image: Image, question: str, params: SamplingParams | None = None, timeout: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events as tokens come, where those that come are final: greedy, sampling, under a constraint. Beams may still
        change every token until their end, ranking has none: they give one event, the last.

        Raises:
            ValueError: as `answer`, from the iteration.
        """
        return self._events(image, question, params, timeout, streams=True)

    async def _events(
        self, image: Image, question: str, params: SamplingParams | None, timeout: float | None, streams: bool
    ) -> AsyncGenerator[Event, None]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event | Request] = asyncio.Queue()

        def send(what: Event | Request) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(arrived.put_nowait, what)

        def grown(request: Request) -> None:
            token_ids = list(request.token_ids)
            send(Event(self.engine.processor.decode(token_ids), token_ids))

        with self._change:
            if self._closing:
                raise Closed("the engine is closing; ask another one")
            self._num_reading += 1
        ask = (image, question, params, timeout, grown if streams else None, send)
        reading = loop.run_in_executor(self._readers, self._add, *ask)
        try:
            request = await asyncio.shield(reading)
        except asyncio.CancelledError:
            reading.add_done_callback(self._leave_read)
            raise
        try:
            while not isinstance(event := await arrived.get(), Request):
                yield event
            answer = outcome(event)
            yield Event(answer.text, answer.token_ids, answer)
        finally:
            self._leave(request)

    async def look(self, pixels: np.ndarray, question: str, token_ids: list[int]) -> AttentionMaps:
        """As `Engine.look`, by the thread that steps.

        Raises:
            ValueError: as `Engine.look`; `Closed` after `aclose` began.
        """
        found: Future[AttentionMaps] = Future()
        with self._change:
            if self._closing:
                raise Closed("the engine is closing; ask another one")
            self._looks.append((found, (pixels, question, token_ids)))
            self._change.notify()
        return await asyncio.wrap_future(found)

    def _add(self, image: Image, question: str, *rest: Any) -> Request:
        """In a reader's thread."""
        try:
            return self.engine.add(image, question, *rest)
        finally:
            with self._change:
                self._num_reading -= 1
                self._change.notify()

    def _leave(self, request: Request) -> None:
        if self.engine.cancel(request):
            with self._change:
                self._change.notify()

    def _leave_read(self, reading: "asyncio.Future[Request]") -> None:
        """Nobody waits any more for what was read."""
        if not reading.cancelled() and reading.exception() is None:
            self._leave(reading.result())

    def _live(self, engine: Engine | Callable[[], Engine], made: "Future[Engine]") -> None:
        try:
            self.engine = engine if isinstance(engine, Engine) else engine()
        except BaseException as error:  # raised where it is waited for
            made.set_exception(error)
            return
        made.set_result(self.engine)
        self._work()

    def _work(self) -> None:
        """The worker's life: steps while there is work, ends when nothing more can come."""

        def wanted() -> bool:
            return self.engine.busy or bool(self._looks) or (self._closing and not self._num_reading)

        while True:
            with self._change:
                self._change.wait_for(wanted)
                looks = list(self._looks)
                self._looks.clear()
                if not self.engine.busy and not looks:  # the last one may have been cancelled since: that is no end
                    if self._closing and not self._num_reading:
                        return
                    continue
                if self.engine.busy and not self.engine.scheduler.running:
                    self._gather()
            for found, asked in looks:
                self._look(found, asked)
            if not self.engine.busy:
                continue
            try:
                self.engine.step()
            except Exception:  # those who ran have failed with it, and are told; the others' turn comes
                logging.getLogger(__name__).exception("a step failed")

    def _look(self, found: "Future[AttentionMaps]", asked: tuple[np.ndarray, str, list[int]]) -> None:
        if not found.set_running_or_notify_cancel():
            return
        try:
            found.set_result(self.engine.look(*asked))
        except Exception as error:  # raised where it is waited for
            found.set_exception(error)

    def _gather(self) -> None:
        """Of an idle engine: waits for those who are about to join the first."""
        most = self.engine.config.max_prefill_questions

        def enough() -> bool:
            return self._closing or self.engine.scheduler.num_waiting >= most

        if self.max_wait > 0:
            self._change.wait_for(enough, self.max_wait)
        self._change.wait_for(lambda: enough() or not self._num_reading, _READING)

    async def aclose(self) -> None:
        """Takes no more questions, answers those that it has, and stops."""
        with self._change:
            self._closing = True
            self._change.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._worker.join)
        self._readers.shutdown()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
