"""Attention as a good PyTorch programmer writes it: SDPA, or matrix products and a softmax where those are faster.

Knows which of them is faster on CPU by dtype and shape; does not know other implementations. The backward is explicit:
inside a custom operator PyTorch records no graph to differentiate.
Shapes: B batch, T queries, N keys, H heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from miss.kernels.attention.reference import visible_keys
from miss.kernels.dropout import keep_scale

_PLAIN_SCORES = 1024 * 1024
_SINGLE_KEYS = 64


def _prefers_plain(q: Tensor, k: Tensor) -> bool:
    """Whether products and a softmax beat SDPA, by dtype and shape alone: never by what shares the batch.

    CPU time on one core with avx512_bf16, torch 2.13, forward + backward, SDPA against plain:
        (B, T, N, H, D)       bfloat16           float32          float16
        (32, 20, 20, 12, 32)   27.3 /  4.6 ms     5.1 /  4.6 ms    13.9 /  21.5 ms
        (32, 20, 65, 12, 32)   32.9 /  7.5 ms    13.1 / 16.8 ms    33.9 /  48.7 ms
        (6, 257, 257, 6, 64)   41.2 / 19.2 ms    32.9 / 38.1 ms     252 /   327 ms
        (1, 901, 901, 12, 64)   126 / 72.7 ms     126 /  145 ms     944 /  1752 ms
    Forward alone: bfloat16 1.1 to 2 times faster plain, float32 up to 1.6 times slower. Above 1024 x 1024 the matrix of
    scores is not worth its memory.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] * k.shape[1] <= _PLAIN_SCORES


def _prefers_single(q: Tensor, k: Tensor) -> bool:
    """One query over few keys, as in decoding: multiply and add over (B, N, H, D) as it lies, instead of copying to
    (B, H, N, D) for a product of one row. Same core, forward, best of the others against this: (96, 40, 12, 32) float32
    3.0 / 1.3 ms, bfloat16 1.9 / 1.5 ms; (3, 10, 12, 32) 46 / 31 us, 61 / 37 us."""
    return q.device.type == "cpu" and q.shape[1] == 1 and k.shape[1] <= _SINGLE_KEYS


def _single(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, keep: Tensor | None) -> Tensor:
    scores = (q * k).sum(-1) * scale  # (B, N, H)
    if visible is not None:
        scores = scores.masked_fill_(~visible[:, 0, 0, :, None], torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, 1, dtype=scores.dtype)
    p = p if keep is None else p * keep[:, :, 0].transpose(1, 2)
    return (p[..., None] * v).sum(1, keepdim=True)


def _plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, keep: Tensor | None) -> Tensor:
    scores = (q * scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    if visible is not None:
        scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, -1, dtype=scores.dtype)  # the dtype said, or autocast would make it float32
    return ((p if keep is None else p * keep) @ v.transpose(1, 2)).transpose(1, 2)


def _plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, query, keys, values = dout.transpose(1, 2), (q * scale).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = query @ keys.transpose(2, 3)
    if visible is not None:
        scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, -1, dtype=scores.dtype)
    dp = dout @ values.transpose(2, 3)
    dropped, dp = (p, dp) if keep is None else (p * keep, dp.mul_(keep))
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # sums in float32, rounds once
    grads = (ds @ keys).mul_(scale), ds.transpose(2, 3) @ query, dropped.transpose(2, 3) @ dout
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


