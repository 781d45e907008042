"""PyTorch's own products with int8 and int4 weights on CPU, those that gpt-fast and torchao reach.

Knows those two functions and their layouts; does not know our implementations. They take any number of rows, are made
for few, and add no bias.
"""

from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Bound
from miss.kernels.quant_linear import PackedWeight
from miss.kernels.quant_linear.packing import from_nibbles


def missing(scheme: str, outputs: int, columns: int) -> str | None:
    """torch 2.13's bfloat16 x int8 product reads beyond the rows of other widths: NaN at (64, 36), a segmentation fault
    at (70, 36)."""
    if scheme == "w8":
        return None if columns % 16 == 0 else f"_weight_int8pack_mm wants multiples of 16 columns, got {columns}"
    if outputs % 16 or columns % 64:
        return f"_weight_int4pack_mm wants multiples of 16 rows and 64 columns, got ({outputs}, {columns})"
    return None


def weight_only(x: Tensor, weight: PackedWeight, bias: Tensor) -> Bound:
    """x @ unpack(weight).T + bias, the bias in a pass."""
    rows, shape = x.flatten(0, -2), (*x.shape[:-1], weight.shape[0])
    product = _int8(rows, weight) if weight.scheme == "int8" else _int4(rows, weight)
    return lambda: product().add_(bias).view(shape)


def _int8(rows: Tensor, weight: PackedWeight) -> Bound:
    scale = weight.scale.to(rows.dtype)
    run: Any = torch.ops.aten._weight_int8pack_mm
    return lambda: run(rows, weight.data, scale)


def _int4(rows: Tensor, weight: PackedWeight) -> Bound:
    codes = from_nibbles(weight.data, weight.group).flatten(1).to(torch.int32)  # (code - 8) * scale + zero
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = weight.scale.T.to(rows.dtype)
    scales = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    run: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda: run(rows, packed, weight.group, scales)
