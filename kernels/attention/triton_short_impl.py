"""Attention's short form in Triton: all of several heads' queries and keys in one tile, forward and backward.

A program takes G heads of a batch row, a warp each, as products of G planes (one head, and four warps for it, at
G = 1). A token's heads lie side by side, so G heads are loaded as one run of G x D numbers. Backward is one kernel: all
of a head's gradients come from what the tile holds, read once. Does not know sequences longer than a tile.

Forward's tile is that of a row's own length, read on the device, not of the length that its batch is padded to: 16, 32
or 64 keys, and as many queries, of which a padded row has more tiles. So padding changes no bit.

Shapes: B batch, T queries, N keys, H heads, D head width, BT and BN the tile.
"""

import triton
import triton.language as tl

from miss.kernels.attention.triton_rows_impl import LOG2_E, normalise, sequence, start_of
from miss.kernels.triton_parts import dot, keep_mask

GROUP = tl.constexpr(4)  # heads that a program takes together, a warp each, of rows of up to 32 keys


@triton.jit
def by_head(head, row, head_stride, row_stride, G: tl.constexpr):
    """Offsets (G, rows) of G heads; (rows,) of one, whose number is a scalar."""
    if G == 1:
        return head * head_stride + row * row_stride
    else:
        return head[:, None] * head_stride + row[None, :] * row_stride


@triton.jit
def inside_of(head, row, H, rows, G: tl.constexpr):
    """Which of the rows that `by_head` places there are."""
    if G == 1:
        return row < rows
    else:
        return (head < H)[:, None] & (row < rows)[None, :]


@triton.jit
def flip(x):
    """The last two axes exchanged."""
    if len(x.shape) == 2:
        return tl.trans(x)
    else:
        return tl.permute(x, (0, 2, 1))


@triton.jit
def tile_of(x, head, row, H, rows, head_stride, row_stride, D: tl.constexpr, G: tl.constexpr):
    """(G, rows, D), or (rows, D) of one head; zeros past the last row or head."""
    at = tl.expand_dims(by_head(head, row, head_stride, row_stride, G), -1) + tl.arange(0, D)
    return tl.load(x + at, mask=tl.expand_dims(inside_of(head, row, H, rows, G), -1), other=0.0)


@triton.jit
def lines_of(b, head, t, first, T, H, G: tl.constexpr, VARLEN: tl.constexpr):
    """Of heads and queries: what `line_of` says of one head's."""
    if VARLEN:
        return by_head(head, first + t, 1, H, G)
    else:
        return by_head(b.to(tl.int64) * H + head, t, T, 1, G)


@triton.jit
def visible_in(t, n, queries, keys, length, CAUSAL: tl.constexpr):
    """(queries, keys), or (1, keys): which keys a query sees."""
    visible = (n < length)[None, :]
    if CAUSAL:
        visible = visible & (n[None, :] <= t[:, None] + (keys - queries))
    return visible


@triton.jit
def _write(x, tile, head, row, H, rows, first, D: tl.constexpr, G: tl.constexpr):
    """Into dense (tokens, H, D), from token `first` on."""
    at = tl.expand_dims(by_head(head, first + row, D, H * D, G), -1) + tl.arange(0, D)
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=tl.expand_dims(inside_of(head, row, H, rows, G), -1))


@triton.jit
def _tile(
    q, k, v, out, lse, seed, b, head, t0, first, queries, keys, length,
    q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
    D: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """SIZE queries from t0 on, in these heads, over all keys of their row, which one tile of SIZE holds."""
    t, n = t0 + tl.arange(0, SIZE), tl.arange(0, SIZE)
    line = lines_of(b, head, t, first, T, H, G, VARLEN)
    query = tile_of(start_of(q, b, 0, first, q_b, q_t, q_h, VARLEN), head, t, H, queries, q_h, q_t, D, G)
    key = tile_of(start_of(k, b, 0, first, k_b, k_n, k_h, VARLEN), head, n, H, length, k_h, k_n, D, G)
    value = tile_of(start_of(v, b, 0, first, v_b, v_n, v_h, VARLEN), head, n, H, length, v_h, v_n, D, G)
    s = tl.where(visible_in(t, n, queries, keys, length, CAUSAL), dot(query, flip(key)), float("-inf"))
    log2_scale = scale * LOG2_E
    top = tl.max(s, -1) * log2_scale
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s * log2_scale - tl.expand_dims(base, -1))
    total = tl.sum(p, -1)
    if DROPOUT:
        p = tl.where(keep_mask(tl.load(seed), tl.expand_dims(line, -1) * N + n, dropout_p), p, 0.0)
    acc = dot(p.to(value.dtype), value)
    result, normaliser = normalise(acc, top, total, length, dropout_p, DROPOUT)
    _write(out, result, head, t, H, queries, first, D, G)
    tl.store(lse + line, normaliser, mask=inside_of(head, t, H, queries, G))


