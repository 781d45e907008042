"""Attention by flash-attn 3 (Hopper), where it is installed. Never run here: written to its public interface.

Knows the library's calls; does not know its limits (libraries.py). Its releases differ in whether the logarithms of
sums come along unasked; where they do not, none are given, as by the `torch` row.
"""

from typing import Any

from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(out (B, T, H, D), lse (B, H, T) or None)."""
    return _parts(flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, deterministic=True))


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(out (total, H, D), lse (total, H) or None); the library's is (H, total)."""
    result = flash_attn_varlen_func(
        *(q, k, v, offsets, offsets, max_length, max_length), softmax_scale=scale, causal=causal, deterministic=True
    )
    out, lse = _parts(result)
    return out, None if lse is None else lse.transpose(0, 1)


def _parts(result: Any) -> tuple[Tensor, Tensor | None]:
    return (result[0], result[1]) if isinstance(result, tuple) else (result, None)
