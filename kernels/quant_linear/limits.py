"""What the Triton kernels refuse, and why. Does not import triton: asking costs nothing where it is not installed."""

import torch
from torch import Tensor

from miss.kernels.registry import FLOATS

DEPTH = 2**31 // 127**2  # columns whose int32 sum of products of two int8 numbers cannot overflow


def packed(data: Tensor, scale: Tensor, zero: Tensor | None = None) -> str | None:
    if data.dtype not in (torch.int8, torch.uint8):
        return "takes int8 and int4 weights"
    return laid_out(data, scale, zero)


def laid_out(data: Tensor, scale: Tensor, zero: Tensor | None = None) -> str | None:
    if not data.numel():
        return "needs a weight with at least one element"
    parts = (data, scale) if zero is None else (data, scale, zero)
    return None if all(t.is_contiguous() for t in parts) else "takes contiguous packed weights"


def forward(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *_: object) -> str | None:
    if bias is not None and bias.dtype not in FLOATS:
        return "takes a bias of float32, float16 or bfloat16"
    return packed(data, scale, zero)


def backward(dy: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int) -> str | None:
    return packed(data, scale, zero)


def embedding(
    scale: Tensor, data: Tensor, zero: Tensor | None, ids: Tensor, columns: int, group: int, dtype: torch.dtype
) -> str | None:
    if dtype not in FLOATS:
        return "makes float32, float16 and bfloat16"
    if ids.dtype not in (torch.int64, torch.int32):
        return "takes ids of int64 or int32"
    return packed(data, scale, zero)


def dynamic(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, panels: Tensor | None, offset: Tensor | None
) -> str | None:
    if data.shape[1] * (1 if data.dim() == 2 else data.shape[3]) > DEPTH:
        return f"its int32 sums hold {DEPTH} columns"
    return forward(x, data, scale, None, bias)


def fp8(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    if bias is not None and bias.dtype not in FLOATS:
        return "takes a bias of float32, float16 or bfloat16"
    return laid_out(data, scale)


def rows(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    panels: Tensor | None,
    offset: Tensor | None,
) -> str | None:
    if dtype not in FLOATS:
        return "makes float32, float16 and bfloat16"
    if residual is not None and residual.dtype not in FLOATS:
        return "takes a residual of float32, float16 or bfloat16"
    return dynamic(row_scale, data, scale, bias, panels, offset)


def rows_quantised(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    panels: Tensor | None,
    offset: Tensor | None,
) -> str | None:
    return dynamic(row_scale, data, scale, bias, panels, offset)


def quantise(x: Tensor) -> str | None:
    return None if x.shape[-1] else "needs at least one column"
