"""Attention within trees of tokens: each node over its ancestors and itself, many trees packed together.

Knows the contract and who computes it; does not know what the tokens are.

    out[n,h] = sum_j P[n,h,j] v[a,h]    P = softmax over j with a >= 0 of scale * q[n,h] . k[a,h];  a = ancestors[n,j]

Answers that begin alike share their beginning, so that a list of them is computed once a distinct prefix, in one pass.

q, k, v, out (N, H, D), any strides; ancestors int32 or int64 (N, L): rows of q, k and v in any order, -1 for none; a
node's own row is among them where it shall see itself; a row of -1 alone gives zeros. float16, bfloat16, float32,
float64, one dtype for all; sums in float32 (float64 in float64). A node does not see rows that are not named: what they
hold does not matter. Row 0 may be read for -1 and multiplied by zero: it must be finite. NaN and infinity among what a
node sees as in `attention`.
Ancestors in [-1, N) are the caller's word: reading them on the host would wait for a CUDA device.

No gradient: candidates are scored, not trained on.
"""

import torch
from torch import Tensor

from miss.kernels.attention import limits
from miss.kernels.registry import ALL_FLOATS, Impl, Op, autocast_to, triton
from miss.kernels.tree_attention import reference, torch_impl


def _fits(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, scale: float) -> str | None:
    return limits.misfit(scale, q, k, v)


FORWARD = Op(
    "tree_attention",
    triton("tree_attention.triton_impl", "forward", _fits),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::tree_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, scale: float) -> Tensor:
    return FORWARD(q, k, v, ancestors, scale).contiguous()


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def tree_attention(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, scale: float | None = None) -> Tensor:
    """out (N, H, D) of q, k, v (N, H, D).

    Args:
        ancestors: int32 or int64 (N, L), the rows that each node sees, filled up with -1.
        scale: D ** -0.5 where None.

    Raises:
        ValueError: shapes that do not fit each other, or ancestors that are no whole numbers.
    """
    if q.dim() != 3 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"tree_attention: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted (N, H, D) of all"
        )
    if ancestors.dim() != 2 or len(ancestors) != len(q) or ancestors.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"tree_attention: ancestors are {ancestors.dtype} {tuple(ancestors.shape)}; wanted int32 or int64 "
            f"({len(q)}, L)"
        )
    q, k, v = autocast_to(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return FORWARD.call(_forward, q, k, v, ancestors, scale)
