"""What the Triton kernels refuse, and why. Does not import triton: asking costs nothing where it is not installed."""

import torch
from torch import Tensor

from miss.kernels.registry import FLOATS

DEPTH = 2**31 // 127**2  # columns whose int32 sum of products of two int8 numbers cannot overflow


def packed(data: Tensor, scale: Tensor, zero: Tensor | None = None) -> str | None:
    if not data.numel():
        return "needs a weight with at least one element"
    parts = (data, scale) if zero is None else (data, scale, zero)
    return None if all(t.is_contiguous() for t in parts) else "takes contiguous packed weights"


def forward(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *_: object) -> str | None:
    if bias is not None and bias.dtype not in FLOATS:
        return "takes a bias of float32, float16 or bfloat16"
    return packed(data, scale, zero)


def embedding(
    scale: Tensor, data: Tensor, zero: Tensor | None, ids: Tensor, columns: int, group: int, dtype: torch.dtype
) -> str | None:
    if dtype not in FLOATS:
        return "makes float32, float16 and bfloat16"
    if ids.dtype not in (torch.int64, torch.int32):
        return "takes ids of int64 or int32"
    return packed(data, scale, zero)
