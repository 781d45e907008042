"""Attention by flash-attn 4 (CuTe DSL), where it is installed. Never run here: written to its public interface.

Knows the library's calls; does not know its limits (libraries.py). It is a pre-release whose optional arguments move,
so that they are named here, and whose logarithms of sums come along only with gradients: none are given.
"""

from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
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
) -> tuple[Tensor, None]:
    """(out (B, T, H, D), None)."""
    result = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
    return result[0] if isinstance(result, tuple) else result, None


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
) -> tuple[Tensor, None]:
    """(out (total, H, D), None)."""
    result = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, softmax_scale=scale, causal=causal
    )
    return result[0] if isinstance(result, tuple) else result, None
