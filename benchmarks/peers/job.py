"""What a peer is asked to answer, what it gives back, and what a peer is.

Knows arrays and files; does not know any peer, or where pixels and questions come from.

Shapes: I images, S pixels a side, R questions, T question length.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

TOP = 16  # of the first answer token's log-probabilities that are compared


@dataclass
class Job:
    """Questions over images, the same for every peer.

    pixels:      uint8 (I, S, S, 3), decoded and resized
    texts:       R questions; as many for every image, those of an image together
    ids:         int64 (R, T), the same questions as tokens [ENC] … [SEP], all of one length
    num_tokens:  the longest answer, [SEP] included
    """

    pixels: np.ndarray
    texts: list[str]
    ids: np.ndarray
    num_tokens: int

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.ids) and len(self.texts) % len(self.pixels) == 0

    @property
    def questions_per_image(self) -> int:
        return len(self.texts) // len(self.pixels)

    @property
    def image_index(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.pixels)), self.questions_per_image)

    def stamped(self, number: int) -> "Job":
        """The same with images that nobody has seen: two pixels of each say `number`."""
        pixels = self.pixels.copy()
        pixels[:, 0, 0, 0], pixels[:, 0, 1, 0] = number % 256, number // 256 % 256
        return Job(pixels, self.texts, self.ids, self.num_tokens)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Job":
        with np.load(path) as file:
            return cls(file["pixels"], file["texts"].tolist(), file["ids"], int(file["num_tokens"]))


@dataclass
class Output:
    """tokens: each question's, [SEP] included where it came; seconds: image, question and decode of the whole job."""

    tokens: list[list[int]]
    seconds: dict[str, float] = field(default_factory=dict)


class Peer(Protocol):
    """Something that answers, loaded and warm in a process of its own."""

    def prepare(self, job: Job) -> None:
        """What may be done once for a job's shapes: compiling, allocating. Not timed."""

    def run(self, job: Job) -> Output: ...

    def first(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest first tokens of each answer: ids int64 (R, TOP), log-probabilities float (R, TOP)."""


def likeliest(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities) of the TOP largest of logits (R, V)."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    ids = np.argsort(-z, axis=-1, kind="stable")[:, :TOP]
    return ids, np.take_along_axis(z, ids, -1)
