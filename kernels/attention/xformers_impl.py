"""Attention by xformers, where it is installed. Never run here: written to its public interface.

Knows the library's calls and masks; does not know its limits (libraries.py). Packed sequences are said as a list of
lengths, so that a call waits for the device; no logarithms of sums are given.
"""

from torch import Tensor
from xformers.ops import memory_efficient_attention
from xformers.ops.fmha.attn_bias import BlockDiagonalMask, LowerTriangularFromBottomRightMask, LowerTriangularMask


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
    mask = None
    if causal:
        mask = LowerTriangularMask() if q.shape[1] == k.shape[1] else LowerTriangularFromBottomRightMask()
    return memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale), None


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
    mask = BlockDiagonalMask.from_seqlens(offsets.diff().tolist())
    if causal:
        mask = mask.make_causal()
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0], None
