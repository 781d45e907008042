"""Cross-attention in Triton: the questions of an image are rows of one tile over its keys and values, read once a tile.

The queries of all rows of an image stand one behind another; a program takes BM of them in one head over a span of the
keys. `_plan` makes, on the device, each image's first row and the list of tiles: an image of c rows of T queries has
cdiv(c T, BM). The host knows R T // BM + min(I, R) as a bound, launches as many, and those beyond the list leave.
Keys go in full tiles of BN without a mask and one tail, TAIL wide where that holds it (577 = 9 * 64 + 1). Softmax in
base 2 with the scale folded in; sums in float32. N alone decides into how many spans keys are split (`split`); spans
are merged in their order by `_combine`, so that bits do not depend on what shares the batch. No atomics.

FLOPs 4 R T N H D. Bytes: q and out once, K and V once a tile of queries (of one image: from L2 after the first), and
with S > 1 spans 8 (D + 2) S a query and head, written and read. Knows tiles; does not know what a source shows.

Shapes: R rows, T queries, I images, N keys, H heads, D head width, S spans; a line is a (row, head, query).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dot, keep_mask

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "few": (
        Launch({"BM": 16, "BN": 64, "TAIL": 16, "SPLIT": 256}, 4, 3),
        Launch({"BM": 16, "BN": 32, "TAIL": 16, "SPLIT": 128}, 2, 3),
    ),
    "many": (
        Launch({"BM": 64, "BN": 64, "TAIL": 16, "SPLIT": 256}, 4, 3),
        Launch({"BM": 128, "BN": 64, "TAIL": 16, "SPLIT": 256}, 8, 3),
    ),
    # Heads of 32: with three stages ptxas takes 128 registers on sm_80 and spills one.
    "narrow": (Launch({"BM": 64, "BN": 64, "TAIL": 16, "SPLIT": 256}, 4, 2),),
    # Products without tensor cores keep their operands in registers: 32 keys and 8 warps spill one at heads of 32.
    "float32": (Launch({"BM": 16, "BN": 16, "TAIL": 16, "SPLIT": 256}, 4, 2),),
}
LOG2E = tl.constexpr(1.4426950408889634)
_COMBINE = {"BLOCK": 16}


class Plan(NamedTuple):
    """Which tile is whose; `tiles` and `first_rows` are on the device."""

    first_rows: Tensor  # int32 (I + 1)
    tiles: Tensor  # int32 (bound, 2): an image and its tile's first query; image -1 beyond the last tile
    bound: int  # on the number of tiles, from what the host knows


@triton.jit
def _plan(image_index, first_rows, tiles, R, images, T, bound, steps, BM: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a binary search of the sorted index for every image, then each image's tiles in order."""
    done = 0
    for start in range(0, images, BLOCK):
        image = start + tl.arange(0, BLOCK)
        first, first_to = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + R
        end, end_to = first, first_to
        for _ in range(0, steps):  # first: the first row whose image is not before; end: whose image is after
            middle = (first + first_to) // 2
            open_ = first < first_to
            before = open_ & (tl.load(image_index + middle, mask=open_, other=0) < image)
            first = tl.where(before, middle + 1, first)
            first_to = tl.where(open_ & (before == 0), middle, first_to)
            middle = (end + end_to) // 2
            open_ = end < end_to
            before = open_ & (tl.load(image_index + middle, mask=open_, other=0) <= image)
            end = tl.where(before, middle + 1, end)
            end_to = tl.where(open_ & (before == 0), middle, end_to)
        tl.store(first_rows + image, first, mask=image < images)
        tl.store(first_rows + image + 1, end, mask=image == images - 1)
        own = tl.where(image < images, ((end - first) * T + BM - 1) // BM, 0)
        place = done + tl.cumsum(own, 0) - own
        for j in range(0, tl.max(own, 0)):
            here = (j < own) & (place + j < bound)  # an index that is not sorted writes nowhere else
            tl.store(tiles + 2 * (place + j), image, mask=here)
            tl.store(tiles + 2 * (place + j) + 1, tl.zeros((BLOCK,), tl.int32) + j * BM, mask=here)
        done += tl.sum(own, 0)
    for start in range(done, bound, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(tiles + 2 * slot, tl.zeros((BLOCK,), tl.int32) - 1, mask=slot < bound)


@triton.jit
def queries_of(first_rows, image, first, head, T, H, BM: tl.constexpr):
    """(row, query, line, live) of a tile's BM queries, int64 but for the mask."""
    begin = tl.load(first_rows + image)
    m = first + tl.arange(0, BM)
    live = m < (tl.load(first_rows + image + 1) - begin) * T
    row = (begin + m // T).to(tl.int64)
    query = (m % T).to(tl.int64)
    return row, query, (row * H + head) * T + query, live


@triton.jit
def _step(
    query, keys, values, start, end, top, total, mixed, scale, line, N, seed, dropout_p, k_key, v_key,
    D: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running maximum, sum and weighted values after it."""
    d = tl.arange(0, D)
    n = start + tl.arange(0, BN)
    k_at = keys + n[None, :].to(tl.int64) * k_key + d[:, None]
    v_at = values + n[:, None].to(tl.int64) * v_key + d[None, :]
    if MASKED:
        k = tl.load(k_at, mask=(n < end)[None, :], other=0.0)
        v = tl.load(v_at, mask=(n < end)[:, None], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    scores = dot(query, k) * scale
    if MASKED:
        scores = tl.where((n < end)[None, :], scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing above minus infinity yet
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep_mask(seed, line[:, None] * N + n[None, :], dropout_p), p, 0.0)
    mixed = dot(p.to(v.dtype), v, mixed * shrink[:, None])
    return new, total, mixed


@triton.jit
def _forward(
    q, k, v, out, lse, partial, stats, first_rows, tiles, lengths, seed, scale, dropout_p, span, lines, T, H, N,
    q_row, q_query, q_head, k_image, k_key, k_head, v_image, v_key, v_head,
    D: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Grid (bound, H, S). out (R, T, H, D) and lse (R, H, T) are contiguous; with SPLIT each span writes its weighted
    values to `partial` (S, lines, D), its maximum and sum to `stats` (S, 2, lines) instead."""
    image = tl.load(tiles + 2 * tl.program_id(0))
    if image < 0:
        return
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    row, query, line, live = queries_of(first_rows, image, first, head, T, H, BM)
    d = tl.arange(0, D)
    image = image.to(tl.int64)
    valid = tl.minimum(tl.load(lengths + image), N) if HAS_LENGTHS else N
    q_at = q + row[:, None] * q_row + query[:, None] * q_query + head * q_head + d[None, :]
    tile = tl.load(q_at, mask=live[:, None], other=0.0)
    keys, values = k + image * k_image + head * k_head, v + image * v_image + head * v_head
    number = tl.load(seed) if DROPOUT else 0
    start = tl.program_id(2) * span
    end = tl.minimum(start + span, valid)
    full = start + tl.maximum(end - start, 0) // BN * BN
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mixed = tl.zeros((BM, D), tl.float32)
    for at in range(start, full, BN):
        top, total, mixed = _step(
            tile, keys, values, at, end, top, total, mixed, scale, line, N, number, dropout_p, k_key, v_key,
            D, DROPOUT, False, BN,
        )  # fmt: skip
    if end - full > TAIL:
        top, total, mixed = _step(
            tile, keys, values, full, end, top, total, mixed, scale, line, N, number, dropout_p, k_key, v_key,
            D, DROPOUT, True, BN,
        )  # fmt: skip
    elif end > full:
        top, total, mixed = _step(
            tile, keys, values, full, end, top, total, mixed, scale, line, N, number, dropout_p, k_key, v_key,
            D, DROPOUT, True, TAIL,
        )  # fmt: skip
    if SPLIT:
        before = tl.program_id(2).to(tl.int64) * lines
        tl.store(partial + (before + line)[:, None] * D + d[None, :], mixed, mask=live[:, None])
        tl.store(stats + 2 * before + line, top, mask=live)
        tl.store(stats + 2 * before + lines + line, total, mask=live)
    else:
        tl.store(lse + line, (top + tl.log2(total)) / LOG2E, mask=live)
        grown = mixed / ((1.0 - dropout_p) * total)[:, None]
        grown = tl.where(valid > 0, grown, 0.0)  # nothing visible above minus infinity: 0 / 0, NaN, as softmax has it
        at = out + (row[:, None] * T + query[:, None]) * H * D + head * D + d[None, :]
        tl.store(at, grown.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def _combine(
    partial, stats, out, lse, image_index, lengths, dropout_p, lines, T, H, S,
    D: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of lines): a line's spans merged in their order."""
    line = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = line < lines
    d = tl.arange(0, D)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, D), tl.float32)
    for span in range(0, S):
        before = tl.cast(span, tl.int64) * lines
        other = tl.load(stats + 2 * before + line, mask=live, other=0.0)
        new = tl.maximum(top, other)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink, grow = tl.exp2(top - base), tl.exp2(other - base)
        total = total * shrink + tl.load(stats + 2 * before + lines + line, mask=live, other=0.0) * grow
        values = tl.load(partial + (before + line)[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
        mixed = mixed * shrink[:, None] + values * grow[:, None]
        top = new
    tl.store(lse + line, (top + tl.log2(total)) / LOG2E, mask=live)
    row, query, head = line // (H * T), line % T, line // T % H
    grown = mixed / ((1.0 - dropout_p) * total)[:, None]
    if HAS_LENGTHS:
        image = tl.load(image_index + row, mask=live, other=0)
        visible = tl.load(lengths + image, mask=live, other=0) > 0
        grown = tl.where(visible[:, None], grown, 0.0)
    at = out + ((row * T + query) * H + head)[:, None] * D + d[None, :]
    tl.store(at, grown.to(out.dtype.element_ty), mask=live[:, None])


def launch_for(op: str, tables: dict[str, tuple[Launch, ...]], q: Tensor) -> Launch:
    """By the dtype, the head width and whether a row has one query, as in a decoding step, or is a text: nothing that
    other rows decide, and they decide how far a text is padded."""
    many = "narrow" if q.shape[3] == 32 else "many"
    kind = "float32" if q.dtype == torch.float32 else "few" if q.shape[1] == 1 else many
    return choose(op, kind, {k: v[0] for k, v in tables.items()}, q, q.shape[3])


def split(keys: int, launch: Launch) -> tuple[int, int]:
    """(keys of a span, spans): whole tiles, as even as they go, one span for less than two SPLITs of keys."""
    tiles = triton.cdiv(keys, launch.blocks["BN"])
    span = triton.cdiv(tiles, max(1, keys // launch.blocks["SPLIT"])) * launch.blocks["BN"]
    return span, triton.cdiv(keys, span)


def plan(image_index: Tensor, images: int, queries: int, tile: int) -> Plan:
    """For R > 0 rows of `queries` queries and tiles of `tile`."""
    rows, device = len(image_index), image_index.device
    bound = rows * queries // tile + min(images, rows)
    first_rows = torch.empty(images + 1, dtype=torch.int32, device=device)
    tiles = torch.empty(bound, 2, dtype=torch.int32, device=device)
    _plan[(1,)](
        *(image_index.contiguous(), first_rows, tiles, rows, images, queries, bound, rows.bit_length()),
        BM=tile, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return Plan(first_rows, tiles, bound)


def on_device(seed: Tensor | None, like: Tensor) -> Tensor:
    """The seed where a kernel can read it; a seed on the host goes along as an argument of an addition."""
    return like if seed is None else torch.zeros((), dtype=torch.int64, device=like.device) + seed


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
    rows, queries, heads, width = q.shape
    images, keys = k.shape[:2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
    if not lse.numel() or not keys:
        return out.zero_(), lse.fill_(float("-inf"))
    launch = launch_for("cross_attention", LAUNCHES, q)
    made = plan(image_index, images, queries, launch.blocks["BM"])
    span, spans = split(keys, launch)
    partial, stats = lse, lse
    if spans > 1:
        partial = torch.empty(spans, lse.numel(), width, dtype=torch.float32, device=q.device)
        stats = torch.empty(spans, 2, lse.numel(), dtype=torch.float32, device=q.device)
    valid = image_index if lengths is None else lengths.contiguous()
    number = on_device(seed if dropout_p else None, image_index)
    _forward[(made.bound, heads, spans)](
        *(q, k, v, out, lse, partial, stats, made.first_rows, made.tiles, valid, number, scale * LOG2E.value),
        *(dropout_p, span, lse.numel(), queries, heads, keys, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        D=width, HAS_LENGTHS=lengths is not None, DROPOUT=dropout_p > 0, SPLIT=spans > 1,
        **{n: launch.blocks[n] for n in ("BM", "BN", "TAIL")},
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    if spans > 1:
        _combine[(triton.cdiv(lse.numel(), _COMBINE["BLOCK"]),)](
            *(partial, stats, out, lse, image_index.contiguous(), valid, dropout_p, lse.numel(), queries, heads, spans),
            D=width, HAS_LENGTHS=lengths is not None, **_COMBINE, num_warps=2,
        )  # fmt: skip
    return out, lse


def cases() -> Iterator[Case]:
    """bfloat16 and float32, heads of 64 and 32, with dropout and with spans; float16 differs in conversions."""
    strides = ("q_row", "q_query", "q_head", "k_image", "k_key", "k_head", "v_image", "v_key", "v_head")
    sizes = {**dict.fromkeys(("span", "lines", "T", "H", "N"), "i32"), **dict.fromkeys(strides, "i32")}
    widths = {"few": (64, 32), "many": (64,), "narrow": (32,), "float32": (64, 32)}
    for kind, launches in LAUNCHES.items():
        t = "*fp32" if kind == "float32" else "*bf16"
        pointers = {**dict.fromkeys(("q", "k", "v", "out"), t), **dict.fromkeys(("lse", "partial", "stats"), "*fp32")}
        pointers |= {"first_rows": "*i32", "tiles": "*i32", "lengths": "*i32", "seed": "*i64"}
        signature = {**pointers, "scale": "fp32", "dropout_p": "fp32", **sizes}
        for i, launch in enumerate(launches):
            blocks = {n: launch.blocks[n] for n in ("BM", "BN", "TAIL")}
            for width in widths[kind]:
                for dropout, spans in ((False, True), (True, False)):
                    constants = {"D": width, "HAS_LENGTHS": True, "DROPOUT": dropout, "SPLIT": spans, **blocks}
                    name = f"forward-{kind}-{blocks['BM']}x{blocks['BN']}-{width}-{'split' if spans else 'dropout'}"
                    yield Case(
                        "cross_attention", name, _forward, signature, constants, launch, i == 0,
                        (*pointers, "span", *strides),
                    )  # fmt: skip
    whole = dict.fromkeys(("lines", "T", "H", "S"), "i32")
    pointers = {**dict.fromkeys(("partial", "stats"), "*fp32"), "out": "*bf16", "lse": "*fp32"}
    pointers |= {"image_index": "*i32", "lengths": "*i32"}
    constants = {"D": 64, "HAS_LENGTHS": True, **_COMBINE}
    merge = Launch(_COMBINE, 2)
    signature = {**pointers, "dropout_p": "fp32", **whole}
    yield Case("cross_attention", "combine", _combine, signature, constants, merge, True, tuple(pointers))
    pointers = {"image_index": "*i32", "first_rows": "*i32", "tiles": "*i32"}
    signature = {**pointers, **dict.fromkeys(("R", "images", "T", "bound", "steps"), "i32")}
    constants = {"BM": 64, "BLOCK": 128}
    yield Case("cross_attention", "plan", _plan, signature, constants, Launch(constants, 4), True, tuple(pointers))