@triton.jit
def _row(
    q, k, v, out, lse, seed, b, head, first, queries, keys, length,
    q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
    D: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """SIZE of a row's queries; where there may be more of them than the row has keys, programs of their own have the
    others, and those beyond leave."""
    if LENGTHS:
        if tl.program_id(1) * SIZE < queries:
            _tile(
                q, k, v, out, lse, seed, b, head, tl.program_id(1) * SIZE, first, queries, keys, length,
                q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
                D, SIZE, G, CAUSAL, VARLEN, DROPOUT,
            )  # fmt: skip
    else:
        _tile(
            q, k, v, out, lse, seed, b, head, 0, first, queries, keys, length,
            q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
            D, SIZE, G, CAUSAL, VARLEN, DROPOUT,
        )  # fmt: skip


@triton.jit
def _short_row(
    q, k, v, out, lse, seed, b, head, first, queries, keys, length,
    q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
    D: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One of up to 32 keys, by its own tile."""
    if length > 16:
        _row(
            q, k, v, out, lse, seed, b, head, first, queries, keys, length,
            q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
            D, 32, G, CAUSAL, LENGTHS, VARLEN, DROPOUT,
        )  # fmt: skip
    else:
        _row(
            q, k, v, out, lse, seed, b, head, first, queries, keys, length,
            q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
            D, 16, G, CAUSAL, LENGTHS, VARLEN, DROPOUT,
        )  # fmt: skip


@triton.jit
def forward(
    q, k, v, out, lse, rows, seed, q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
    D: tl.constexpr, MOST: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """MOST: what the longest row may have. At 64 G is 1: a program is a head, and every GROUP-th takes the heads after
    its own along where the row is shorter."""
    groups = tl.cdiv(H, G)
    b = tl.program_id(0) // groups
    unit = tl.program_id(0) % groups
    first, queries, keys, length = sequence(b, rows, T, N, LENGTHS, VARLEN)
    head = unit
    if G > 1:
        head = unit * G + tl.arange(0, G)
    if MOST == 16 or not (LENGTHS or VARLEN):
        _row(
            q, k, v, out, lse, seed, b, head, first, queries, keys, length,
            q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
            D, MOST, G, CAUSAL, LENGTHS, VARLEN, DROPOUT,
        )  # fmt: skip
    elif MOST == 32:
        _short_row(
            q, k, v, out, lse, seed, b, head, first, queries, keys, length,
            q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
            D, G, CAUSAL, LENGTHS, VARLEN, DROPOUT,
        )  # fmt: skip
    else:
        if length > 32:
            _row(
                q, k, v, out, lse, seed, b, head, first, queries, keys, length,
                q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
                D, MOST, G, CAUSAL, LENGTHS, VARLEN, DROPOUT,
            )  # fmt: skip
        elif unit % GROUP == 0:
            _short_row(
                q, k, v, out, lse, seed, b, unit + tl.arange(0, GROUP), first, queries, keys, length,
                q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
                D, GROUP, CAUSAL, LENGTHS, VARLEN, DROPOUT,
            )  # fmt: skip


@triton.jit
def backward(
    dout, q, k, v, out, lse, dq, dk, dv, rows, seed,
    q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
    D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dout and out dense, as the gradients are."""
    groups = tl.cdiv(H, G)
    b = tl.program_id(0) // groups
    head = tl.program_id(0) % groups
    if G > 1:
        head = head * G + tl.arange(0, G)
    first, queries, keys, length = sequence(b, rows, T, N, LENGTHS, VARLEN)
    t, n = tl.arange(0, BT), tl.arange(0, BN)
    line = lines_of(b, head, t, first, T, H, G, VARLEN)
    query = tile_of(start_of(q, b, 0, first, q_b, q_t, q_h, VARLEN), head, t, H, queries, q_h, q_t, D, G)
    key = tile_of(start_of(k, b, 0, first, k_b, k_n, k_h, VARLEN), head, n, H, length, k_h, k_n, D, G)
    value = tile_of(start_of(v, b, 0, first, v_b, v_n, v_h, VARLEN), head, n, H, length, v_h, v_n, D, G)
    incoming = tile_of(dout + first * H * D, head, t, H, queries, D, H * D, D, G)
    result = tile_of(out + first * H * D, head, t, H, queries, D, H * D, D, G)
    # Infinity makes probabilities of 0 in the rows that are not there.
    normaliser = tl.load(lse + line, mask=inside_of(head, t, H, queries, G), other=float("inf")) * LOG2_E
    delta = tl.sum(incoming.to(tl.float32) * result.to(tl.float32), -1)
    p = tl.exp2(dot(query, flip(key)) * (scale * LOG2_E) - tl.expand_dims(normaliser, -1))
    p = tl.where(visible_in(t, n, queries, keys, length, CAUSAL), p, 0.0)
    dp = dot(incoming, flip(value))
    dropped = p
    if DROPOUT:
        kept = keep_mask(tl.load(seed), tl.expand_dims(line, -1) * N + n, dropout_p)
        dropped = tl.where(kept, p * (1.0 / (1.0 - dropout_p)), 0.0)
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    ds = (p * (dp - tl.expand_dims(delta, -1)) * scale).to(key.dtype)
    source = b.to(tl.int64) * N  # the number of the first key's token
    if VARLEN:
        source = first
    _write(dv, dot(flip(dropped.to(incoming.dtype)), incoming), head, n, H, keys, source, D, G)
    _write(dk, dot(flip(ds), query), head, n, H, keys, source, D, G)
    _write(dq, dot(ds, key), head, t, H, queries, first, D, G)
