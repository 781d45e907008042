"""The gradient in x of products with packed weights in Triton: dx = dy W, weights made in registers as they pass.

A program owns BM rows and BK columns of dx and sums over the outputs in float32; W's numbers are rounded to dy's dtype
first, as in the `torch` row, because their scales lie on the sum's axis. int4: a program owns one group's columns, the
low and the high nibbles of its bytes in an accumulator each. No dense weight is written, and no atomics: W has no
gradient, and dbias is a sum of its own.

FLOPs 2 M N K; bytes N K (int8) or N K / 2 (int4), 2 M (N + K). Knows tiles; does not know what the gradient is for.

Shapes: M rows, K inputs (columns of dx), N outputs (columns of dy), G groups of 2 HALF columns (HALF = 0 for int8).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch
from miss.kernels.quant_linear.triton_impl import PACKED, as_float, group_parts, launch_for, nibbles, rows_of
from miss.kernels.triton_parts import dot

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "int8": (Launch({"BM": 64, "BN": 64, "BK": 64}, 4, 3), Launch({"BM": 128, "BN": 64, "BK": 128}, 8, 3)),
    "int4": (Launch({"BM": 64, "BN": 64}, 4, 3), Launch({"BM": 128, "BN": 64}, 8, 3)),
    "float32-int8": (Launch({"BM": 16, "BN": 32, "BK": 64}, 4, 2),),
    "float32-int4": (Launch({"BM": 16, "BN": 32}, 4, 2),),
}


@triton.jit
def _backward(
    dy, data, scale, zero, dx, M, N, K, DYS, G,
    HALF: tl.constexpr, HAS_ZERO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """DYS: elements between rows of dy. BK is HALF for int4."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    block = tl.program_id(1)
    live_m = (m < M)[:, None]
    dy_at = dy + m[:, None].to(tl.int64) * DYS + n[None, :]
    n_at = n.to(tl.int64)
    to = dx + m[:, None].to(tl.int64) * K
    acc = tl.zeros((BM, BK), tl.float32)
    if HALF == 0:
        column = block * BK + k
        for start in range(0, N, BN):
            live_n = start + n < N
            step = tl.load(scale + start + n, mask=live_n, other=0.0)
            codes = tl.load(
                data + (start + n_at)[:, None] * K + column[None, :],
                mask=live_n[:, None] & (column < K)[None, :],
                other=0,
            )
            w = (as_float(codes, dy.dtype.element_ty).to(tl.float32) * step[:, None]).to(dy.dtype.element_ty)
            acc = dot(tl.load(dy_at + start, mask=live_m & live_n[None, :], other=0.0), w, acc)
        tl.store(to + column[None, :], acc.to(dx.dtype.element_ty), mask=live_m & (column < K)[None, :])
    else:
        high_acc = tl.zeros((BM, BK), tl.float32)
        for start in range(0, N, BN):
            live_n = start + n < N
            part = (start + n_at) * G + block
            step, zeros = group_parts(scale, zero, part, live_n, HAS_ZERO)
            pairs = tl.load(data + part[:, None] * HALF + k[None, :], mask=live_n[:, None], other=0)
            low, high = nibbles(pairs, step[:, None], zeros[:, None], dy.dtype.element_ty)
            rows = tl.load(dy_at + start, mask=live_m & live_n[None, :], other=0.0)
            acc = dot(rows, low, acc)
            high_acc = dot(rows, high, high_acc)
        column = block * 2 * HALF + k
        tl.store(to + column[None, :], acc.to(dx.dtype.element_ty), mask=live_m & (column < K)[None, :])
        column += HALF
        tl.store(to + column[None, :], high_acc.to(dx.dtype.element_ty), mask=live_m & (column < K)[None, :])


def backward(dy: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int) -> Tensor:
    rows = rows_of(dy)
    dx = dy.new_empty(*dy.shape[:-1], columns)
    if not dx.numel():
        return dx
    kind = f"{'float32-' if dy.dtype == torch.float32 else ''}int{4 if group else 8}"
    launch = launch_for("quant_linear_backward", kind, LAUNCHES, dy, len(data), columns)
    num_groups = -(-columns // group) if group else 0
    blocks = {**launch.blocks, "BK": group // 2} if group else dict(launch.blocks)
    grid = (triton.cdiv(len(rows), blocks["BM"]), num_groups or triton.cdiv(columns, blocks["BK"]))
    _backward[grid](
        *(rows, data, scale, data if zero is None else zero, dx, len(rows), len(data), columns, rows.stride(0)),
        *(num_groups,), HALF=group // 2, HAS_ZERO=zero is not None, **blocks,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return dx


def cases() -> Iterator[Case]:
    """Every launch in bfloat16 with groups of 64 and zero points, and float32's own."""
    for kind, launches in LAUNCHES.items():
        bits = int(kind[-1])
        t, half = "*fp32" if kind.startswith("float32") else "*bf16", 0 if bits == 8 else 32
        signature = {"dy": t, **PACKED[bits], "zero": PACKED[bits]["data"], "dx": t}
        signature |= {"M": "i32", "N": "i32", "K": "i32", "DYS": "i32", "G": "i32"}
        ends = ("dy", "data", "scale", "zero", "dx", "N", "K", "DYS")
        for i, launch in enumerate(launches):
            constants = {"HALF": half, "HAS_ZERO": bits == 4, **launch.blocks} | ({"BK": half} if half else {})
            name = f"{kind}-{'x'.join(map(str, launch.blocks.values()))}"
            yield Case("quant_linear_backward", name, _backward, signature, constants, launch, i == 0, ends)
