"""Attention as a good PyTorch programmer writes it: SDPA, or matrix products and a softmax where those are faster.

Knows which of the two is faster on CPU by shape; does not know other implementations.
Shapes: B batch, T queries, N keys, H heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from miss.kernels.attention.reference import visible_keys
from miss.kernels.dropout import keep_scale

_PLAIN_SCORES = 128 * 128


def _prefers_plain(q: Tensor, k: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[1] * k.shape[1] <= _PLAIN_SCORES


def _plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, keep: Tensor | None) -> Tensor:
    scores = (q * scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    if visible is not None:
        scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, -1, dtype=scores.dtype)  # the dtype said, or autocast would make it float32
    return ((p if keep is None else p * keep) @ v.transpose(1, 2)).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, keep: Tensor | None
) -> Tensor:
    """out (B, T, H, width of v); `keep` is dropout's factor on the probabilities (B, H, T, N)."""
    empty = lengths is not None and (lengths.device.type != "cpu" or bool((lengths == 0).any()))
    # A row without a key sees its first one here and is zeroed below: a softmax over nothing would be NaN in backward.
    shown = lengths.clamp(min=1) if lengths is not None and empty else lengths
    if keep is not None or _prefers_plain(q, k):
        out = _plain(q, k, v, visible_keys(shown, causal, q.shape[1], k.shape[1], q.device), scale, keep)
    else:
        square = causal and shown is None and q.shape[1] == k.shape[1]
        visible = None if square else visible_keys(shown, causal, q.shape[1], k.shape[1], q.device)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible, is_causal=square, scale=scale
        ).transpose(1, 2)
    return out.masked_fill((lengths == 0).view(-1, 1, 1, 1), 0.0) if lengths is not None and empty else out


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
    keep = None
    if seed is not None:
        keep = keep_scale(seed, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dropout_p, q.device, q.dtype)
    return attend(q, k, v, lengths, causal, scale, keep), None


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
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        again, _ = forward(leaves[0], leaves[1], leaves[2], lengths, causal, scale, dropout_p, seed)
    return torch.autograd.grad(again, leaves, dout)


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
    """Padded to (B, max_length) and back by indices that are made on the device: nothing waits for offsets' values."""
    total, batch = q.shape[0], offsets.shape[0] - 1
    if total == 0:
        return q * 1.0, None
    keep = None if seed is None else keep_scale(seed, (*q.shape[:2], max_length), dropout_p, q.device, q.dtype)
    if total == batch * max_length:  # every sequence is of full length
        lengths, pad = None, None
    else:
        lengths = offsets.diff()
        steps = torch.arange(max_length, device=q.device)
        pad = (offsets[:-1, None] + steps).clamp_(max=total - 1).flatten()

    def padded(x: Tensor) -> Tensor:
        return (x if pad is None else x.index_select(0, pad)).unflatten(0, (batch, max_length))

    keep = None if keep is None else padded(keep).transpose(1, 2)
    out = attend(padded(q), padded(k), padded(v), lengths, causal, scale, keep).flatten(0, 1)
    if pad is None:
        return out, None
    rows = torch.arange(total, device=q.device)
    sequence = torch.searchsorted(offsets[1:].to(torch.int64), rows, right=True)
    return out.index_select(0, sequence * max_length + rows - offsets[sequence]), None


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
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        again, _ = varlen_forward(leaves[0], leaves[1], leaves[2], offsets, max_length, causal, scale, dropout_p, seed)
    return torch.autograd.grad(again, leaves, dout)
