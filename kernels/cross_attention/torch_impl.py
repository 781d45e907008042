"""Cross-attention without repeating a source's keys and values: the rows of one image become one longer query.

Knows how to group rows by what it may read of the index; does not know other implementations. The backward is explicit:
inside a custom operator PyTorch records no graph to differentiate.
Shapes: R rows, T queries, I images, N keys, H heads, D head width, C token width, G rows of the image with the most.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miss.kernels.attention.torch_impl import attend, attend_backward
from miss.kernels.cross_attention.rows import count_rows
from miss.kernels.dropout import keep_scale

# Uneven groups on CPU: pad them to the largest, or loop over images? A turn of the loop costs what this many
# multiply-adds of padding cost an image. One core, torch 2.13, forward + backward in ms, H 12,
# padded / looped / every row with its own copy of K and V:
#   rows                T    N   D   padding     bfloat16              float32
#   3 4 4 5 4 4 4 4    20   65  32     1.0 M    5.5 /  7.8 /  8.9     8.8 /  8.4 / 16.0
#   8 1 2 5 3 1 6 6    20   65  32     4.0 M    7.6 /  8.1 /  8.7    12.7 /  7.9 / 12.2
#   4 3 4 5            20  577  64    17.7 M   25.7 / 24.8 / 83.6    43.6 / 38.9 / 69.0
#   8 times 3 1 2 3     1   20  32     0.0 M    1.9 / 13.6 /  4.1     1.4 /  6.4 /  4.3
_LOOP_WORTH = 2_000_000


def _keep(seed: Tensor | None, shape: tuple[int, ...], dropout_p: float, like: Tensor) -> Tensor | None:
    return None if seed is None else keep_scale(seed, shape, dropout_p, like.device, like.dtype)


def _fold(rows: Tensor, images: int) -> Tensor:
    """(I * G, T, …) -> (I, G * T, …)."""
    return rows.unflatten(0, (images, rows.shape[0] // images)).flatten(1, 2)


def _unfold(folded: Tensor, queries: int) -> Tensor:
    """(I, G * T, …) -> (I * G, T, …)."""
    return folded.unflatten(1, (folded.shape[1] // queries, queries)).flatten(0, 1)


def _fold_keep(keep: Tensor | None, images: int) -> Tensor | None:
    """(I * G, H, T, N) -> (I, H, G * T, N)."""
    return None if keep is None else _fold(keep.transpose(1, 2), images).transpose(1, 2)


class Groups:
    """How the rows that read one image become one query: the plan, from what the host may read of the index.

    `alike` images have the same number of rows: folding them is a view. `padded` ones are folded after copying queries
    (never keys or values) into groups of the largest size. `looped` ones go image by image. `gathered` is CUDA's,
    where the number of rows of an image stands on the device: every row with its own copy, as SDPA has no index.
    """

    def __init__(self, image_index: Tensor, images: int, row_work: int) -> None:
        """row_work: multiply-adds of one row."""
        self.index, self.images = image_index, images
        self.counts: list[int] = []
        if image_index.device.type != "cpu":
            self.form = "alike" if images == 1 else "gathered"
            return
        self.counts = count_rows(image_index, images)
        largest, num_rows = max(self.counts, default=0), image_index.shape[0]
        if largest == min(self.counts, default=0):
            self.form = "alike"
        elif (images * largest - num_rows) * row_work <= sum(map(bool, self.counts)) * _LOOP_WORTH:
            self.form, self.size = "padded", images * largest
            counts, index = torch.tensor(self.counts), image_index.long()
            starts = counts.cumsum(0) - counts
            self.place = index * largest + torch.arange(num_rows) - starts[index]
        else:
            self.form = "looped"
            self.read = [image for image, count in enumerate(self.counts) if count]

    def pad(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(self.size, *rows.shape[1:]).index_copy(0, self.place, rows)


def _groups(q: Tensor, k: Tensor, image_index: Tensor) -> Groups:
    return Groups(image_index, k.shape[0], 2 * k.shape[1] * q.shape[1] * q.shape[2] * q.shape[3])


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, lengths: Tensor | None, scale: float, keep: Tensor | None
) -> Tensor:
    """out (R, T, H, width of v) of q (R, T, H, D) over k, v (I, N, H, ·)."""
    images, queries = groups.images, q.shape[1]
    if q.numel() == 0:  # yet all that autograd expects to have been used
        return (q * k.sum((0, 1))).sum(-1, keepdim=True) * v.sum((0, 1))
    if groups.form == "gathered":
        gathered = None if lengths is None else lengths.index_select(0, groups.index)
        k, v = k.index_select(0, groups.index), v.index_select(0, groups.index)
        return attend(q, k, v, gathered, False, scale, keep)
    if groups.form == "looped":
        parts = zip(*_by_image(groups, (q, keep), (k, v, lengths)), strict=True)
        each = [attend(_fold(a, 1), c, d, n, False, scale, _fold_keep(b, 1)) for a, b, c, d, n in parts]
        return torch.cat([_unfold(one, queries) for one in each])
    if groups.form == "padded":
        q, keep = groups.pad(q), None if keep is None else groups.pad(keep)
    out = _unfold(attend(_fold(q, images), k, v, lengths, False, scale, _fold_keep(keep, images)), queries)
    return out.index_select(0, groups.place) if groups.form == "padded" else out


def _by_image(
    groups: Groups, of_rows: tuple[Tensor | None, ...], of_images: tuple[Tensor | None, ...]
) -> list[Sequence[Tensor] | Sequence[None]]:
    """Each tensor's parts, one an image that has rows; None's are None."""
    nothing, counts = [None] * len(groups.read), [groups.counts[image] for image in groups.read]
    rows = [nothing if t is None else t.split(counts) for t in of_rows]
    return [*rows, *(nothing if t is None else _each(t, groups.read) for t in of_images)]


def _each(t: Tensor, images: list[int]) -> list[Tensor]:
    """Views (1, …) of some images. The backward of each slice would fill and add a gradient of the whole size, that of
    `split` does not; but of a pool of 157,000 small images, one of them read, it took 2.2 s."""
    whole = t.split(1) if t.requires_grad and torch.is_grad_enabled() else None
    return [t[i : i + 1] if whole is None else whole[i] for i in images]


def attend_rows_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups,
    lengths: Tensor | None,
    scale: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attend_rows`; an image without rows has zeros."""
    images, queries = groups.images, q.shape[1]
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if groups.form == "gathered":
        valid = None if lengths is None else lengths.index_select(0, groups.index)
        key, value = k.index_select(0, groups.index), v.index_select(0, groups.index)
        dq, *each = attend_backward(dout, q, key, value, valid, False, scale, keep)
        dk, dv = (torch.zeros_like(t).index_add_(0, groups.index, d) for t, d in zip((k, v), each, strict=True))
        return dq, dk, dv
    if groups.form == "looped":
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        parts = _by_image(groups, (dout, q, keep, dq), (k, v, lengths, dk, dv))
        for do, a, b, to_q, c, d, n, to_k, to_v in zip(*parts, strict=True):
            grads = attend_backward(_fold(do, 1), _fold(a, 1), c, d, n, False, scale, _fold_keep(b, 1))
            to_q.copy_(_unfold(grads[0], queries))
            to_k.copy_(grads[1])
            to_v.copy_(grads[2])
        return dq, dk, dv
    if groups.form == "padded":
        dout, q, keep = groups.pad(dout), groups.pad(q), None if keep is None else groups.pad(keep)
    folded = _fold(dout, images), _fold(q, images), _fold_keep(keep, images)
    dq, dk, dv = attend_backward(folded[0], folded[1], k, v, lengths, False, scale, folded[2])
    dq = _unfold(dq, queries)
    return dq.index_select(0, groups.place) if groups.form == "padded" else dq, dk, dv


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
    return attend_rows(q, k, v, _groups(q, k, image_index), lengths, scale, keep), None


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
    keep = _keep(seed, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dropout_p, q)
    return attend_rows_backward(dout, q, k, v, _groups(q, k, image_index), lengths, scale, keep)


