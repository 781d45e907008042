"""What the compiled CPU kernels of the attention family, and attention's Triton kernels, take, asked at every call.

Knows their limits; does not know the kernels.
"""

from typing import Any

import torch
from torch import Tensor

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})
_WIDTHS = (32, 64)


def misfit(scale: float, first: Tensor, *others: Tensor) -> str | None:
    """Why the kernels cannot take these (…, head width); None where they can."""
    if first.shape[-1] not in _WIDTHS:
        return f"heads are 32 or 64 wide, got {first.shape[-1]}"
    for t in (first, *others):
        if t.stride(-1) != 1:
            return "a head's numbers must lie side by side"
        if t.dtype != first.dtype:
            return f"takes one dtype for all, got {first.dtype} and {t.dtype}"
    return None if scale > 0 else f"scale must be above 0, got {scale}"


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, *_: Any) -> str | None:
    return misfit(scale, q, k, v)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, causal: bool, scale: float, *_: Any
) -> str | None:
    return misfit(scale, q, k, v)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    *_: Any,
) -> str | None:
    return misfit(scale, q, k, v)


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
    *_: Any,
) -> str | None:
    return misfit(scale, q, k, v)


_INT32 = 2**31


def _far(rows: int, *tensors: Tensor) -> str | None:
    """Within a sequence of `rows` Triton kernels count elements in int32."""
    for t in tensors:
        span = (rows - 1) * abs(t.stride(-3)) + t.shape[-2] * abs(t.stride(-2))
        if span >= _INT32:
            return f"a sequence spans {span} elements in memory; wanted less than 2^31"
    return None


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, *_: Any
) -> str | None:
    return misfit(scale, q, k, v) or _far(q.shape[1], q) or _far(k.shape[1], k, v)


def triton_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, causal: bool, scale: float, *_: Any
) -> str | None:
    return misfit(scale, q, k, v) or _far(max_length, q, k, v)


def triton_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> str | None:
    return triton_forward(q, k, v, *rest)


def triton_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> str | None:
    return triton_varlen_forward(q, k, v, *rest)
