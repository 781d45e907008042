"""Linear, bias and exact GELU in Triton: the product's epilogue adds the bias and applies z * Phi(z) with the true erf.

Forward: a program a tile of y (BM rows, BN columns), its product accumulated in float32; z goes straight from the
registers through erf to y, and is written beside y, in y's dtype, only where a gradient will be needed. Backward: one
pass over dy and z makes Phi(z) + z phi(z) again, writes dz in x's dtype, and adds up dbias in float32 in PARTS parts a
column, summed in their order by a second kernel; the two products with dz are the library's GEMMs. No atomics. The tile
depends on the dtype alone, so that a row's bits do not depend on how many rows come along.

FLOPs 2 M F C forward, 4 M F C backward. Elements moved forward: x, W, y (and z); backward beyond the GEMMs 3 M F. A
float32 weight of half rows is rounded once, before the product. Knows tiles; does not know what follows.

Shapes: M rows, C width, F inner width, P parts.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dense_rows, erf_gelu, erf_gelu_grad, linear_tile, sum_parts

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "forward": (
        Launch({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 3),
        Launch({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, 8, 3),
        Launch({"BM": 64, "BN": 128, "BK": 64, "GROUP": 8}, 4, 3),
    ),
    "forward-float32": (Launch({"BM": 32, "BN": 64, "BK": 32, "GROUP": 8}, 4, 2),),
    # PARTS times the 24 columns of blocks of 3,072 is 8 programs for each of an H200's multiprocessors
    "backward": (
        Launch({"BM": 16, "BN": 128, "PARTS": 44}, 4, 2),
        Launch({"BM": 32, "BN": 128, "PARTS": 44}, 8, 2),
    ),
    "sum": (Launch({"BP": 32, "BC": 32}, 4),),
}


@triton.jit
def _finish(z, top, left, bias, y, pre, M, F, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr):
    """Bias and GELU of the (BM, columns) whose first row and column are `top` and `left`."""
    row = tl.arange(0, z.shape[0])[:, None]
    column = tl.arange(0, z.shape[1])[None, :]
    live = (top + row < M) & (left + column < F)
    if HAS_BIAS:
        z += tl.load(bias + left + column, mask=left + column < F, other=0.0).to(tl.float32)
    corner = top.to(tl.int64) * F + left
    at = row * F + column  # 32 bits within the tile: half the registers of 64
    if KEEP:
        tl.store(pre + corner + at, z.to(pre.dtype.element_ty), mask=live)
    tl.store(y + corner + at, erf_gelu(z).to(y.dtype.element_ty), mask=live)


@triton.jit
def _halves(z):
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _forward(
    x, w, bias, y, pre, M, F, C, x_stride, w_stride,
    HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One quarter of the tile's columns is finished after the other: erf of them all together fills the registers."""
    z, top, left = linear_tile(x, w, M, F, C, x_stride, w_stride, EVEN, BM, BN, BK, GROUP)
    low, high = _halves(z)
    first, second = _halves(low)
    third, fourth = _halves(high)
    _finish(first, top, left, bias, y, pre, M, F, HAS_BIAS, KEEP)
    _finish(second, top, left + BN // 4, bias, y, pre, M, F, HAS_BIAS, KEEP)
    _finish(third, top, left + BN // 2, bias, y, pre, M, F, HAS_BIAS, KEEP)
    _finish(fourth, top, left + 3 * BN // 4, bias, y, pre, M, F, HAS_BIAS, KEEP)


@triton.jit
def _backward(
    dy, pre, dz, partial, M, F, dy_stride,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dz, and partial (P, F): what every PARTS-th block of rows adds to dbias."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for start in range(tl.program_id(1) * BM, M, PARTS * BM):
        row = (start + tl.arange(0, BM))[:, None].to(tl.int64)
        live = (row < M) & (column < F)[None, :]
        z = tl.load(pre + row * F + column[None, :], mask=live, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + column[None, :], mask=live, other=0.0).to(tl.float32) * erf_gelu_grad(z)
        total += tl.sum(g, 0)
        tl.store(dz + row * F + column[None, :], g.to(dz.dtype.element_ty), mask=live)
    tl.store(partial + tl.program_id(1).to(tl.int64) * F + column, total, mask=column < F)


def _launch(kind: str, x: Tensor, inner: int) -> tuple[Launch, dict[str, int]]:
    launch = choose("gelu_mlp", kind, {k: v[0] for k, v in LAUNCHES.items()}, x, x.shape[-1], inner)
    return launch, {**launch.blocks, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, panels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, z), z with no elements unless `keep`."""
    (inner, width), rows = weight.shape, dense_rows(x)
    y = torch.empty(*x.shape[:-1], inner, dtype=x.dtype, device=x.device)
    pre = torch.empty_like(y) if keep else x.new_empty(0)
    if len(rows):
        w = dense_rows(weight.to(x.dtype))
        launch, options = _launch("forward-float32" if x.dtype == torch.float32 else "forward", x, inner)
        blocks = launch.blocks
        _forward[(triton.cdiv(len(rows), blocks["BM"]) * triton.cdiv(inner, blocks["BN"]),)](
            *(rows, w, rows if bias is None else bias.contiguous(), y, pre),
            *(len(rows), inner, width, rows.stride(0), w.stride(0)),
            HAS_BIAS=bias is not None, KEEP=keep, EVEN=width % blocks["BK"] == 0, **options,
        )  # fmt: skip
    return y, pre


def backward(dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) from the z that forward kept."""
    gradient, rows, inner = dense_rows(dy), x.reshape(-1, x.shape[-1]), len(weight)
    dz = torch.empty(len(rows), inner, dtype=x.dtype, device=x.device)
    dbias = torch.zeros(inner, dtype=x.dtype, device=x.device)
    if len(rows):
        launch, options = _launch("backward", x, inner)
        parts = min(launch.blocks["PARTS"], triton.cdiv(len(rows), launch.blocks["BM"]))
        partial = torch.empty(parts, inner, dtype=torch.float32, device=x.device)
        _backward[(triton.cdiv(inner, launch.blocks["BN"]), parts)](
            gradient, pre.contiguous(), dz, partial, len(rows), inner, gradient.stride(0), **options
        )
        launch, options = _launch("sum", x, inner)
        grid = (triton.cdiv(inner, launch.blocks["BC"]), 1)
        sum_parts[grid](partial, dbias, dbias, parts, inner, OUTPUTS=1, **options)
    dx = (dz @ weight.to(x.dtype)).view(x.shape)
    return dx, (dz.T @ rows).to(weight.dtype), dbias


def cases() -> Iterator[Case]:
    """Every launch in bfloat16 with z kept; the default without it, in float16 and at an odd width, too; float32's."""
    for kind, launches in LAUNCHES.items():
        if not kind.startswith("forward"):
            continue
        for i, launch in enumerate(launches):
            name = f"{kind}-{'x'.join(map(str, launch.blocks.values()))}"
            element = "*fp32" if kind.endswith("float32") else "*bf16"
            forms = [("", element, True, True)]
            if kind == "forward" and i == 0:
                forms += [("-inference", element, False, True), ("-fp16", "*fp16", True, True)]
                forms += [("-odd", element, True, False)]
            for suffix, t, keep, even in forms:
                pointers = dict.fromkeys(("x", "w", "bias", "y", "pre"), t)
                signature = {**pointers, **dict.fromkeys(("M", "F", "C", "x_stride", "w_stride"), "i32")}
                constants = {"HAS_BIAS": True, "KEEP": keep, "EVEN": even, **launch.blocks}
                ends = (*pointers, "F", *(("C", "x_stride", "w_stride") if even else ()))
                yield Case("gelu_mlp", f"{name}{suffix}", _forward, signature, constants, launch, i == 0, ends)
    for i, launch in enumerate(LAUNCHES["backward"]):
        for t in ("*bf16", "*fp32") if i == 0 else ("*bf16",):
            signature = {"dy": t, "pre": t, "dz": t, "partial": "*fp32", "M": "i32", "F": "i32", "dy_stride": "i32"}
            name = f"backward-{'x'.join(map(str, launch.blocks.values()))}-{t.removeprefix('*')}"
            ends = ("dy", "pre", "dz", "partial", "F", "dy_stride")
            yield Case("gelu_mlp", name, _backward, signature, dict(launch.blocks), launch, i == 0, ends)
    (launch,) = LAUNCHES["sum"]
    signature = {"partial": "*fp32", "first": "*bf16", "second": "*bf16", "P": "i32", "C": "i32"}
    ends = ("partial", "first", "second", "C")
    yield Case("gelu_mlp", "sum", sum_parts, signature, {"OUTPUTS": 1, **launch.blocks}, launch, True, ends)
