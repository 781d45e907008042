"""The momentum twin's update: float32 averages of a layer's parameters of each kind."""

from collections.abc import Iterator

import torch
from torch import Tensor

from miss.benchmarks.cases import Case
from miss.benchmarks.inputs import normal, weight
from miss.benchmarks.shapes import Shapes
from miss.kernels.ema import ema_

_LAYERS = 2


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    for dtype in dtypes:
        yield _case(shapes.preset.encoder.hidden_size, dtype)


def _case(width: int, dtype: torch.dtype) -> Case:
    sizes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), *[(width,)] * 6] * _LAYERS

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        values = [
            weight(generator, *s, dtype) if len(s) == 2 else normal(generator, *s, dtype=dtype, size=0.1) for s in sizes
        ]
        return *(v.float() for v in values), *values

    def call(*tensors: Tensor) -> Tensor:
        averages, values = list(tensors[: len(sizes)]), list(tensors[len(sizes) :])
        ema_(averages, values, 0.995)
        return averages[0]

    numbers = float(_LAYERS * (12 * width * width + 6 * width))
    return Case(
        "ema", f"{len(sizes)} tensors of {width}", str(dtype).removeprefix("torch."), make, call,
        3.0 * numbers, reads=numbers * (4 + dtype.itemsize), writes=4.0 * numbers, kind="fp32",
    )  # fmt: skip
