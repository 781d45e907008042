"""Writing to the slot cache: a token a row, and the reordering of beams."""

from collections.abc import Iterator

import torch
from torch import Tensor

from miss.benchmarks.cases import Case
from miss.benchmarks.inputs import normal
from miss.benchmarks.shapes import IMAGES, Shapes
from miss.kernels.kv_cache import kv_append, kv_reorder

_POSITIONS = 40
_BEAMS = 3


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    decoder = shapes.preset.decoder
    heads, width = decoder.num_heads, decoder.hidden_size // decoder.num_heads
    for dtype in dtypes:
        for rows in (_BEAMS, _BEAMS * IMAGES):
            yield _append(rows, heads, width, dtype)
            yield _reorder(rows, heads, width, dtype)


def _caches(generator: torch.Generator, rows: int, heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(generator, rows, _POSITIONS, heads, width, dtype=dtype) for _ in range(2)]


def _append(rows: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        new = (normal(generator, rows, heads, width, dtype=dtype) for _ in range(2))
        slots = torch.arange(rows, dtype=torch.int32, device=generator.device)
        return *_caches(generator, rows, heads, width, dtype), *new, slots, slots % _POSITIONS

    def call(k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        kv_append(k_cache, v_cache, *rest)
        return k_cache, v_cache

    moved = 2.0 * rows * heads * width * dtype.itemsize
    return Case(
        "kv_append", f"{rows} rows H={heads} D={width}", str(dtype).removeprefix("torch."), make, call,
        flops=0.0, reads=moved, writes=moved, caches=("warm", "cold"), kind="fp32",
    )  # fmt: skip


def _reorder(rows: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    """Every beam takes its neighbour's tokens."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        target = torch.arange(rows, dtype=torch.int32, device=generator.device)
        source = target // _BEAMS * _BEAMS + (target + 1) % _BEAMS
        return *_caches(generator, rows, heads, width, dtype), source, target

    def call(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        kv_reorder(k_cache, v_cache, source, target)
        return k_cache, v_cache

    moved = 2.0 * rows * _POSITIONS * heads * width * dtype.itemsize
    return Case(
        "kv_reorder", f"{rows} slots L={_POSITIONS} H={heads} D={width}", str(dtype).removeprefix("torch."), make, call,
        flops=0.0, reads=moved, writes=moved, caches=("warm", "cold"), kind="fp32",
    )  # fmt: skip
