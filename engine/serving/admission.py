"""How much a server takes on: questions, pixels and bytes of bodies, each counted from taking to letting go.

Knows counts and their bounds; does not know HTTP or the engine.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from miss.engine.serving.problems import Refused


class Bound:
    """Something of which there may be so much at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def fits(self, amount: int) -> bool:
        """Whether it may be taken now; what is more than all of it fits where nothing is held, so that it can be."""
        return self.held + amount <= self.most or self.held == 0

    def take(self, amount: int) -> None:
        """
        Raises:
            Refused: there is no room now.
        """
        if not self.fits(amount):
            raise Refused("queue_full")
        self.held += amount

    def free(self, amount: int) -> None:
        self.held -= amount
        assert self.held >= 0, "freed more than was taken"


class Admission:
    """questions, pixels: of what was taken on and has not ended. bodies: bytes of requests that are held."""

    def __init__(self, max_questions: int, max_pixels: int, max_bytes: int) -> None:
        self.questions, self.pixels, self.bodies = Bound(max_questions), Bound(max_pixels), Bound(max_bytes)
        self.draining = False

    @contextmanager
    def hold(self, num_questions: int, num_pixels: int) -> Iterator[None]:
        """Room for a request's questions and its decoded image while the block runs.

        Raises:
            Refused: there is none.
        """
        self.questions.take(num_questions)
        try:
            self.pixels.take(num_pixels)
        except Refused:
            self.questions.free(num_questions)
            raise
        try:
            yield
        finally:
            self.questions.free(num_questions)
            self.pixels.free(num_pixels)
