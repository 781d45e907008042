"""The answering engine: a checkpoint that takes images and questions and gives answers.

Knows the order of a request's life; each stage is a file of its own. Does not know HTTP, training or how an operation
runs.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miss.engine.data.processor import Processor
from miss.engine.runtime.answers import Alternative, Answer, make_answer
from miss.engine.runtime.attention_maps import AttentionMaps, attention_maps
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.image_cache import ImageCache
from miss.engine.runtime.image_source import EarlyImage, Image, NamedImage
from miss.engine.runtime.intake import Intake
from miss.engine.runtime.loading import CHECKPOINTS, PRECISIONS, find_checkpoint, load_model
from miss.engine.runtime.many import answer_many, outcome, with_bar
from miss.engine.runtime.request import EngineFault, Request, RequestError, State
from miss.engine.runtime.runner import Runner
from miss.engine.runtime.sampler import SamplingParams
from miss.engine.runtime.scheduler import Scheduler
from miss.engine.runtime.slots import Slots
from miss.engine.runtime.stages import stage
from miss.engine.runtime.stats import Counters, Stats
from miss.models.vqa import MissVQA
from miss.models.weights import LoadReport

__all__ = ["CHECKPOINTS", "PRECISIONS", "Alternative", "Answer", "Engine", "Image", "find_checkpoint"]


class Engine:
    """A loaded model and its processor: `Engine.load(path).answer(image, question)`.

    `add`, `cancel`, `answer` and `answer_many` may be called from any thread; one step runs at a time.
    """

    def __init__(
        self,
        model: MissVQA,
        processor: Processor,
        name: str = "miss",
        report: LoadReport | None = None,
        config: EngineConfig | None = None,
        stamp: str = "",
    ) -> None:
        self.model, self.processor, self.name, self.report = model.eval(), processor, name, report
        self.config = config or EngineConfig()
        self.device = next(model.parameters()).device
        self.load_seconds = 0.0
        self.images = ImageCache(self.config.cache_bytes)
        slots = Slots.allocate(model, self.config)
        compat = model.config.behaviour == "compat"
        self.scheduler = Scheduler(self.config, slots, processor.preprocess.image_size**2, whole_batches=compat)
        self.runner = Runner(model, slots, self.images, self.config)
        model.decoder.steady = True
        self.intake = Intake(processor, model.config, self.config, self.scheduler, self.images, stamp)
        self.counters = Counters()
        self._step_lock = threading.Lock()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the form in which the checkpoint runs."""
        return () if self.report is None else self.report.notes

    @classmethod
    def load(
        cls,
        path_or_name: str | Path = "miss-small",
        precision: str = "auto",
        device: str = "cpu",
        config: EngineConfig | None = None,
    ) -> "Engine":
        """Loads a checkpoint folder.

        Args:
            path_or_name: a folder, or the name of a checkpoint that ships with the project.
            precision: fp32, bf16, fp16, int8, or what a packed checkpoint carries; auto is fp32 on CPU (a packed form
                only where its report says that it passed the agreement gate; `notes` says so) and bf16 on CUDA.
            device: cpu, cuda, cuda:1 …
            config: how much to take on at once.

        Raises:
            ValueError: the precision is unknown, or the checkpoint is missing, damaged or does not fit its config.
        """
        start = time.perf_counter()
        folder = find_checkpoint(path_or_name)
        model, report = load_model(folder, precision, device)
        stamp = f"{folder.resolve()} {precision}"
        engine = cls(model, Processor.from_folder(folder), model.config.name, report, config, stamp)
        engine.load_seconds = time.perf_counter() - start
        return engine

    def answer(
        self, image: Image, question: str, params: SamplingParams | None = None, timeout: float | None = None
    ) -> Answer:
        """Answers one question. `image` is a path, encoded bytes, or decoded pixels uint8 (H, W, 3).

        Raises:
            ValueError: the image cannot be decoded, the question is empty or far too long, or a `RequestError`.
        """
        request = self.add(image, question, params, timeout)
        try:
            while not request.done:
                self.step()
        finally:
            self.cancel(request)  # an interrupt's; one that is done stays what it is
        return outcome(request)

    def answer_many(
        self,
        pairs: Iterable[tuple[Any, ...]],
        params: SamplingParams | None = None,
        batch_size: int = 16,
        on_error: str = "raise",
        progress: bool = False,
    ) -> Iterator[Any]:
        """Answers in the order of `pairs`, in bounded memory: (image, question), or (image, question, params).

        `batch_size` of them are taken up at a time, before the last ones' answers are complete; the questions of one
        image among them share its encoding. Images are read and decoded by a few threads, those of up to 16 further
        pairs while the engine answers where it leaves cores free; they end with the iterator. With a `batch_size` of 1
        there are none, and no pair is asked for before the last one's answer was taken.

        With `on_error="return"` a pair that cannot be served yields its ValueError in place, and the rest go on; a
        ValueError that stands in place of an image (it could not even be named) comes back so. `progress` shows a bar.

        Raises:
            ValueError: a parameter is wrong, or a pair cannot be served and `on_error` is "raise".
        """
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error: got {on_error!r}; accepted: raise, return")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; wanted at least 1")
        return answer_many(self, with_bar(pairs, progress), params, batch_size, on_error == "raise")

    def add(
        self,
        image: Image | EarlyImage | NamedImage,
        question: str,
        params: SamplingParams | None = None,
        timeout: float | None = None,
        on_token: Callable[[Request], None] | None = None,
        on_done: Callable[[Request], None] | None = None,
    ) -> Request:
        """Puts a question into the queue; `step` answers it.

        Args:
            image: a path, encoded bytes, or decoded pixels uint8 (H, W, 3).
            timeout: seconds from now after which no more work is done for it.
            on_token: called with the request, in the thread that steps (it must not step itself), when its `token_ids`
                have grown; not by searches whose tokens may still change (beams).
            on_done: called so when the request has ended.

        Raises:
            ValueError: a `QueueFull` or `InvalidRequest`, an `ImageError`, a `QuestionError`.
        """
        self.counters.count("received")
        try:
            with stage("prepare", self.device):
                request = self.intake.request(image, question, params or SamplingParams(), timeout)
            request.on_token, request.on_done = on_token, on_done
            self.scheduler.add(request)
        except ValueError:
            self.counters.count("rejected")
            raise
        return request

    def cancel(self, request: Request) -> bool:
        """Ends a request; its slots are free after the next step, and at once where none is running. Nobody else's
        answer changes. Returns whether it had not ended yet."""
        if request.done:
            return False
        self.scheduler.cancel(request)
        if self._step_lock.acquire(blocking=False):
            try:
                self.scheduler.drop()
                self._collect()
            finally:
                self._step_lock.release()
        return True

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Drops who is late, prefills who is next, decodes for each who runs -> those who ended."""
        with self._step_lock:
            try:
                self.scheduler.drop()
                self.runner.begin(self.scheduler.active(), self.scheduler.num_waiting > 0)
                self.runner.prefill(self.scheduler.admit())
                self.runner.decode(self.scheduler.active())
                self._conclude()
            except BaseException as error:  # a fault of ours, or an interrupt between two writes: nobody waits for ever
                self._fail_running(error)
                raise
            finally:
                ended = self._collect()
            return ended

    def _conclude(self) -> None:
        """Tells who listens what has come, and makes answers of searches that are done."""
        for request in self.scheduler.active():
            if request.on_token is not None and request.search.streams and len(request.token_ids) > request.num_told:
                request.num_told = len(request.token_ids)
                _tell(request, request.on_token)
            if request.search.done and not request.done:
                request.ended = time.monotonic()
                request.answer = make_answer(
                    request.search.hypotheses,
                    request.params.num_alternatives,
                    self.processor.decode if request.candidates is None else request.candidates.text,
                    request.seconds(),
                    request.warnings,
                )
                request.state = State.ANSWERED

    def _collect(self) -> list[Request]:
        ended = self.scheduler.collect()
        for request in ended:
            self.counters.count(request.state.value)
            if request.on_done is not None:
                _tell(request, request.on_done)
        return ended

    def _fail_running(self, error: BaseException) -> None:
        for request in self.scheduler.active():
            fault = EngineFault("the engine failed in a step; ask again, and report it if it stays so")
            fault.__cause__ = error
            request.fail(fault)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.busy

    @property
    def stats(self) -> Stats:
        """What came and how it ended, what there is now, and what the image cache did."""
        return Stats.of(self.counters, self.scheduler, self.images, self.runner)

    def look(self, pixels: np.ndarray, question: str, token_ids: list[int]) -> AttentionMaps:
        """Where the model looked for each token of an answer that it gave; between two steps, from any thread.

        Args:
            pixels: uint8 (S, S, 3), as `Processor.image` gives it.
            token_ids: the answer's.

        Raises:
            ValueError: the answer has no tokens.
        """
        question_ids = self.processor.question(question)
        with self._step_lock:
            return attention_maps(self.model, self.processor, pixels, question_ids, token_ids)

    def forget_images(self) -> None:
        """Empties the image cache, drops captured graphs and what was made of the weights: whoever changes those
        calls this."""
        self.images.clear()
        self.runner.graphs.clear()
        self.runner.model.decoder.forget()


def _tell(request: Request, listener: Callable[[Request], None]) -> None:
    """Calls the asker's own code: whatever it raises ends this request, and nobody else's."""
    try:
        listener(request)
    except Exception as error:
        logging.getLogger(__name__).exception("a listener of request %d failed", request.id)
        if not request.done:
            failed = RequestError("the request's own on_token failed")
            failed.__cause__ = error
            request.fail(failed)
