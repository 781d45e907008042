"""Products with packed weights by PyTorch's own kernels.

Knows PyTorch's functions and their shape rules; does not know other implementations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.quant_linear.packing import dequantise, row_major, rows_at
from miss.kernels.quant_linear.reference import quantise_rows, rescale
from miss.kernels.registry import HALVES


def forward(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    columns: int,
    group: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    if data.dtype == torch.int8 and x.dtype not in HALVES:
        # The codes are exact as floats, so that scaling the outputs spares a pass over the weight.
        y = F.linear(x, row_major(data, scale, columns).to(x.dtype)) * scale.to(x.dtype)
        return y if bias is None else y.add_(bias)
    weight = dequantise(data, scale, zero, columns, group, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def backward(dy: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int) -> Tensor:
    return dy @ dequantise(data, scale, zero, columns, group, dy.dtype)


def dynamic_limits(x: Tensor, data: Tensor, scale: Tensor, *_: object) -> str | None:
    """cuBLAS's int8 product wants multiples of 8 (rows are padded here); on CPU, torch 2.13's `_int_mm` over a single
    column adds what it finds in memory (200 random products of each of 385 small shapes: wrong for K = 1 alone)."""
    shape = len(scale), x.shape[-1]
    if x.device.type == "cpu" and shape[1] == 1:
        return "torch._int_mm is wrong for one column on CPU"
    if x.device.type == "cuda" and (shape[0] % 8 or shape[1] % 8):
        return f"torch._int_mm on cuda needs multiples of 8, got a weight of {shape}"
    return None


def dynamic(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    panels: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    data = row_major(data, scale, x.shape[-1])
    codes, x_scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    num_rows = len(codes)
    if x.device.type == "cuda" and 0 < num_rows <= 16:  # torch._int_mm takes more than 16 rows there
        codes = F.pad(codes, (0, 0, 0, 17 - num_rows))
    empty = 0 in (num_rows, *data.shape)
    total = codes.new_zeros(num_rows, len(data), dtype=torch.int32) if empty else torch._int_mm(codes, data.t())
    return rescale(total[:num_rows], x_scale, scale, bias, x.dtype).view(*x.shape[:-1], len(data))


def embedding(
    scale: Tensor, data: Tensor, zero: Tensor | None, ids: Tensor, columns: int, group: int, dtype: torch.dtype
) -> Tensor:
    rows = None if zero is None else zero[ids]
    return dequantise(rows_at(data, scale, ids, columns), scale[ids], rows, columns, group, dtype).contiguous()
