"""One question on its way to an answer: what was asked, where it stands, and how it ended.

Knows states, times and errors; does not know models, queues or slots' tensors.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from torch import Tensor

from miss.engine.runtime.answers import Answer
from miss.engine.runtime.candidates import Candidates
from miss.engine.runtime.sampler import SamplingParams
from miss.engine.runtime.search import Search


class RequestError(ValueError):
    """A request that gets no answer; `code` says why in one word that programs may compare."""

    code = "error"


class QueueFull(RequestError):
    code = "queue_full"


class DeadlinePassed(RequestError):
    code = "deadline"


class Cancelled(RequestError):
    code = "cancelled"


class OutOfMemory(RequestError):
    code = "out_of_memory"


class InvalidRequest(RequestError):
    code = "invalid"


class EngineFault(RequestError):
    """The engine itself failed under the request; what raised it is its cause."""

    code = "fault"


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    ANSWERED = "answered"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class RequestImage:
    """An image that requests wait for, shared by all of them: encoded once, whatever the cache keeps.

    key: hash of its content, of the preprocessing and of the weights. pixels: uint8 (S, S, 3) until it is encoded.
    tokens: (N, C) once it is.
    """

    key: bytes
    pixels: np.ndarray | None = None
    tokens: Tensor | None = None


@dataclass(eq=False)
class Request:
    """A question about an image, made by `Engine.add`.

    `answer` is set once `state` is answered, `error` once it is failed or cancelled. `deadline` and all times are those
    of `time.monotonic`. candidates: the list that is ranked or allowed. question_slot and answer_slots (one a branch of
    the search) are its own while it runs. num_told: of its tokens, those that `on_token` was called for.
    """

    id: int
    image: RequestImage | None
    question_ids: list[int]
    params: SamplingParams
    search: Search
    candidates: Candidates | None = None
    deadline: float | None = None
    warnings: list[str] = field(default_factory=list)
    on_token: "Callable[[Request], None] | None" = None
    on_done: "Callable[[Request], None] | None" = None

    state: State = State.WAITING
    answer: Answer | None = None
    error: ValueError | None = None
    question_slot: int = -1
    answer_slots: list[int] = field(default_factory=list)
    num_told: int = 0

    arrived: float = field(default_factory=time.monotonic)
    prepared: float = 0.0
    admitted: float = 0.0
    encoded: float = 0.0
    prefilled: float = 0.0
    ended: float = 0.0

    @property
    def done(self) -> bool:
        return self.state not in (State.WAITING, State.RUNNING)

    @property
    def token_ids(self) -> list[int]:
        """What there is of the answer; of a search that streams, its beginning for good."""
        hypotheses = self.search.hypotheses
        return hypotheses[0].token_ids if hypotheses else []

    def fail(self, error: ValueError) -> None:
        """Ends it without an answer."""
        self.error = error
        self.state = State.CANCELLED if isinstance(error, Cancelled) else State.FAILED

    def seconds(self) -> dict[str, float]:
        """Where the time from asking to the answer went."""
        return {
            "image": self.prepared - self.arrived + self.encoded - self.admitted,
            "queue": self.admitted - self.prepared,
            "question": self.prefilled - self.encoded,
            "decode": self.ended - self.prefilled,
            "total": self.ended - self.arrived,
        }
