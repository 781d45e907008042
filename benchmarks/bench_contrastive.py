"""The contrastive loss against a queue, and hard negatives within the batch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Case
from miss.benchmarks.inputs import normal
from miss.benchmarks.shapes import Shapes
from miss.kernels.contrastive import contrastive_loss, hard_negatives

_WIDTH = 256
_ROWS, _QUEUE = 80, 57600  # the original's queue; 720 of these batches
_TEMPERATURE, _ALPHA = 0.07, 0.4


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    for dtype in dtypes:
        yield loss(_ROWS, _QUEUE, dtype)
        yield _draw(_ROWS, dtype)


def _features(generator: torch.Generator, rows: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(normal(generator, rows, _WIDTH), dim=1).to(dtype)


def loss(rows: int, queue: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        features = (_features(generator, n, dtype) for n in (rows, rows, rows, queue))
        return *features, torch.full((), _TEMPERATURE, device=generator.device)

    def call(student: Tensor, teacher: Tensor, batch: Tensor, columns: Tensor, temperature: Tensor) -> Tensor:
        return contrastive_loss(student, teacher, batch, columns, temperature, _ALPHA)

    return Case(
        "contrastive", f"B={rows} Q={queue} C={_WIDTH}", str(dtype).removeprefix("torch."), make, call,
        4.0 * rows * (rows + queue) * _WIDTH, reads=(3.0 * rows + queue) * _WIDTH * dtype.itemsize, writes=rows * 16.0,
    )  # fmt: skip


def _draw(rows: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        features = (_features(generator, rows, dtype) for _ in range(2))
        return *features, torch.full((), _TEMPERATURE, device=generator.device)

    def call(queries: Tensor, batch: Tensor, temperature: Tensor) -> Tensor:
        return hard_negatives(queries, batch, temperature, 1)

    return Case(
        "hard_negatives", f"B={rows} C={_WIDTH}", str(dtype).removeprefix("torch."), make, call,
        2.0 * rows * rows * _WIDTH, reads=2.0 * rows * _WIDTH * dtype.itemsize, writes=rows * 8.0,
    )  # fmt: skip
