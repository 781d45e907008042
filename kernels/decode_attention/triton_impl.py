"""Decode attention in Triton: a program a row and head, one pass over the row's own positions.

The new token is one query, so that products are sums on the vector units (a tensor core's tile would be 15/16 empty):
scores of BN keys at once, softmax in base 2 with the scale folded into the query, everything in float32. The loop ends
at lengths[r], which the program reads itself; the host reads nothing. Bytes: 4 H D lengths[r] of a 16-bit cache, each
read once; 4 H D lengths[r] operations: bound by memory, and at a few dozen positions by the launch.

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
def _decode(
    q, k_cache, v_cache, slots, lengths, out, scale, H,
    q_row, q_head, k_slot, k_position, k_head, v_slot, v_position, v_head,
    D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (R, H); out (R, H, D) contiguous. scale has log2(e) in it."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.load(lengths + row)
    d = tl.arange(0, D)
    n = tl.arange(0, BN)
    query = tl.load(q + row * q_row + head * q_head + d).to(tl.float32) * scale
    keys = k_cache + slot * k_slot + head * k_head + d[None, :]
    values = v_cache + slot * v_slot + head * v_head + d[None, :]
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((D,), tl.float32)
    for start in range(0, length, BN):
        valid = start + n < length
        at = (start + n).to(tl.int64)[:, None]
        k = tl.load(keys + at * k_position, mask=valid[:, None], other=0.0).to(tl.float32)
        v = tl.load(values + at * v_position, mask=valid[:, None], other=0.0).to(tl.float32)
        scores = tl.where(valid, tl.sum(k * query[None, :], 1), float("-inf"))
        new = tl.maximum(top, tl.max(scores, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing above minus infinity yet
        p = tl.exp2(scores - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 0)
        mixed = mixed * shrink + tl.sum(p[:, None] * v, 0)
        top = new
    if length > 0:
        mixed = mixed / total  # 0 / 0 where a row sees nothing above minus infinity: NaN, as softmax has it
    tl.store(out + (row * H + head) * D + d, mixed.to(out.dtype.element_ty))


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    rows, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    kind = "long" if k_cache.shape[1] > LONG else "short"
    launch = choose("decode_attention", kind, {k: v[0] for k, v in LAUNCHES.items()}, q.device)
    _decode[(rows, heads)](
        *(q, k_cache, v_cache, slots.contiguous(), lengths.contiguous(), out, scale * LOG2E, heads),
        *(*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        D=width, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out


def cases() -> Iterator[Case]:
    """Every block in bfloat16 and float32 (float16 differs in no instruction but the conversion), both head widths."""
    strides = ("q_row", "q_head", "k_slot", "k_position", "k_head", "v_slot", "v_position", "v_head")
    for kind, launches in LAUNCHES.items():
        for i, launch in enumerate(launches):
            for t, width in (("bf16", 64), ("bf16", 32), ("fp32", 64), ("fp32", 32)):
                pointers = {"q": f"*{t}", "k_cache": f"*{t}", "v_cache": f"*{t}", "slots": "*i32", "lengths": "*i32"}
                pointers["out"] = f"*{t}"
                signature = {**pointers, "scale": "fp32", "H": "i32", **dict.fromkeys(strides, "i32")}
                name = f"{kind}-{t}-{width}-{launch.blocks['BN']}"
                yield Case(
                    "decode_attention", name, _decode, signature, {"D": width, **launch.blocks}, launch, i == 0,
                    (*pointers, *strides),
                )  # fmt: skip
