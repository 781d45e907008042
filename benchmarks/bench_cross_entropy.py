"""Linear and label-smoothed cross entropy over the vocabulary: the loss of a training step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from miss.benchmarks.cases import Case
from miss.benchmarks.inputs import normal, weight
from miss.benchmarks.shapes import Shapes
from miss.kernels.cross_entropy import linear_cross_entropy

_ROWS = 192  # answer tokens of a step: 48 answers of four


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    decoder = shapes.preset.decoder
    for dtype in dtypes:
        yield case(_ROWS, decoder.vocab_size, decoder.hidden_size, dtype)


def case(rows: int, vocabulary: int, columns: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        labels = torch.randint(0, vocabulary, (rows,), generator=generator, device=generator.device)
        hidden, table = normal(generator, rows, columns, dtype=dtype), weight(generator, vocabulary, columns, dtype)
        return hidden, table, normal(generator, vocabulary, dtype=dtype, size=0.1), labels

    def call(hidden: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, table, bias, labels, 0.1)

    return Case(
        "linear_cross_entropy", f"M={rows} V={vocabulary} C={columns}", str(dtype).removeprefix("torch."), make, call,
        2.0 * rows * vocabulary * columns, reads=(rows + vocabulary) * columns * dtype.itemsize, writes=rows * 4.0,
    )  # fmt: skip
