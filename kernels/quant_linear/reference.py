"""Products with packed weights in plain PyTorch: the definition that the fast ones must match.

Knows the formulas; does not know speed. The packing's meaning is `packing.dequantise`.

Shapes: R rows, K inputs, N outputs.
"""

import torch
from torch import Tensor

from miss.kernels.quant_linear.packing import dequantise, row_major
from miss.kernels.registry import accumulator


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
    acc = accumulator(x.dtype)
    y = x.to(acc) @ dequantise(data, scale, zero, columns, group, acc).T
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def backward(dy: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int) -> Tensor:
    acc = accumulator(dy.dtype)
    return (dy.to(acc) @ dequantise(data, scale, zero, columns, group, acc)).to(dy.dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 (R, K), scale (R, 1)) of x (R, K): scale = max|row| / 127, codes rounded half to even."""
    xf = x.to(accumulator(x.dtype))
    largest = xf.abs().amax(-1, keepdim=True) if x.shape[-1] else xf.new_zeros(len(x), 1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return torch.round(xf / scale).clamp_(-127, 127).to(torch.int8), scale


def rescale(total: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The int32 sums (R, N) as numbers: (total * x_scale) * scale + bias, in the accumulator of `dtype`."""
    acc = accumulator(dtype)
    y = (total.to(acc) * x_scale) * scale.to(acc)
    return (y if bias is None else y + bias.to(acc)).to(dtype)


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
    # In float64 the sums are exact whatever the order (below 2**53), and CUDA has no product of int32 matrices.
    total = (codes.double() @ data.double().T).to(torch.int32)
    return rescale(total, x_scale, scale, bias, x.dtype).view(*x.shape[:-1], len(data))


def embedding(
    scale: Tensor, data: Tensor, zero: Tensor | None, ids: Tensor, columns: int, group: int, dtype: torch.dtype
) -> Tensor:
    table = dequantise(data, scale, zero, columns, group, dtype)
    return table[ids]
