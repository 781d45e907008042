"""Tree attention in Triton: a program a node and head, over exactly the rows that the node names.

A node's ancestors are a few rows anywhere among the packed ones: they are gathered by index, BL at a time, and never
copied. One query makes products sums on the vector units; softmax in base 2 with the scale folded into the query,
everything in float32. Siblings read the same rows, from L1 or L2. Bytes: 4 N L H D of a 16-bit dtype, mostly from L2;
4 N L H D operations.

Places hold -1 anywhere in the list, and a block of nothing else changes no bit: a node's result does not depend on how
long the lists of others are. Knows tiles; does not know what the tokens are.

Shapes: N nodes, L ancestors, H heads, D head width.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "tree": (Launch({"BL": 16}, 1, 2), Launch({"BL": 8}, 1, 2)),
}
LOG2E = 1.4426950408889634


@triton.jit
def _tree(
    q, k, v, ancestors, out, scale, H, L, q_node, q_head, k_node, k_head, v_node, v_head,
    D: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Grid (N, H); out (N, H, D) and ancestors (N, L) contiguous. scale has log2(e) in it."""
    node = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    j = tl.arange(0, BL)
    query = tl.load(q + node * q_node + head * q_head + d).to(tl.float32) * scale
    keys = k + head * k_head + d[None, :]
    values = v + head * v_head + d[None, :]
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    count = tl.zeros((1,), tl.int32)
    mixed = tl.zeros((D,), tl.float32)
    for start in range(0, L, BL):
        row = tl.load(ancestors + node * L + start + j, mask=start + j < L, other=-1).to(tl.int64)
        seen = row >= 0
        key = tl.load(keys + row[:, None] * k_node, mask=seen[:, None], other=0.0).to(tl.float32)
        value = tl.load(values + row[:, None] * v_node, mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(key * query[None, :], 1), float("-inf"))
        new = tl.maximum(top, tl.max(scores, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing above minus infinity yet
        p = tl.exp2(scores - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 0)
        mixed = mixed * shrink + tl.sum(p[:, None] * value, 0)
        count += tl.sum(seen.to(tl.int32), 0)
        top = new
    # 0 / 0 where all that is seen is minus infinity: NaN, as softmax has it; zeros where nothing is seen.
    mixed = tl.where(count > 0, mixed / total, 0.0)
    tl.store(out + (node * H + head) * D + d, mixed.to(out.dtype.element_ty))


def forward(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, scale: float) -> Tensor:
    nodes, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    launch = choose("tree_attention", "tree", {kind: table[0] for kind, table in LAUNCHES.items()}, q, width)
    _tree[(nodes, heads)](
        *(q, k, v, ancestors.contiguous(), out, scale * LOG2E, heads, ancestors.shape[1]),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        D=width, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out


def cases() -> Iterator[Case]:
    """Every block in bfloat16 and float32, both head widths, and int64 ancestors once."""
    strides = ("q_node", "q_head", "k_node", "k_head", "v_node", "v_head")
    forms = [("bf16", 64, "i32"), ("bf16", 32, "i32"), ("fp32", 64, "i32"), ("fp32", 32, "i32"), ("bf16", 64, "i64")]
    for i, launch in enumerate(LAUNCHES["tree"]):
        for t, width, whole in forms if i == 0 else forms[:2]:
            pointers = {"q": f"*{t}", "k": f"*{t}", "v": f"*{t}", "ancestors": f"*{whole}", "out": f"*{t}"}
            signature = {**pointers, "scale": "fp32", **dict.fromkeys(("H", "L", *strides), "i32")}
            name = f"{t}-{width}-{launch.blocks['BL']}{'-int64' * (whole == 'i64')}"
            ends = (*pointers, *strides)
            yield Case("tree_attention", name, _tree, signature, {"D": width, **launch.blocks}, launch, i == 0, ends)
