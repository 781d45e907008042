"""Self-attention whose scores are products of int8 codes, for models whose linear layers are quantised anyway.

Knows the formula and who computes it; does not know who asks, or how codes are multiplied.

    k' = k - mean of k over its tokens          (moves all scores of a query alike: no probability changes)
    s[t, n] = scale * a[t] b[n] * (Q[t] . K[n]),   Q = round(q / a), K = round(k' / b)
    a, b = a token's largest number in the head / 127
    out = softmax(s) v

The mean taken off the keys and a scale a token are SageAttention's (Zhang et al., arXiv 2410.02367); probabilities
times values stay in v's dtype. q, k, v, out (B, N, H, D); every query sees every key; sums of codes are exact. For
inference: no gradient. It is for processors whose products of codes are faster: elsewhere the `torch` row computes the
scores as `attention` does, which errs less.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.attention import torch_impl
from miss.kernels.attention.limits import CPU_DTYPES, misfit
from miss.kernels.attention.reference import without_autocast
from miss.kernels.registry import ALL_FLOATS, Impl, Op, accumulator, autocast_to, lazy


def _limits(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    return misfit(scale, q, k, v)


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch_impl.forward(q, k, v, None, False, scale, 0.0, None)[0]


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers -127 … 127, their scale (…, 1)) of x (…, D): ties to even, scale 1 for zeros, NaN for NaN."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return torch.round(x / scale), torch.where(largest.isfinite(), scale, torch.nan)


@without_autocast
def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    dtype = accumulator(q.dtype)
    queries, a = codes_of(q.to(dtype))
    keys, b = codes_of(k.to(dtype) - k.to(dtype).mean(1, keepdim=True))
    scores = torch.einsum("bthd,bnhd->bhtn", queries, keys)
    scores = scores * scale * a.permute(0, 2, 1, 3) * b.permute(0, 2, 3, 1)
    return torch.einsum("bhtn,bnhd->bthd", torch.softmax(scores, -1), v.to(dtype)).to(q.dtype)


FORWARD = Op(
    "attention_quantised",
    Impl(
        "cpu",
        lazy("attention.cpu_impl", "quantised"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_limits,
    ),
    Impl("torch", _torch, dtypes=ALL_FLOATS),
    Impl("reference", _reference, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::attention_quantised", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return FORWARD(q, k, v, scale).contiguous()  # type: ignore[no-any-return]


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def attention_quantised(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """out (B, N, H, D) of q, k, v (B, N, H, D), N at least 1. scale: D ** -0.5 where None.

    Raises:
        ValueError: shapes that differ, or no token.
    """
    if q.dim() != 4 or not q.shape == k.shape == v.shape or q.shape[1] == 0:
        shapes: Any = [tuple(t.shape) for t in (q, k, v)]
        raise ValueError(f"attention_quantised: got q, k, v {shapes}; wanted (B, N, H, D) three times, N at least 1")
    q, k, v = autocast_to(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return FORWARD.call(_forward, q, k, v, scale)  # type: ignore[no-any-return]
