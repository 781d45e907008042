"""Attention by flash-attn 2, where it is installed. Never run here: written to its public interface.

Knows the library's calls; does not know its limits (libraries.py). Its backward is asked for the same bits at every
run, as the other rows give; autograd sees through the call. Causal is aligned to the last query and key, as ours.
"""

from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func
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
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), lse (B, H, T))."""
    out, lse, _ = flash_attn_func(
        q, k, v, softmax_scale=scale, causal=causal, deterministic=True, return_attn_probs=True
    )
    return out, lse


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
) -> tuple[Tensor, Tensor]:
    """(out (total, H, D), lse (total, H)); the library's is (H, total)."""
    out, lse, _ = flash_attn_varlen_func(
        *(q, k, v, offsets, offsets, max_length, max_length),
        softmax_scale=scale,
        causal=causal,
        deterministic=True,
        return_attn_probs=True,
    )
    return out, lse.transpose(0, 1)
