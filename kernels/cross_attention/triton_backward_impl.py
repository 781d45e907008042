"""Cross-attention's gradient in Triton: two kernels, no atomics, probabilities made again from lse.

`_dq`, a program a tile of an image's queries and a head, as forward, over all keys: dq, and delta = dout . out, which
is sum_n P dP. `_dkv`, a program a tile of an image's keys and a head: it alone owns that tile of dk and dv, holds K and
V and loops over the queries of all the image's rows in their order, so that nothing is added from two sides and bits do
not change from run to run. An image without rows, and keys past its length, get zeros from the same program.

FLOPs 6 and 8 R T N H D (forward 4). Bytes: K and V once a tile of queries and once for dk and dv, queries and dout once
a tile of keys (from L2 but the first). Knows tiles; does not know what a source shows.

Shapes: R rows, T queries, I images, N keys, H heads, D head width; a line is a (row, head, query).
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.cross_attention.triton_impl import LOG2E, launch_for, on_device, plan, queries_of
from miss.kernels.launches import Case, Launch
from miss.kernels.triton_parts import dot, keep_mask

DQ_LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "few": (Launch({"BM": 16, "BN": 64, "TAIL": 16}, 4, 2),),
    # 64 x 64 spills on sm_80 with dropout, on 4 warps and on 8; so it does in `_dkv`.
    "many": (Launch({"BM": 64, "BN": 32, "TAIL": 16}, 4, 3), Launch({"BM": 32, "BN": 64, "TAIL": 16}, 4, 2)),
    "narrow": (Launch({"BM": 64, "BN": 64, "TAIL": 16}, 4, 2),),
    "float32": (Launch({"BM": 16, "BN": 16, "TAIL": 16}, 8, 1),),
}
DKV_LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "few": (Launch({"BM": 16, "BN": 64}, 4, 2),),
    "many": (Launch({"BM": 32, "BN": 64}, 4, 2), Launch({"BM": 32, "BN": 32}, 4, 2)),
    "narrow": (Launch({"BM": 32, "BN": 64}, 4, 2),),
    "float32": (Launch({"BM": 16, "BN": 32}, 8, 1),),
}


@triton.jit
def _dq_step(
    query, incoming, gradient, keys, values, start, end, normaliser, delta, scale, line, N, seed, dropout_p, k_key,
    v_key, D: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`gradient` with one tile of keys' share of dq / scale."""
    d = tl.arange(0, D)
    n = start + tl.arange(0, BN)
    k_at = keys + n[:, None].to(tl.int64) * k_key + d[None, :]
    v_at = values + n[None, :].to(tl.int64) * v_key + d[:, None]
    if MASKED:
        k = tl.load(k_at, mask=(n < end)[:, None], other=0.0)
        v = tl.load(v_at, mask=(n < end)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    p = tl.exp2(dot(query, tl.trans(k)) * scale - normaliser[:, None])
    dp = dot(incoming, v)
    if DROPOUT:
        dp = tl.where(keep_mask(seed, line[:, None] * N + n[None, :], dropout_p), dp / (1.0 - dropout_p), 0.0)
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where((n < end)[None, :], ds, 0.0)
    return dot(ds.to(k.dtype), k, gradient)


@triton.jit
def _dq(
    q, k, v, out, dout, lse, delta, dq, first_rows, tiles, lengths, seed, scale, dropout_p, T, H, N,
    q_row, q_query, q_head, k_image, k_key, k_head, v_image, v_key, v_head,
    D: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Grid (bound, H). out, dout and dq (R, T, H, D), lse and delta (R, H, T) are contiguous. scale without log2(e)."""
    image = tl.load(tiles + 2 * tl.program_id(0))
    if image < 0:
        return
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    row, query, line, live = queries_of(first_rows, image, first, head, T, H, BM)
    d = tl.arange(0, D)
    image = image.to(tl.int64)
    valid = tl.minimum(tl.load(lengths + image), N) if HAS_LENGTHS else N
    mine = live[:, None]
    q_at = q + row[:, None] * q_row + query[:, None] * q_query + head * q_head + d[None, :]
    tile = tl.load(q_at, mask=mine, other=0.0)
    place = (row[:, None] * T + query[:, None]) * H * D + head * D + d[None, :]
    incoming = tl.load(dout + place, mask=mine, other=0.0)
    result = tl.load(out + place, mask=mine, other=0.0)
    slope = tl.sum(incoming.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + line, slope, mask=live)
    normaliser = tl.load(lse + line, mask=live, other=0.0) * LOG2E
    keys, values = k + image * k_image + head * k_head, v + image * v_image + head * v_head
    number = tl.load(seed) if DROPOUT else 0
    base2 = scale * LOG2E
    full = tl.maximum(valid, 0) // BN * BN
    gradient = tl.zeros((BM, D), tl.float32)
    for at in range(0, full, BN):
        gradient = _dq_step(
            tile, incoming, gradient, keys, values, at, valid, normaliser, slope, base2, line, N, number, dropout_p,
            k_key, v_key, D, DROPOUT, False, BN,
        )  # fmt: skip
    if valid - full > TAIL:
        gradient = _dq_step(
            tile, incoming, gradient, keys, values, full, valid, normaliser, slope, base2, line, N, number, dropout_p,
            k_key, v_key, D, DROPOUT, True, BN,
        )  # fmt: skip
    elif valid > full:
        gradient = _dq_step(
            tile, incoming, gradient, keys, values, full, valid, normaliser, slope, base2, line, N, number, dropout_p,
            k_key, v_key, D, DROPOUT, True, TAIL,
        )  # fmt: skip
    tl.store(dq + place, (gradient * scale).to(dq.dtype.element_ty), mask=mine)


@triton.jit
def _dkv(
    q, k, v, dout, lse, delta, dk, dv, first_rows, lengths, seed, scale, dropout_p, T, H, N, key_tiles,
    q_row, q_query, q_head, k_image, k_key, k_head, v_image, v_key, v_head,
    D: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (I * key_tiles, H). dk and dv (I, N, H, D) are contiguous."""
    image = tl.program_id(0) // key_tiles
    start = tl.program_id(0) % key_tiles * BN
    head = tl.program_id(1).to(tl.int64)
    queries = (tl.load(first_rows + image + 1) - tl.load(first_rows + image)) * T
    wide = image.to(tl.int64)
    valid = tl.minimum(tl.load(lengths + wide), N) if HAS_LENGTHS else N
    d = tl.arange(0, D)
    n = start + tl.arange(0, BN)
    far = n.to(tl.int64)
    seen = n < valid
    key = tl.load(k + wide * k_image + head * k_head + far[:, None] * k_key + d[None, :], mask=seen[:, None], other=0.0)
    value = tl.load(
        v + wide * v_image + head * v_head + far[:, None] * v_key + d[None, :], mask=seen[:, None], other=0.0
    )
    number = tl.load(seed) if DROPOUT else 0
    base2 = scale * LOG2E
    last = queries if start < valid else 0
    gradient_k = tl.zeros((BN, D), tl.float32)
    gradient_v = tl.zeros((BN, D), tl.float32)
    for first in range(0, last, BM):
        row, query, line, live = queries_of(first_rows, image, first, head, T, H, BM)
        mine = live[:, None]
        q_at = q + row[:, None] * q_row + query[:, None] * q_query + head * q_head + d[None, :]
        tile = tl.load(q_at, mask=mine, other=0.0)
        place = (row[:, None] * T + query[:, None]) * H * D + head * D + d[None, :]
        incoming = tl.load(dout + place, mask=mine, other=0.0)
        normaliser = tl.load(lse + line, mask=live, other=0.0) * LOG2E
        slope = tl.load(delta + line, mask=live, other=0.0)
        p = tl.exp2(dot(key, tl.trans(tile)) * base2 - normaliser[None, :])
        p = tl.where(seen[:, None], p, 0.0)  # a query beyond the last has p 1, and no dout, slope or tile: adds zeros
        dp = dot(value, tl.trans(incoming))
        kept = p
        if DROPOUT:
            keep = keep_mask(number, line[None, :] * N + n[:, None], dropout_p)
            kept = tl.where(keep, p / (1.0 - dropout_p), 0.0)
            dp = tl.where(keep, dp / (1.0 - dropout_p), 0.0)
        gradient_v = dot(kept.to(incoming.dtype), incoming, gradient_v)
        ds = p * (dp - slope[None, :])
        gradient_k = dot(ds.to(tile.dtype), tile, gradient_k)
    place = (wide * N + far)[:, None] * H * D + head * D + d[None, :]
    tl.store(dk + place, (gradient_k * scale).to(dk.dtype.element_ty), mask=(n < N)[:, None])
    tl.store(dv + place, gradient_v.to(dv.dtype.element_ty), mask=(n < N)[:, None])


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
    rows, queries, heads, width = q.shape
    images, keys = k.shape[:2]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    by_query = launch_for("cross_attention_dq", DQ_LAUNCHES, q)
    by_key = launch_for("cross_attention_dkv", DKV_LAUNCHES, q)
    made = plan(image_index, images, queries, by_query.blocks["BM"])
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    valid = image_index if lengths is None else lengths.contiguous()
    number = on_device(seed if dropout_p else None, image_index)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    options = {"D": width, "HAS_LENGTHS": lengths is not None, "DROPOUT": dropout_p > 0}
    _dq[(made.bound, heads)](
        *(q, k, v, out, dout, lse, delta, dq, made.first_rows, made.tiles, valid, number, scale, dropout_p),
        *(queries, heads, keys, *strides),
        **options, **by_query.blocks, num_warps=by_query.num_warps, num_stages=by_query.num_stages,
    )  # fmt: skip
    key_tiles = triton.cdiv(keys, by_key.blocks["BN"])
    _dkv[(images * key_tiles, heads)](
        *(q, k, v, dout, lse, delta, dk, dv, made.first_rows, valid, number, scale, dropout_p),
        *(queries, heads, keys, key_tiles, *strides),
        **options, **by_key.blocks, num_warps=by_key.num_warps, num_stages=by_key.num_stages,
    )  # fmt: skip
    return dq, dk, dv


def cases() -> Iterator[Case]:
    """bfloat16 and float32, heads of 64 and 32, with dropout; of bfloat16's defaults also without."""
    strides = ("q_row", "q_query", "q_head", "k_image", "k_key", "k_head", "v_image", "v_key", "v_head")
    widths = {"few": (64, 32), "many": (64,), "narrow": (32,), "float32": (64, 32)}
    for part, kernel, tables in (("dq", _dq, DQ_LAUNCHES), ("dkv", _dkv, DKV_LAUNCHES)):
        for kind, launches in tables.items():
            t = "*fp32" if kind == "float32" else "*bf16"
            pointers = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), t)
            pointers |= {**dict.fromkeys(("lse", "delta"), "*fp32"), "first_rows": "*i32", "tiles": "*i32"}
            pointers |= {"lengths": "*i32", "seed": "*i64"}
            sizes = dict.fromkeys(("T", "H", "N", "key_tiles", *strides), "i32")
            known = {**pointers, "scale": "fp32", "dropout_p": "fp32", **sizes}
            signature = {n: known[n] for n in kernel.arg_names if n in known}
            divisible = tuple(n for n in signature if n in pointers or n in strides)
            for i, launch in enumerate(launches):
                plain = (True, False) if i == 0 and kind != "float32" else (True,)
                for width, dropout in itertools.product(widths[kind], plain):
                    constants = {"D": width, "HAS_LENGTHS": True, "DROPOUT": dropout, **launch.blocks}
                    name = f"{part}-{kind}-{launch.blocks['BM']}x{launch.blocks['BN']}-{width}{'-dropout' * dropout}"
                    yield Case(
                        "cross_attention_backward", name, kernel, signature, constants, launch, i == 0, divisible
                    )
