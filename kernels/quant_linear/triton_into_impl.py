"""A product with int8 activations in Triton whose tiles are stored where the caller wants them, in any strides.

Rows are quantised by `triton_w8a8_impl`'s kernel; then a program a tile (BM rows, BN columns) of codes @ data.T, summed
exactly in int32, whose epilogue scales it, adds the bias and turns row and column numbers into places of `out`, as
linear's `into` does. Bits do not depend on tiles or on the batch.

FLOPs 2 M N K. Bytes: x read twice (the second time from L2), codes written and read, the weight and out once. Knows
tiles and strides; does not know what the dimensions of `out` stand for.

Shapes: M rows, K width, N outputs, T rows to an outer step, H pieces to a far step, D outputs that lie side by side.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor, int8

from miss.kernels.launches import Case, Launch
from miss.kernels.linear.into import dense_dims
from miss.kernels.quant_linear.triton_impl import launch_for, rows_of
from miss.kernels.quant_linear.triton_w8a8_impl import _dot, _quantised, _rescaled
from miss.kernels.triton_parts import tile_corner

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "into": (
        Launch({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, 8, 3),
        Launch({"BM": 64, "BN": 128, "BK": 128, "GROUP": 8}, 4, 3),
    ),
}


@triton.jit
def _into(
    codes, steps, data, scale, bias, out, M, N, K, T, outer_stride, row_stride, H, far_stride, near_stride,
    HAS_BIAS: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Row i of out begins at (i // T, i % T), its output n at (n // D // H, n // D % H, n % D).

    Rows beyond M and columns beyond N compute the last one again, which spares the masks of their loads.
    """
    top, left = tile_corner(M, N, BM, BN, GROUP)
    row = top + tl.arange(0, BM)
    column = left + tl.arange(0, BN)
    k = tl.arange(0, BK)
    codes_at = codes + tl.minimum(row, M - 1)[:, None].to(tl.int64) * K + k[None, :]
    data_at = data + tl.minimum(column, N - 1)[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        inside = start + k < K
        a = tl.load(codes_at + start, mask=inside[None, :], other=0)
        b = tl.load(data_at + start, mask=inside[:, None], other=0)
        total = _dot(a, b, total, BK, False)
    step = tl.load(steps + row, mask=row < M, other=0.0)
    z = _rescaled(total, step[:, None], scale, bias, column[None, :], N, HAS_BIAS)
    line = (row // T).to(tl.int64) * outer_stride + (row % T).to(tl.int64) * row_stride
    piece = column // D
    place = (piece // H).to(tl.int64) * far_stride + (piece % H).to(tl.int64) * near_stride + column % D
    live = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out + line[:, None] + place[None, :], z.to(out.dtype.element_ty), mask=live)


def into(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    rows, outputs, leading = rows_of(x), len(data), x.dim() - 1
    if not len(rows):
        return
    codes, steps = _quantised(rows, int8)
    (_, outer_stride), (count, row_stride) = dense_dims(out, 0, leading, 2)
    (_, far_stride), (pieces, near_stride), (dense, _) = dense_dims(out, leading, out.dim(), 3)
    launch = launch_for("quant_linear_into", "into", LAUNCHES, x, outputs, data.shape[1])
    blocks = launch.blocks
    _into[(triton.cdiv(len(rows), blocks["BM"]) * triton.cdiv(outputs, blocks["BN"]),)](
        *(codes, steps, data, scale, scale if bias is None else bias.contiguous(), out, len(rows), outputs),
        *(data.shape[1], count, outer_stride, row_stride, pieces, far_stride, near_stride),
        HAS_BIAS=bias is not None, D=dense, **blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Pieces of 64 in every launch; in the default, of 32 and a whole row, and no bias."""
    steps = ("outer_stride", "row_stride", "far_stride", "near_stride")
    pointers = {"codes": "*i8", "steps": "*fp32", "data": "*i8", "scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
    signature = {**pointers, **dict.fromkeys(("M", "N", "K", "T", *steps[:2], "H", *steps[2:]), "i32")}
    for i, launch in enumerate(LAUNCHES["into"]):
        for dense, has_bias in ((64, True), (32, True), (18432, True), (64, False)) if i == 0 else ((64, True),):
            constants = {"HAS_BIAS": has_bias, "D": dense, **launch.blocks}
            name = f"into-{'x'.join(map(str, launch.blocks.values()))}-{dense}{'' if has_bias else '-no-bias'}"
            ends = (*pointers, "N", "K", *steps)
            yield Case("quant_linear_into", name, _into, signature, constants, launch, i == 0, ends)
