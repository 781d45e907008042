"""The one thread that makes an engine and steps it; any other thread adds questions to it, and is called back.

Knows threads and when an engine has work; does not know event loops, sockets or how the engine answers.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from miss.engine.runtime.attention_maps import AttentionMaps
from miss.engine.runtime.engine import Engine
from miss.engine.runtime.image_source import EarlyImage, Image, NamedImage
from miss.engine.runtime.request import Request, RequestError
from miss.engine.runtime.sampler import SamplingParams

_READING = 0.005  # what questions that are being read are waited for: longer than one takes, shorter than a step


class Closed(RequestError):
    code = "closed"


class Stepper:
    """`expect` some, `add` each of them; `cancel`, `look`, `close`.

    engine: one, or what makes one, which the thread that steps then calls. On a CPU that is worth much: each thread
    that ever ran a parallel part keeps OpenMP workers of its own, and with more of them than cores OpenMP no longer
    waits by spinning. Of an int8 miss-small on two cores an answer took 13.4 ms where another thread had loaded it,
    8.1 so.
    max_wait: seconds that an idle engine waits for a whole batch. At 0 it waits only, and not long, for what is
    expected already, so that questions asked together are encoded together. One that works takes up others between
    steps.
    """

    def __init__(self, engine: Engine | Callable[[], Engine], max_wait: float = 0.0) -> None:
        """
        Raises:
            Exception: what making the engine raises.
        """
        self.max_wait = max_wait
        self._change = threading.Condition()
        self._closing, self._num_expected = False, 0
        self._looks: deque[tuple[Future[AttentionMaps], tuple[np.ndarray, str, list[int]]]] = deque()
        made: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._live, args=(engine, made), name="miss-step", daemon=True)
        self._thread.start()
        self.engine = made.result()

    def expect(self, count: int = 1) -> None:
        """So many are about to be added, each of them by one call of `add`.

        Raises:
            Closed: after `close` began.
        """
        with self._change:
            if self._closing:
                raise Closed("the engine is closing; ask another one")
            self._num_expected += count

    def add(
        self,
        image: Image | EarlyImage | NamedImage,
        question: str,
        params: SamplingParams | None = None,
        timeout: float | None = None,
        on_token: Callable[[Request], None] | None = None,
        on_done: Callable[[Request], None] | None = None,
    ) -> Request:
        """`Engine.add` of one that was expected; whoever listens is called by the thread that steps.

        Raises:
            ValueError: as `Engine.add`.
        """
        try:
            return self.engine.add(image, question, params, timeout, on_token, on_done)
        finally:
            with self._change:
                self._num_expected -= 1
                self._change.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request, one step later at most."""
        if self.engine.cancel(request):
            with self._change:
                self._change.notify()

    def look(self, pixels: np.ndarray, question: str, token_ids: list[int]) -> "Future[AttentionMaps]":
        """`Engine.look`, by the thread that steps.

        Raises:
            Closed: after `close` began.
        """
        found: Future[AttentionMaps] = Future()
        with self._change:
            if self._closing:
                raise Closed("the engine is closing; ask another one")
            self._looks.append((found, (pixels, question, token_ids)))
            self._change.notify()
        return found

    def close(self) -> None:
        """Takes no more questions, answers those that it has, and returns when that is done."""
        self.end()
        self._thread.join()

    def end(self) -> None:
        """Begins to close."""
        with self._change:
            self._closing = True
            self._change.notify()

    def _live(self, engine: Engine | Callable[[], Engine], made: "Future[Engine]") -> None:
        try:
            self.engine = engine if isinstance(engine, Engine) else engine()
        except BaseException as error:  # raised where it is waited for
            made.set_exception(error)
            return
        made.set_result(self.engine)
        self._work()

    def _work(self) -> None:
        """The thread's life: steps while there is work, ends when nothing more can come."""

        def wanted() -> bool:
            return self.engine.busy or bool(self._looks) or (self._closing and not self._num_expected)

        while True:
            with self._change:
                self._change.wait_for(wanted)
                looks = list(self._looks)
                self._looks.clear()
                if not self.engine.busy and not looks:  # the last one may have been cancelled since: that is no end
                    if self._closing and not self._num_expected:
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
        self._change.wait_for(lambda: enough() or not self._num_expected, _READING)