def shown_lengths(lengths: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(lengths that leave every row a key, which rows (B, 1, 1, 1) have none; None where CPU can see that all have).

    A row without a key sees its first one and is zeroed afterwards: a softmax over nothing would be NaN in backward.
    """
    if lengths is None:
        return None, None
    nothing = lengths == 0
    if lengths.device.type == "cpu" and not nothing.any():
        return lengths, None
    return lengths.clamp(min=1), nothing.view(-1, 1, 1, 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, keep: Tensor | None
) -> Tensor:
    """out (B, T, H, width of v); `keep` is dropout's factor on the probabilities (B, H, T, N)."""
    shown, nothing = shown_lengths(lengths)
    square = causal and shown is None and q.shape[1] == k.shape[1]
    by_product = _prefers_single(q, k) or keep is not None or _prefers_plain(q, k)
    visible = None
    if by_product or not square:  # SDPA knows a square triangle without a mask
        visible = visible_keys(shown, causal, q.shape[1], k.shape[1], q.device)
    if by_product:
        out = (_single if _prefers_single(q, k) else _plain)(q, k, v, visible, scale, keep)
    else:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible, is_causal=square, scale=scale
        ).transpose(1, 2)
    return out if nothing is None else out.masked_fill(nothing, 0.0)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attend`, by products and a softmax at every shape and dtype: SDPA's backward needs its graph."""
    shown, nothing = shown_lengths(lengths)
    dout = dout if nothing is None else dout.masked_fill(nothing, 0.0)
    return _plain_backward(dout, q, k, v, visible_keys(shown, causal, q.shape[1], k.shape[1], q.device), scale, keep)


def _keep(q: Tensor, k: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    if seed is None:
        return None
    return keep_scale(seed, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dropout_p, q.device, q.dtype)


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
    return attend(q, k, v, lengths, causal, scale, _keep(q, k, dropout_p, seed)), None


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
) -> tuple[Tensor, Tensor, Tensor]:
    return attend_backward(dout, q, k, v, lengths, causal, scale, _keep(q, k, dropout_p, seed))


class Padding:
    """Packed rows (total, …) to (B, max_length, …) and back, by indices made on the device: nothing waits for offsets'
    values. Where the rows fill the padded batch, which their number tells, both are views."""

    def __init__(self, total: int, offsets: Tensor, max_length: int) -> None:
        self.shape = (offsets.shape[0] - 1, max_length)
        self.lengths: Tensor | None = None
        if total == self.shape[0] * max_length:
            return
        self.lengths = offsets.diff()
        steps = torch.arange(max_length, device=offsets.device)
        # A row is padded with its own last token: another row's may be NaN, and masked values are multiplied by zero.
        inside = torch.minimum(steps, (self.lengths[:, None] - 1).clamp(min=0))
        self.source = (offsets[:-1, None] + inside).clamp_(max=total - 1).flatten()
        rows = torch.arange(total, device=offsets.device)
        sequence = torch.searchsorted(offsets[1:].to(torch.int64), rows, right=True)
        self.place = sequence * max_length + rows - offsets[sequence]

    def pad(self, rows: Tensor) -> Tensor:
        return (rows if self.lengths is None else rows.index_select(0, self.source)).unflatten(0, self.shape)

    def unpad(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1) if self.lengths is None else padded.flatten(0, 1).index_select(0, self.place)

    def keep(self, q: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
        """Dropout's factor (B, H, max_length, max_length) of the mask over (total, H, max_length)."""
        if seed is None:
            return None
        return self.pad(keep_scale(seed, (*q.shape[:2], self.shape[1]), dropout_p, q.device, q.dtype)).transpose(1, 2)


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
    if q.shape[0] == 0:
        return q + k + v, None  # no rows, yet all that autograd expects to have been used
    padding = Padding(q.shape[0], offsets, max_length)
    padded = [padding.pad(t) for t in (q, k, v)]
    out = attend(padded[0], padded[1], padded[2], padding.lengths, causal, scale, padding.keep(q, dropout_p, seed))
    return padding.unpad(out), None


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
) -> tuple[Tensor, Tensor, Tensor]:
    if q.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    padding = Padding(q.shape[0], offsets, max_length)
    keep = padding.keep(q, dropout_p, seed)
    dout, q, k, v = (padding.pad(t) for t in (dout, q, k, v))
    if padding.lengths is not None:  # what pads the batch are copies of real rows
        past = torch.arange(max_length, device=q.device) >= padding.lengths[:, None]
        dout = dout.masked_fill(past[..., None, None], 0.0)
    grads = attend_backward(dout, q, k, v, padding.lengths, causal, scale, keep)
    return padding.unpad(grads[0]), padding.unpad(grads[1]), padding.unpad(grads[2])
