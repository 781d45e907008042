"""The weight-absorbed form's gradient in Triton: three kernels, no atomics, probabilities made again from scores.

    dm = dout w_v (a head at a time)     dP = M (dm . x + dout . b_v),   dS = P (dP - dout . out) scale
    da = dS x,  dx = dS^T a + (M P)^T dm
    dq = da w_k^T,   dw_k = q^T da,   dw_v = dout^T (M P x),   db_v = dout^T sum M P

Forward's kernels run again for scores, M P x and its sums (kept, they would be 4 bytes a line and token, and C numbers
a line). `_slopes`, a program a tile of lines and a tile of keys, sums dm . x over C and writes dS and M P in q's dtype.
`_queries`, a program a tile of lines and a block of C, sums dS x over the keys. `_tokens`, a program an image's tile of
keys and a block of C, alone owns that piece of dx: it sums both products over the lines of all the image's rows in
their order, so that nothing is added from two sides and bits do not change from run to run. An image without rows, and
tokens past its length, get zeros from the same program. The products with weights are the library's GEMMs.

FLOPs 8 R T H N C (forward 4, and 4 again here), and 10 R T H C D with the weights. dS and M P, 4 T H N bytes a row in
16 bits, are written once and read C / BC times, from L2. Knows tiles; does not know what a source shows.

Shapes: R rows, T queries, I images, N keys, H heads, D head width, C token width; a line is a (row, head, query).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.cross_attention.triton_impl import LOG2E
from miss.kernels.cross_attention.triton_tokens_impl import (
    LAUNCHES,
    _lines,
    absorb,
    by_head,
    launch_for,
    options_of,
    steps_of,
)
from miss.kernels.launches import Case, Launch
from miss.kernels.triton_parts import dot, keep_mask

# Tiles of lines are forward's, whose list of them is read: its BM.
SLOPES: dict[str, tuple[Launch, ...]] = {
    "few": (Launch({"BN": 64, "BC": 64}, 4, 3),),
    # 64 keys and 4 warps spill on sm_80 with dropout.
    "many": (Launch({"BN": 32, "BC": 64}, 4, 3), Launch({"BN": 64, "BC": 64}, 8, 2)),
    "float32": (Launch({"BN": 32, "BC": 32}, 4, 2),),
}
QUERIES: dict[str, tuple[Launch, ...]] = {
    "few": (Launch({"BN": 64, "BC": 64}, 4, 3),),
    "many": (Launch({"BN": 64, "BC": 64}, 4, 2),),
    "float32": (Launch({"BN": 32, "BC": 32}, 4, 2),),
}
TOKENS: dict[str, tuple[Launch, ...]] = {
    "few": (Launch({"BM": 32, "BN": 64, "BC": 64}, 4, 2),),
    "many": (Launch({"BM": 32, "BN": 64, "BC": 64}, 4, 3), Launch({"BM": 64, "BN": 64, "BC": 64}, 4, 2)),
    "float32": (Launch({"BM": 16, "BN": 32, "BC": 32}, 4, 2),),
}
TILES = {"few": 16, "many": 64, "float32": 16}  # forward's BM, for the cases


@triton.jit
def _slopes(
    dm, x, scores, lse, delta, beta, ds, kept, first_rows, tiles, lengths, seed, scale, dropout_p, T, H, N, pitch, C,
    m_row, m_query, m_head, x_image, x_token,
    HAS_LENGTHS: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (bound, tiles of keys). ds, with scale in it, and kept (lines, pitch): zeros where nothing is seen."""
    image = tl.load(tiles + 2 * tl.program_id(0))
    if image < 0:
        return
    row, query, head, line, live = _lines(first_rows, tiles, image, T, H, BM)
    image = image.to(tl.int64)
    valid = tl.minimum(tl.load(lengths + image), N) if HAS_LENGTHS else N
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    seen = (n < valid)[None, :]
    m_at = dm + (row * m_row + query * m_query + head * m_head)[:, None] + c[None, :]
    x_at = x + image * x_image + n[None, :].to(tl.int64) * x_token + c[:, None]
    dp = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BC):
        inside = start + c < C
        left = tl.load(m_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        right = tl.load(x_at + start, mask=seen & inside[:, None], other=0.0)
        dp = dot(left, right, dp)
    if HAS_BIAS:
        dp += tl.load(beta + line, mask=live, other=0.0)[:, None]
    at = line[:, None] * pitch + n[None, :]
    written = live[:, None] & (n < pitch)[None, :]
    s = tl.load(scores + at, mask=written, other=float("-inf"))
    p = tl.where(seen, tl.exp2(s - (tl.load(lse + line, mask=live, other=0.0) * LOG2E)[:, None]), 0.0)
    weight = p
    if DROPOUT:
        keep = keep_mask(tl.load(seed), line[:, None] * N + n[None, :], dropout_p)
        weight = tl.where(keep, p / (1.0 - dropout_p), 0.0)
        dp = tl.where(keep, dp / (1.0 - dropout_p), 0.0)
    slope = tl.where(seen, p * (dp - tl.load(delta + line, mask=live, other=0.0)[:, None]), 0.0) * scale
    tl.store(ds + at, slope.to(ds.dtype.element_ty), mask=written)
    tl.store(kept + at, weight.to(kept.dtype.element_ty), mask=written)


@triton.jit
def _queries(
    ds, x, da, first_rows, tiles, lengths, T, H, N, pitch, C, a_row, a_query, a_head, x_image, x_token,
    HAS_LENGTHS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (bound, blocks of C): da."""
    image = tl.load(tiles + 2 * tl.program_id(0))
    if image < 0:
        return
    row, query, head, line, live = _lines(first_rows, tiles, image, T, H, BM)
    image = image.to(tl.int64)
    valid = tl.minimum(tl.load(lengths + image), N) if HAS_LENGTHS else N
    n = tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    x_at = x + image * x_image + n[:, None].to(tl.int64) * x_token + c[None, :]
    s_at = ds + line[:, None] * pitch + n[None, :]
    result = tl.zeros((BM, BC), tl.float32)
    for start in range(0, valid, BN):
        written = live[:, None] & (start + n < pitch)[None, :]
        left = tl.load(s_at + start, mask=written, other=0.0)
        seen = (start + n < valid)[:, None] & (c < C)[None, :]
        right = tl.load(x_at + tl.cast(start, tl.int64) * x_token, mask=seen, other=0.0)
        result = dot(left, right, result)
    at = da + (row * a_row + query * a_query + head * a_head)[:, None] + c[None, :]
    tl.store(at, result.to(da.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


@triton.jit
def _tokens(
    ds, kept, a, dm, dx, first_rows, T, H, N, pitch, C, key_tiles, a_row, a_query, a_head,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (I * key_tiles, blocks of C). dx (I, N, C) is contiguous; a and dm are of one layout."""
    image = tl.program_id(0) // key_tiles
    n = tl.program_id(0) % key_tiles * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    begin = tl.load(first_rows + image).to(tl.int64) * T * H
    end = tl.load(first_rows + image + 1).to(tl.int64) * T * H
    written = (n < pitch)[:, None]
    result = tl.zeros((BN, BC), tl.float32)
    for start in range(begin, end, BM):
        line = start + tl.arange(0, BM)
        live = line < end
        at = line[None, :] * pitch + n[:, None]
        place = (line // (T * H) * a_row + line % T * a_query + line // T % H * a_head)[:, None] + c[None, :]
        inside = live[:, None] & (c < C)[None, :]
        left = tl.load(ds + at, mask=written & live[None, :], other=0.0)
        result = dot(left, tl.load(a + place, mask=inside, other=0.0), result)
        left = tl.load(kept + at, mask=written & live[None, :], other=0.0)
        result = dot(left, tl.load(dm + place, mask=inside, other=0.0), result)
    at = dx + (image.to(tl.int64) * N + n)[:, None] * C + c[None, :]
    tl.store(at, result.to(dx.dtype.element_ty), mask=(n < N)[:, None] & (c < C)[None, :])


def _heads_first(rows: Tensor) -> Tensor:
    """(R, T, H, D) -> (H, R * T, D)."""
    return rows.flatten(0, 1).transpose(0, 1)


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
    rows, queries, heads, width = q.shape
    images, keys, channels = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not q.numel() or not x.numel():
        others = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, w_k, w_v))
        dq, dw_k, dw_v = others
        return dq, dx.zero_(), dw_k, dw_v, None if b_v is None else torch.zeros_like(b_v)
    made = absorb(q, x, w_k, image_index, lengths, scale, dropout_p, seed)
    dm, da = by_head(dout, w_v), torch.empty_like(made.a)
    wide = dout.float()
    delta = (wide * out.float()).sum(-1).transpose(1, 2).contiguous()
    beta = delta
    if b_v is not None:
        beta = (wide * b_v.float().view(heads, width)).sum(-1).transpose(1, 2).contiguous()
    ds, kept = (torch.empty(made.scores.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    line_tile = {"BM": launch_for("cross_attention_tokens", LAUNCHES, q).blocks["BM"]}
    of_slopes = options_of(launch_for("cross_attention_tokens_slopes", SLOPES, q)) | line_tile
    by_line = options_of(launch_for("cross_attention_tokens_da", QUERIES, q)) | line_tile
    by_key = options_of(launch_for("cross_attention_tokens_dx", TOKENS, q))
    whose, sizes, has_lengths = (made.plan.first_rows, made.plan.tiles, made.valid), made.sizes[1:], lengths is not None
    _slopes[(made.plan.bound, triton.cdiv(keys, of_slopes["BN"]))](
        *(dm, x, made.scores, made.lse, delta, beta, ds, kept, *whose, made.seed, scale, dropout_p, *sizes),
        *(*steps_of(dm), *x.stride()[:2]),
        HAS_LENGTHS=has_lengths, HAS_BIAS=b_v is not None, DROPOUT=dropout_p > 0, **of_slopes,
    )  # fmt: skip
    _queries[(made.plan.bound, triton.cdiv(channels, by_line["BC"]))](
        *(ds, x, da, *whose, *sizes, *steps_of(da), *x.stride()[:2]), HAS_LENGTHS=has_lengths, **by_line
    )
    key_tiles = triton.cdiv(keys, by_key["BN"])
    _tokens[(images * key_tiles, triton.cdiv(channels, by_key["BC"]))](
        *(ds, kept, made.a, dm, dx, made.plan.first_rows, *sizes, key_tiles, *steps_of(made.a)), **by_key
    )
    dq = torch.matmul(da.flatten(1, 2), w_k.unflatten(0, (heads, width)).transpose(1, 2))
    dw_k = torch.matmul(_heads_first(q).transpose(1, 2), da.flatten(1, 2)).flatten(0, 1)
    dw_v = torch.matmul(_heads_first(dout).transpose(1, 2), made.mixed.flatten(1, 2)).flatten(0, 1)
    db_v = None
    if b_v is not None:
        db_v = (wide * made.sums.transpose(1, 2)[..., None]).sum((0, 1)).flatten().to(b_v.dtype)
    return dq.transpose(0, 1).unflatten(0, (rows, queries)), dx, dw_k, dw_v, db_v


def cases() -> Iterator[Case]:
    """All kernels of every entry, bfloat16 and float32's own, with dropout, bias and lengths."""
    strides = ("a_row", "a_query", "a_head", "m_row", "m_query", "m_head", "x_image", "x_token")
    sizes = dict.fromkeys(("T", "H", "N", "pitch", "C", "key_tiles", *strides), "i32")
    for kind in SLOPES:
        t = "*fp32" if kind == "float32" else "*bf16"
        pointers = {**dict.fromkeys(("a", "dm", "x", "ds", "kept", "da", "dx"), t), "seed": "*i64"}
        pointers |= dict.fromkeys(("scores", "lse", "delta", "beta"), "*fp32")
        pointers |= dict.fromkeys(("first_rows", "tiles", "lengths"), "*i32")
        known = {**pointers, "scale": "fp32", "dropout_p": "fp32", **sizes}
        flags = {"HAS_LENGTHS": True, "HAS_BIAS": True, "DROPOUT": True}
        parts = (("slopes", _slopes, SLOPES), ("queries", _queries, QUERIES), ("tokens", _tokens, TOKENS))
        for part, kernel, tables in parts:
            for i, launch in enumerate(tables[kind]):
                signature = {n: known[n] for n in kernel.arg_names if n in known}
                blocks = {"BM": TILES[kind], **launch.blocks}
                constants = {**{n: v for n, v in flags.items() if n in kernel.arg_names}, **blocks}
                divisible = tuple(n for n in signature if n in pointers or n in strides or n in ("C", "pitch"))
                name = f"{part}-{kind}-{'x'.join(map(str, blocks.values()))}"
                op = "cross_attention_tokens_backward"
                yield Case(op, name, kernel, signature, constants, launch, i == 0, divisible)
