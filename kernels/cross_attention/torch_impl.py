"""Cross-attention without repeating a source's keys and values: the rows of one image become one longer query.

Knows how to group rows by what it may read of the index; does not know other implementations.
Shapes: R rows, T queries, I images, N keys, H heads, D head width, C token width, G rows of the image with the most.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from miss.kernels.attention.torch_impl import attend
from miss.kernels.cross_attention.rows import count_rows
from miss.kernels.dropout import keep_scale

_LOOP_WORTH = 4_000_000  # multiply-adds


def _keep(seed: Tensor | None, shape: tuple[int, ...], dropout_p: float, like: Tensor) -> Tensor | None:
    return None if seed is None else keep_scale(seed, shape, dropout_p, like.device, like.dtype)


def _fold(rows: Tensor, images: int) -> Tensor:
    """(I * G, T, …) -> (I, G * T, …)."""
    return rows.unflatten(0, (images, -1)).flatten(1, 2)


def _fold_keep(keep: Tensor | None, images: int) -> Tensor | None:
    """(I * G, H, T, N) -> (I, H, G * T, N)."""
    return None if keep is None else _fold(keep.transpose(1, 2), images).transpose(1, 2)


def _grouped(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, keep: Tensor | None) -> Tensor:
    """Every image has the same number of rows: one call, no copies of k and v."""
    images, queries = k.shape[0], q.shape[1]
    out = attend(_fold(q, images), k, v, lengths, False, scale, _fold_keep(keep, images))
    return out.unflatten(1, (-1, queries)).flatten(0, 1)


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    counts: list[int],
    lengths: Tensor | None,
    scale: float,
    keep: Tensor | None,
) -> Tensor:
    """Rows are padded to the largest group: the queries are copied, the keys and values are not."""
    images, largest = k.shape[0], max(counts)
    starts = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    index = image_index.long()
    place = index * largest + torch.arange(q.shape[0]) - starts[index]

    def pad(rows: Tensor) -> Tensor:
        return rows.new_zeros(images * largest, *rows.shape[1:]).index_copy(0, place, rows)

    out = _grouped(pad(q), k, v, lengths, scale, None if keep is None else pad(keep))
    return out.index_select(0, place)


def _looped(
    q: Tensor, k: Tensor, v: Tensor, counts: list[int], lengths: Tensor | None, scale: float, keep: Tensor | None
) -> Tensor:
    """One call an image that has rows, on slices. `split`, because the backward of each slice `k[i:i+1]` would fill and
    add a gradient of k's whole size."""
    rows = q.split(counts)
    keeps = [None] * len(counts) if keep is None else keep.split(counts)
    sources = zip(rows, k.split(1), v.split(1), keeps, strict=True)
    return torch.cat(
        [
            _grouped(one, key, value, None if lengths is None else lengths[i : i + 1], scale, kept)
            for i, (one, key, value, kept) in enumerate(sources)
            if counts[i]
        ]
    )


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    keep: Tensor | None,
) -> Tensor:
    """out (R, T, H, width of v) of q (R, T, H, D) over k, v (I, N, H, ·)."""
    if q.device.type != "cpu":
        if k.shape[0] == 1:
            return _grouped(q, k, v, lengths, scale, keep)
        # How many rows an image has stands on the device. SDPA has no index into its keys: they are gathered.
        gathered = None if lengths is None else lengths.index_select(0, image_index)
        return attend(q, k.index_select(0, image_index), v.index_select(0, image_index), gathered, False, scale, keep)
    counts = count_rows(image_index, k.shape[0])
    if not q.shape[0]:
        # No rows, yet everything that autograd expects to have been used.
        return (q * k.sum((0, 1))).sum(-1, keepdim=True) * v.sum((0, 1))
    if min(counts) == max(counts):
        return _grouped(q, k, v, lengths, scale, keep)
    padding = len(counts) * max(counts) - len(q)
    if padding * q[0].numel() * k.shape[1] * 2 <= sum(map(bool, counts)) * _LOOP_WORTH:
        return _padded(q, k, v, image_index, counts, lengths, scale, keep)
    return _looped(q, k, v, counts, lengths, scale, keep)


def kv_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, None]:
    keep = _keep(seed, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dropout_p, q)
    return attend_rows(q, k, v, image_index, lengths, scale, keep), None


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
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        again, _ = kv_forward(leaves[0], leaves[1], leaves[2], image_index, lengths, scale, dropout_p, seed)
    return torch.autograd.grad(again, leaves, dout)


def _by_head(rows: Tensor, weight: Tensor) -> Tensor:
    """(R, T, H, A) times each head's (H, A, B) -> (R, T, H, B)."""
    return torch.matmul(rows.flatten(0, 1).transpose(0, 1), weight).transpose(0, 1).unflatten(0, rows.shape[:2])


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
) -> tuple[Tensor, None]:
    """The weights are absorbed into the queries and the output; then all heads of a row are queries over one key, x."""
    num_rows, queries, heads, _ = q.shape
    keep = _keep(seed, (num_rows, heads, queries, x.shape[1]), dropout_p, q)
    absorbed = _by_head(q, w_k.unflatten(0, (heads, -1))).flatten(1, 2)[:, :, None]  # (R, T * H, 1, C)
    value = x[:, :, None]
    if keep is not None:
        keep = keep.transpose(1, 2).flatten(1, 2)[:, None]  # (R, 1, T * H, N)
        # Dropped probabilities do not sum to 1: a last column of ones says to what, which is b_v's factor.
        value = F.pad(value, (0, 1), value=1.0)
    mixed = attend_rows(absorbed, x[:, :, None], value, image_index, lengths, scale, keep)
    mixed = mixed[:, :, 0].unflatten(1, (queries, heads))  # (R, T, H, C) or C + 1
    width = x.shape[2]
    out = _by_head(mixed[..., :width], w_v.unflatten(0, (heads, -1)).transpose(1, 2))
    if b_v is None:
        return out, None
    bias = b_v.unflatten(0, (heads, -1))
    if keep is not None:
        return out + mixed[..., width:] * bias, None
    if lengths is not None:
        bias = bias * (lengths > 0).index_select(0, image_index).view(-1, 1, 1, 1)
    return out + bias, None


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
) -> tuple[Tensor | None, ...]:
    leaves = [t.detach().requires_grad_() for t in (q, x, w_k, w_v)]
    bias = None if b_v is None else b_v.detach().requires_grad_()
    with torch.enable_grad():
        again, _ = tokens_forward(
            leaves[0], leaves[1], leaves[2], leaves[3], bias, image_index, lengths, scale, dropout_p, seed
        )
    if bias is None:
        return *torch.autograd.grad(again, leaves, dout), None
    return torch.autograd.grad(again, [*leaves, bias], dout)
