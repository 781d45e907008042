"""Cross-attention in plain PyTorch, each row with a copy of its source: the definition that the fast ones must match.

Knows the formulas; does not know speed. Computes in float32 (float64 in float64), whatever autocast says.
Shapes: R rows, T queries, I images, N keys, H heads, D head width, C token width.
"""

import torch
from torch import Tensor

from miss.kernels.attention import reference as attention
from miss.kernels.attention.reference import attend, attend_backward, keep_of, visible_keys, without_autocast
from miss.kernels.cross_attention.rows import check_index
from miss.kernels.registry import accumulator


def _visible(lengths: Tensor | None, image_index: Tensor, num_keys: int) -> Tensor | None:
    return None if lengths is None else visible_keys(lengths[image_index], False, 1, num_keys, image_index.device)


@without_autocast
def kv_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_index(image_index, k.shape[0])
    visible = _visible(lengths, image_index, k.shape[1])
    keep = keep_of(seed, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dropout_p, q)
    return attend(q, k[image_index], v[image_index], visible, scale, keep)


def probabilities(
    q: Tensor, k: Tensor, image_index: Tensor, lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Where each row looks: the softmax itself, (R, H, T, N), float32 (float64 in float64), rows that sum to 1 (or to 0
    where nothing is visible). Arguments as `cross_attention`'s. For explanations: it keeps the whole matrix.

    Raises:
        ValueError: shapes that do not fit each other, or an index unsorted or out of range (CPU).
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[2:] != k.shape[2:] or image_index.shape != q.shape[:1]:
        raise ValueError(
            f"probabilities: got q {tuple(q.shape)}, k {tuple(k.shape)}, image_index {tuple(image_index.shape)}; "
            "wanted (R, T, H, D), (I, N, H, D), (R,)"
        )
    check_index(image_index, k.shape[0])
    valid = None if lengths is None else lengths[image_index]
    return attention.attention_probabilities(q, k[image_index], valid, False, scale)


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and dk, dv summed over the rows of each image, in the accumulator's dtype."""
    visible = _visible(lengths, image_index, k.shape[1])
    keep = keep_of(seed, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dropout_p, q)
    dq, *each = attend_backward(dout, q, k[image_index], v[image_index], lse, visible, scale, keep)
    dk, dv = (d.new_zeros(k.shape).index_add_(0, image_index, d) for d in each)
    return dq, dk, dv


@without_autocast
def kv_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _gradients(dout, q, k, v, lse, image_index, lengths, scale, dropout_p, seed)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _project(x: Tensor, w_k: Tensor, w_v: Tensor, b_v: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """k, v (I, N, H, D) in the accumulator's dtype."""
    dtype = accumulator(x.dtype)
    k, v = x.to(dtype) @ w_k.to(dtype).T, x.to(dtype) @ w_v.to(dtype).T
    v = v if b_v is None else v + b_v.to(dtype)
    return k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))


@without_autocast
def tokens_forward(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    k, v = _project(x, w_k, w_v, b_v, q.shape[2])
    out, lse = kv_forward(q.to(k.dtype), k, v, image_index, lengths, scale, dropout_p, seed)
    return out.to(q.dtype), lse


@without_autocast
def tokens_backward(
    dout: Tensor,
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    k, v = _project(x, w_k, w_v, b_v, q.shape[2])
    dq, dk, dv = _gradients(dout, q, k, v, lse, image_index, lengths, scale, dropout_p, seed)
    dk, dv = dk.flatten(-2), dv.flatten(-2)
    dx = dk @ w_k.to(dk.dtype) + dv @ w_v.to(dv.dtype)
    dw_k, dw_v = (torch.einsum("inf,inc->fc", d, x.to(d.dtype)) for d in (dk, dv))
    db_v = None if b_v is None else dv.sum((0, 1)).to(b_v.dtype)
    return dq.to(q.dtype), dx.to(x.dtype), dw_k.to(w_k.dtype), dw_v.to(w_v.dtype), db_v
