"""A linear layer in Triton whose tiles are stored where the caller wants them, in any strides.

A program a tile (BM rows, BN columns) of x @ weight.T, accumulated in float32; its epilogue adds the bias and turns row
and column numbers into places of `out`: the keys and values of all layers in one product, written by layer and head
with no copy after it. The tile depends on the dtype alone: a row's bits do not depend on how many rows come along.

FLOPs 2 M N K. Elements moved: x, weight and out, once. A float32 weight of half rows is rounded once, before. Knows
tiles and strides; does not know what the dimensions of `out` stand for.

Shapes: M rows, K width, N outputs, T rows to an outer step, H pieces to a far step, D outputs that lie side by side.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.linear.into import dense_dims
from miss.kernels.triton_parts import dense_rows, linear_tile

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "into": (
        Launch({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 3),
        Launch({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, 8, 3),
        Launch({"BM": 64, "BN": 128, "BK": 64, "GROUP": 8}, 4, 3),
    ),
    "into-float32": (Launch({"BM": 32, "BN": 64, "BK": 32, "GROUP": 8}, 4, 2),),
}


@triton.jit
def _into(
    x, w, bias, out, M, N, K, x_stride, w_stride, T, outer_stride, row_stride, H, far_stride, near_stride,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Row i of out begins at (i // T, i % T), its output n at (n // D // H, n // D % H, n % D)."""
    z, top, left = linear_tile(x, w, M, N, K, x_stride, w_stride, EVEN, BM, BN, BK, GROUP)
    row = top + tl.arange(0, BM)
    column = left + tl.arange(0, BN)
    if HAS_BIAS:
        z += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    line = (row // T).to(tl.int64) * outer_stride + (row % T).to(tl.int64) * row_stride
    piece = column // D
    place = (piece // H).to(tl.int64) * far_stride + (piece % H).to(tl.int64) * near_stride + column % D
    live = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out + line[:, None] + place[None, :], z.to(out.dtype.element_ty), mask=live)


def into(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, out: Tensor) -> None:
    rows, outputs, leading = dense_rows(x), len(weight), x.dim() - 1
    if not (len(rows) and outputs):
        return
    w = dense_rows(weight.to(x.dtype))
    (_, outer_stride), (count, row_stride) = dense_dims(out, 0, leading, 2)
    (_, far_stride), (pieces, near_stride), (dense, _) = dense_dims(out, leading, out.dim(), 3)
    kind = "into-float32" if x.dtype == torch.float32 else "into"
    launch = choose("linear_into", kind, {k: v[0] for k, v in LAUNCHES.items()}, x, *weight.shape)
    blocks = launch.blocks
    _into[(triton.cdiv(len(rows), blocks["BM"]) * triton.cdiv(outputs, blocks["BN"]),)](
        *(rows, w, rows if bias is None else bias.contiguous(), out, len(rows), outputs, rows.shape[1]),
        *(rows.stride(0), w.stride(0), count, outer_stride, row_stride, pieces, far_stride, near_stride),
        HAS_BIAS=bias is not None, EVEN=rows.shape[1] % blocks["BK"] == 0, D=dense,
        **blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Pieces of 64 in every launch; in the default, of 32 and a whole row, float16 and no bias; float32's."""
    pointers, steps = ("x", "w", "bias", "out"), ("outer_stride", "row_stride", "far_stride", "near_stride")
    sizes = ("M", "N", "K", "x_stride", "w_stride", "T", "outer_stride", "row_stride", "H", "far_stride", "near_stride")
    for kind, launches in LAUNCHES.items():
        for i, launch in enumerate(launches):
            element = "*fp32" if kind.endswith("float32") else "*bf16"
            forms = [(element, 64, True)]
            if kind == "into" and i == 0:
                forms += [(element, 32, True), (element, 18432, True), ("*fp16", 64, True), (element, 64, False)]
            for t, dense, has_bias in forms:
                name = f"{kind}-{'x'.join(map(str, launch.blocks.values()))}-{t.removeprefix('*')}-{dense}"
                signature = {**dict.fromkeys(pointers, t), **dict.fromkeys(sizes, "i32")}
                constants = {"HAS_BIAS": has_bias, "EVEN": True, "D": dense, **launch.blocks}
                ends = (*pointers, "N", "K", "x_stride", "w_stride", *steps)
                label = name if has_bias else f"{name}-no-bias"
                yield Case("linear_into", label, _into, signature, constants, launch, i == 0, ends)
