"""Makes a request of what a caller hands in, or says at once what is wrong with it.

Knows the processor, the limits and what the image cache holds; does not know the model, or when a request is answered.
"""

import itertools
import time

from miss.engine.data.processor import Processor
from miss.engine.runtime.candidates import CandidateLists, Candidates
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.image_cache import ImageCache
from miss.engine.runtime.image_source import EarlyImage, Image, ImageReader, NamedImage
from miss.engine.runtime.request import InvalidRequest, Request, RequestImage
from miss.engine.runtime.sampler import SamplingParams, make_search
from miss.engine.runtime.scheduler import Scheduler
from miss.engine.runtime.search import Search
from miss.models.config import MissConfig


class Intake:
    """Reads images and questions in the asker's own thread; an image that is kept or waited for is not decoded."""

    def __init__(
        self,
        processor: Processor,
        model: MissConfig,
        limits: EngineConfig,
        scheduler: Scheduler,
        images: ImageCache,
        stamp: str,
    ) -> None:
        self.processor, self.model, self.limits = processor, model, limits
        self.scheduler, self.images = scheduler, images
        self.reader = ImageReader(processor, stamp)
        self.lists = CandidateLists(processor)
        self._ids = itertools.count()

    def request(
        self, image: Image | EarlyImage | NamedImage, question: str, params: SamplingParams, timeout: float | None
    ) -> Request:
        """
        Raises:
            ValueError: an `InvalidRequest`, an `ImageError` or a `QuestionError`.
        """
        arrived = time.monotonic()
        if timeout is not None and not timeout > 0:
            raise InvalidRequest(f"timeout: got {timeout!r}; wanted a number of seconds above 0, or None")
        candidates = self._candidates(params)
        search = self._search(params, candidates)
        asked = self.processor.encode_question(question)
        request = Request(
            id=next(self._ids),
            image=self._image(image),
            question_ids=asked.ids,
            params=params,
            search=search,
            candidates=candidates,
            deadline=None if timeout is None else arrived + timeout,
            warnings=asked.warnings + (candidates.warnings if candidates else []),
            arrived=arrived,
        )
        request.prepared = time.monotonic()
        return request

    def _candidates(self, params: SamplingParams) -> Candidates | None:
        """The list that is ranked or allowed, tokenised. An answer in it may be as long as slots are, whatever the
        checkpoint's usual length is; where the caller says a length, it holds."""
        texts = params.candidates or params.constrain
        if texts is None:
            return None
        try:
            return self.lists.get(texts, params.max_new_tokens or self.scheduler.slots.cache.answer_length)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error

    def _search(self, params: SamplingParams, candidates: Candidates | None) -> Search:
        longest, room = params.max_new_tokens, self.scheduler.slots.cache.answer_length
        longest = longest or self.model.generation.max_new_tokens
        if longest > room:
            raise InvalidRequest(
                f"max_new_tokens: got {longest}; this engine's answers have up to {room} tokens "
                f"(EngineConfig.answer_length)"
            )
        search = make_search(params, self.model, candidates)
        if search.branches > self.limits.answer_slots:
            raise InvalidRequest(
                f"the request wants {search.branches} answer slots, for its beams or alternatives; this engine has "
                f"{self.limits.answer_slots} (EngineConfig.answer_slots)"
            )
        return search

    def needs_no_pixels(self, key: bytes) -> bool:
        """Whether an image is waited for or encoded already; from any thread, and without counting as a look-up."""
        return self.scheduler.waiting_image(key) is not None or self.images.holds(key)

    def _image(self, image: Image | EarlyImage | NamedImage) -> RequestImage:
        """One that is waited for already, or that is encoded already, or its pixels."""
        key, read = self.reader.key(image)
        waiting = self.scheduler.waiting_image(key)
        if waiting is not None:
            return waiting
        tokens = self.images.tokens(key)
        if tokens is not None:
            return RequestImage(key, tokens=tokens)
        return RequestImage(key, pixels=self.reader.pixels(image, read))
