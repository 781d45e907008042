"""Layer normalization, alone and after the residual, its gradients, and its result as int8 codes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Case, Peer
from miss.benchmarks.inputs import normal
from miss.benchmarks.peers import passes
from miss.benchmarks.shapes import IMAGES, NUM_QUESTION_TOKENS, Shapes
from miss.kernels.layer_norm import add_layer_norm, add_layer_norm_quantised, layer_norm, layer_norm_quantised
from miss.kernels.registry import OPS

_CODE = 1e-2  # of 255: a code that rounds the other way


@dataclass(frozen=True)
class Way:
    """One of the operations: matrices read and written, in elements of x; of them `codes` in bytes."""

    op: str
    call: Callable[..., Any]
    reads: int
    writes: int
    codes: int = 0
    peers: tuple[Peer, ...] = ()


WAYS = (
    Way("layer_norm", layer_norm, 1, 1),
    Way("add_layer_norm", add_layer_norm, 2, 2),
    Way("layer_norm_quantised", layer_norm_quantised, 1, 0, 1, (Peer("passes", passes.norm_quantise),)),
    Way("add_layer_norm_quantised", add_layer_norm_quantised, 2, 1, 1, (Peer("passes", passes.add_norm_quantise),)),
)


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    wide, width = shapes.preset.vision.hidden_size, shapes.preset.encoder.hidden_size
    places = [("vit", shapes.tokens, wide), ("vit", IMAGES * shapes.tokens, wide), ("bert", NUM_QUESTION_TOKENS, width)]
    for dtype in dtypes:
        for tower, rows, columns in places:
            for way in WAYS:
                yield case(way, tower, rows, columns, dtype)
        yield backward("layer_norm_backward", shapes.tokens, wide, dtype)
        yield backward("add_layer_norm_backward", 48 * NUM_QUESTION_TOKENS, width, dtype)


def _inputs(generator: torch.Generator, matrices: int, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """`matrices` of (rows, columns), then weight and bias."""
    weight = 1 + normal(generator, columns, size=0.1).to(dtype)
    xs = [normal(generator, rows, columns, dtype=dtype) for _ in range(matrices)]
    return [*xs, weight, normal(generator, columns, dtype=dtype, size=0.1)]


def case(way: Way, tower: str, rows: int, columns: int, dtype: torch.dtype) -> Case:
    matrix = rows * columns * dtype.itemsize
    return Case(
        way.op, f"{tower} M={rows} C={columns}", str(dtype).removeprefix("torch."),
        lambda generator: tuple(_inputs(generator, way.reads, rows, columns, dtype)), way.call,
        flops=(8.0 + 3 * way.codes) * rows * columns, reads=way.reads * matrix,
        writes=way.writes * matrix + way.codes * rows * columns,
        peers=way.peers, caches=("warm", "cold") if rows > 1000 else ("warm",), kind="fp32",
        tolerance=_CODE if way.codes and dtype == torch.float32 else None,
    )  # fmt: skip


def backward(op: str, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Gradients of x, weight and bias from those of y (and of the sum)."""
    adds = op.startswith("add")

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        *incoming, x, weight, _ = _inputs(generator, 2 + adds, rows, columns, dtype)
        mean, variance = x.float().mean(-1), x.float().var(-1, correction=0)
        rest = (0.0, None) if adds else ()
        return *incoming, x, weight, mean, torch.rsqrt(variance + 1e-5), *rest

    matrix = rows * columns * dtype.itemsize
    return Case(
        op, f"M={rows} C={columns}", str(dtype).removeprefix("torch."), make, OPS[op],
        flops=14.0 * rows * columns, reads=(2 + adds) * matrix, writes=(1 + adds) * matrix, kind="fp32",
        caches=("warm", "cold") if rows > 1000 else ("warm",),
        tolerance=1e-4 if dtype == torch.float32 else 6e-2,  # the torch row adds weight gradients up in bfloat16
    )  # fmt: skip
