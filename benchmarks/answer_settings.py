"""The points that whole answers are measured at, and how thoroughly.

Knows numbers and names; does not know how anything is measured.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from miss.benchmarks import answer_models


@dataclass(frozen=True)
class Setting:
    """One point of the measurement."""

    preset: str
    image_size: int
    batch: int
    questions_per_image: int
    tokens: int

    @property
    def label(self) -> str:
        return f"{self.preset}-{self.image_size}px-b{self.batch}-q{self.questions_per_image}-t{self.tokens}"


@dataclass(frozen=True)
class Options:
    """What to measure. `judged`: how many questions of the validation split are answered. `rounds`: 0 decides."""

    settings: tuple[Setting, ...]
    peers: tuple[str, ...] = ("headline",)
    precisions: tuple[str, ...] = ("fp32", "bf16", "int8")
    rounds: int = 0
    quick: bool = False
    judged: int = 200
    together: int = 6
    data: Path | None = None
    work: Path = field(default_factory=answer_models.default_work)
    threads: int = 0
    device: str = "cpu"

    def rounds_of(self, setting: Setting) -> int:
        """A batch takes so long that fewer rounds say as much."""
        many = setting.batch * setting.questions_per_image >= 8
        return self.rounds or ((5 if self.quick else 7) if many else (7 if self.quick else 15))


def settings(
    preset: str,
    image_sizes: tuple[int, ...],
    batches: tuple[int, ...],
    questions: tuple[int, ...],
    tokens: tuple[int, ...],
) -> tuple[Setting, ...]:
    """All combinations."""
    sizes = image_sizes or (answer_models.image_size_of(preset),)
    return tuple(Setting(preset, *one) for one in itertools.product(sizes, batches, questions, tokens))
