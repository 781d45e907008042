"""An engine for asyncio: questions are awaited, one thread of its own (`stepper.py`) steps.

Knows event loops and threads; does not know how the engine answers.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from miss.engine.runtime.answers import Answer
from miss.engine.runtime.attention_maps import AttentionMaps
from miss.engine.runtime.engine import Engine
from miss.engine.runtime.image_source import Image
from miss.engine.runtime.many import outcome
from miss.engine.runtime.request import Request
from miss.engine.runtime.sampler import SamplingParams
from miss.engine.runtime.stepper import Closed, Stepper

__all__ = ["AsyncEngine", "Closed", "Event"]


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

    engine, max_wait: as of `Stepper`; on a CPU give what makes the engine, not the engine.
    """

    def __init__(self, engine: Engine | Callable[[], Engine], num_readers: int = 2, max_wait: float = 0.0) -> None:
        """
        Raises:
            Exception: what making the engine raises.
        """
        self._stepper = Stepper(engine, max_wait)
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="miss-read")
        self.engine = self._stepper.engine

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

        self._stepper.expect()
        ask = (image, question, params, timeout, grown if streams else None, send)
        reading = loop.run_in_executor(self._readers, self._stepper.add, *ask)
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
            self._stepper.cancel(request)

    async def look(self, pixels: np.ndarray, question: str, token_ids: list[int]) -> AttentionMaps:
        """As `Engine.look`, by the thread that steps.

        Raises:
            ValueError: as `Engine.look`; `Closed` after `aclose` began.
        """
        return await asyncio.wrap_future(self._stepper.look(pixels, question, token_ids))

    def _leave_read(self, reading: "asyncio.Future[Request]") -> None:
        """Nobody waits any more for what was read."""
        if not reading.cancelled() and reading.exception() is None:
            self._stepper.cancel(reading.result())

    async def aclose(self) -> None:
        """Takes no more questions, answers those that it has, and stops."""
        self._stepper.end()
        await asyncio.get_running_loop().run_in_executor(None, self._stepper.close)
        self._readers.shutdown()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
