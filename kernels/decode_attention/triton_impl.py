"""Decode attention in Triton: a program a row and head, one pass over the row's own positions.

The new token is one query, so that products are sums on the vector units (a tensor core's tile would be 15/16 empty):
scores of BN keys at once, softmax in base 2 with the scale folded into the query, everything in float32. The loop ends
at the row's length, which the program reads itself; the host reads nothing. Bytes: 4 H D n of a 16-bit cache of n
positions, each read once; 4 H D n operations: bound by memory, and at a few dozen positions by the launch.

With APPEND the program writes the row's own key and value to the cache on the way. It may not read what others write in
the same launch: rows of its slot that stand before it in the call, at the positions before its own, are counted, and
those positions come from the new rows, cast as the cache holds them. So bits are those of appending first.

A row's blocks depend on its length alone, so that its result does not depend on its batch. Knows tiles; does not know
who owns a slot.

Shapes: R rows, H heads, D head width, S slots, L positions.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "short": (Launch({"BN": 16}, 1, 2), Launch({"BN": 32}, 1, 2)),
    "long": (Launch({"BN": 64}, 4, 2), Launch({"BN": 128}, 4, 2)),
}
LONG = 64  # positions of a slot beyond which a program takes 4 warps
LOG2E = 1.4426950408889634


@triton.jit
def _first_new(slots, positions, row, slot, position, BLOCK: tl.constexpr):
    """The lowest position of this slot that comes from the call: those of rows before this one, without a gap."""
    j = tl.arange(0, BLOCK)
    first = position
    more = row > 0
    while more:
        at = row - 1 - (position - first) - j
        theirs = tl.load(slots + at, mask=at >= 0, other=-1).to(tl.int64)
        held = tl.load(positions + at, mask=at >= 0, other=0).to(tl.int32)
        follows = (at >= 0) & (theirs == slot) & (held == first - 1 - j)
        run = tl.min(tl.where(follows, BLOCK, j), 0)
        first -= run
        more = run == BLOCK
    return first


@triton.jit
def _with_new(cached, own, row_step, cache, start, first, length, BN: tl.constexpr):
    """The tile (BN, D) of positions from `start` on, those from `first` on taken from the rows up to the own one."""
    n = start + tl.arange(0, BN)
    if start + BN > first:
        new = ((n >= first) & (n < length))[:, None]
        behind = (n - (length - 1))[:, None]  # rows between the one that brings a position and this one
        tile = tl.load(own + behind * row_step, mask=new, other=0.0).to(cache.dtype.element_ty)
        cached = tl.where(new, tile.to(tl.float32), cached)
    return cached


@triton.jit
def _decode(
    q, new_k, new_v, k_cache, v_cache, slots, lengths, out, scale, H,
    q_row, q_head, new_k_row, new_k_head, new_v_row, new_v_head, k_slot, k_position, k_head, v_slot, v_position, v_head,
    APPEND: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (R, H); out (R, H, D) contiguous. scale has log2(e) in it. APPEND: lengths are the new tokens' positions."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    first = length
    d = tl.arange(0, D)
    n = tl.arange(0, BN)
    query = tl.load(q + row * q_row + head * q_head + d).to(tl.float32) * scale
    keys = k_cache + slot * k_slot + head * k_head + d[None, :]
    values = v_cache + slot * v_slot + head * v_head + d[None, :]
    if APPEND:
        own_k = new_k + row * new_k_row + head * new_k_head + d[None, :]
        own_v = new_v + row * new_v_row + head * new_v_head + d[None, :]
        position = length.to(tl.int64)
        tl.store(keys + position * k_position, tl.load(own_k).to(k_cache.dtype.element_ty))
        tl.store(values + position * v_position, tl.load(own_v).to(v_cache.dtype.element_ty))
        first = _first_new(slots, lengths, row, slot, length, 32)
        length += 1
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((D,), tl.float32)
    for start in range(0, length, BN):
        valid = start + n < length
        cached = start + n < first
        at = (start + n).to(tl.int64)[:, None]
        k = tl.load(keys + at * k_position, mask=cached[:, None], other=0.0).to(tl.float32)
        if APPEND:
            k = _with_new(k, own_k, new_k_row, k_cache, start, first, length, BN)
        scores = tl.where(valid, tl.sum(k * query[None, :], 1), float("-inf"))
        v = tl.load(values + at * v_position, mask=cached[:, None], other=0.0).to(tl.float32)
        if APPEND:
            v = _with_new(v, own_v, new_v_row, v_cache, start, first, length, BN)
        new_top = tl.maximum(top, tl.max(scores, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing above minus infinity yet
        p = tl.exp2(scores - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 0)
        mixed = mixed * shrink + tl.sum(p[:, None] * v, 0)
        top = new_top
    if length > 0:
        mixed = mixed / total  # 0 / 0 where a row sees nothing above minus infinity: NaN, as softmax has it
    tl.store(out + (row * H + head) * D + d, mixed.to(out.dtype.element_ty))


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return _run(q, q, q, k_cache, v_cache, slots, lengths, scale, False)


def append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    return _run(q, k, v, k_cache, v_cache, slots, positions, scale, True)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    ends: Tensor,
    scale: float,
    append: bool,
) -> Tensor:
    rows, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    kind = "long" if k_cache.shape[1] > LONG else "short"
    launch = choose("decode_attention", kind, {k: v[0] for k, v in LAUNCHES.items()}, q, width, k_cache.shape[1])
    _decode[(rows, heads)](
        *(q, k, v, k_cache, v_cache, slots.contiguous(), ends.contiguous(), out, scale * LOG2E, heads),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        APPEND=append, D=width, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out


def cases() -> Iterator[Case]:
    """Every block in bfloat16 and float32 (float16 differs in no instruction but the conversion), both head widths;
    with the append, the defaults in bfloat16."""
    strides = ["q_row", "q_head", "new_k_row", "new_k_head", "new_v_row", "new_v_head"]
    strides += ["k_slot", "k_position", "k_head", "v_slot", "v_position", "v_head"]
    forms = [("bf16", 64, False), ("bf16", 32, False), ("fp32", 64, False), ("fp32", 32, False)]
    appending = [("bf16", 64, True), ("bf16", 32, True), ("fp32", 64, True)]
    for kind, launches in LAUNCHES.items():
        for i, launch in enumerate(launches):
            for t, width, append in forms + appending if i == 0 else forms:
                pointers = dict.fromkeys(("q", "new_k", "new_v", "k_cache", "v_cache"), f"*{t}")
                pointers |= {"slots": "*i32", "lengths": "*i32", "out": f"*{t}"}
                signature = {**pointers, "scale": "fp32", "H": "i32", **dict.fromkeys(strides, "i32")}
                constants = {"APPEND": append, "D": width, **launch.blocks}
                name = f"{kind}-{t}-{width}-{launch.blocks['BN']}"
                op = "decode_attention_append" if append else "decode_attention"
                yield Case(op, name, _decode, signature, constants, launch, i == 0, (*pointers, *strides))
