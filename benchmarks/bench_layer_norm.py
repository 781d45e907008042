"""Layer normalization, alone and after the residual, at the widths of the image and the text tower."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from miss.benchmarks.harness import Case
from miss.benchmarks.inputs import normal
from miss.benchmarks.shapes import IMAGES, NUM_QUESTION_TOKENS, Shapes
from miss.kernels.layer_norm import add_layer_norm, layer_norm


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    wide, width = shapes.preset.vision.hidden_size, shapes.preset.encoder.hidden_size
    places = [("vit", shapes.tokens, wide), ("vit", IMAGES * shapes.tokens, wide), ("bert", NUM_QUESTION_TOKENS, width)]
    for dtype in dtypes:
        for tower, rows, columns in places:
            yield _case("layer_norm", tower, rows, columns, dtype)
            yield _case("add_layer_norm", tower, rows, columns, dtype)


def _case(op: str, tower: str, rows: int, columns: int, dtype: torch.dtype) -> Case:
    adds = op == "add_layer_norm"
    call: Callable[..., Any] = add_layer_norm if adds else layer_norm

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        x = [normal(generator, rows, columns, dtype=dtype) for _ in range(1 + adds)]
        weight = 1 + normal(generator, columns, size=0.1).to(dtype)
        return *x, weight, normal(generator, columns, dtype=dtype, size=0.1)

    matrix = rows * columns * dtype.itemsize
    passes = 1 + adds
    return Case(
        op, f"{tower} M={rows} C={columns}", str(dtype).removeprefix("torch."), make, call,
        flops=(8.0 + adds) * rows * columns, reads=passes * matrix, writes=passes * matrix,
        caches=("warm", "cold") if rows > 1000 else ("warm",), kind="fp32",
    )  # fmt: skip