def _heads_first(rows: Tensor) -> Tensor:
    """(R, T, H, A) -> (H, R * T, A)."""
    return rows.flatten(0, 1).transpose(0, 1)


def _by_head(rows: Tensor, weight: Tensor) -> Tensor:
    """(R, T, H, A) times each head's (H, A, B) -> (R, T, H, B)."""
    return torch.matmul(_heads_first(rows), weight).transpose(0, 1).unflatten(0, rows.shape[:2])


class Absorbed:
    """The attention that the absorbed form comes down to: all heads of a row are queries over one key, the tokens.

    q (R, T * H, 1, C), k (I, N, 1, C), v the same, or C + 1 wide under dropout: dropped probabilities do not sum to 1,
    and the last column, of ones, says to what; that is b_v's factor.
    """

    def __init__(
        self, q: Tensor, x: Tensor, w_k: Tensor, image_index: Tensor, dropout_p: float, seed: Tensor | None
    ) -> None:
        rows, queries, heads, _ = q.shape
        self.shape, self.width = (queries, heads), x.shape[2]
        self.q = _by_head(q, w_k.unflatten(0, (heads, -1))).flatten(1, 2)[:, :, None]
        self.k = self.v = x[:, :, None]
        self.keep = _keep(seed, (rows, heads, queries, x.shape[1]), dropout_p, q)
        if self.keep is not None:
            self.v = F.pad(self.v, (0, 1), value=1.0)
            self.keep = self.keep.transpose(1, 2).flatten(1, 2)[:, None]  # (R, 1, T * H, N)
        self.groups = _groups(self.q, self.k, image_index)

    def attend(self, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
        """(P x (R, T, H, C), the sums of P (R, T, H or 1, 1); None where they are 1)."""
        mixed = attend_rows(self.q, self.k, self.v, self.groups, lengths, scale, self.keep)
        mixed = mixed[:, :, 0].unflatten(1, self.shape)
        if self.keep is not None:
            return mixed[..., : self.width], mixed[..., self.width :]
        if lengths is None:
            return mixed, None
        some = (lengths > 0).index_select(0, self.groups.index).to(mixed.dtype)
        return mixed, some.view(-1, 1, 1, 1).expand(-1, self.shape[0], 1, 1)


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
    rows, queries, heads, _ = q.shape
    mixed, sums = Absorbed(q, x, w_k, image_index, dropout_p, seed).attend(lengths, scale)
    weight = w_v.unflatten(0, (heads, -1)).transpose(1, 2)
    if b_v is None:
        return _by_head(mixed, weight), None
    bias = b_v.unflatten(0, (heads, -1))  # added inside the product, which rounds once
    added = bias[:, None] if sums is None else _heads_first(sums * bias)
    return torch.baddbmm(added, _heads_first(mixed), weight).transpose(0, 1).unflatten(0, (rows, queries)), None


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
    heads = q.shape[2]
    absorbed = Absorbed(q, x, w_k, image_index, dropout_p, seed)
    mixed, sums = absorbed.attend(lengths, scale)
    dmixed = _by_head(dout, w_v.unflatten(0, (heads, -1)))
    db_v = None
    if b_v is not None:
        db_v = (dout if sums is None else dout * sums).sum((0, 1)).flatten()
    if absorbed.keep is not None:
        bias = torch.zeros_like(w_v[:, 0]) if b_v is None else b_v
        dmixed = torch.cat([dmixed, (dout * bias.unflatten(0, (heads, -1))).sum(-1, keepdim=True)], -1)
    da, dk, dv = attend_rows_backward(
        dmixed.flatten(1, 2)[:, :, None],
        absorbed.q,
        absorbed.k,
        absorbed.v,
        absorbed.groups,
        lengths,
        scale,
        absorbed.keep,
    )
    da = da[:, :, 0].unflatten(1, absorbed.shape)
    dq = _by_head(da, w_k.unflatten(0, (heads, -1)).transpose(1, 2))
    dw_k = (_heads_first(q).transpose(1, 2) @ _heads_first(da)).flatten(0, 1)
    dw_v = (_heads_first(dout).transpose(1, 2) @ _heads_first(mixed)).flatten(0, 1)
    return dq, (dk + dv[..., : x.shape[2]])[:, :, 0], dw_k, dw_v, db_v
