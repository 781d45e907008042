"""Products of int8 rows with int8 weights in Triton: whole numbers that are exact, whatever the order of their sum.

    s = max|row| / 127;  q = round(x / s);  y = gelu?((q @ data.T) * s * scale + bias) + residual

`_quantise` makes codes and scale of a row a program (x read twice, the second time from L1). `_product` is a tiled
int8 product with int32 sums; scales, bias, GELU and residual are its epilogue. Up to FEW rows `_few` does both in one
launch: each program takes the maxima of its 16 rows, then makes their codes in registers as it multiplies, K cut into
slices that lie side by side (as in `triton_impl`); the rows are small and come from L2.

Divisions are IEEE's, and rounding half to even is adding and subtracting 1.5 * 2^23, exact in the interpreter and on a
GPU: codes, scales and sums are the reference's bit for bit. A row that holds NaN or infinity is NaN.

FLOPs 2 M N K; bytes N K + 2 M N + M K (2 from bfloat16, 1 written, 1 read). Knows tiles; does not know who made x.

Shapes: M rows, K inputs, N outputs, XS elements between rows of x.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch
from miss.kernels.quant_linear.triton_impl import FEW, launch_for, rows_of
from miss.kernels.triton_parts import erf_gelu

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "few": (Launch({"SLICES": 4, "BM": 16, "BN": 16, "BK": 64}, 4, 4),),
    "some": (Launch({"BM": 64, "BN": 64, "BK": 128}, 4, 4),),
    "many": (Launch({"BM": 128, "BN": 128, "BK": 128}, 8, 3), Launch({"BM": 128, "BN": 64, "BK": 128}, 8, 3)),
    "quantise": (Launch({"BLOCK": 1024}, 4, 1),),
}
FULL = 132  # programs that fill an H100 or H200; 108 an A100


@triton.jit
def _magnitude(x):
    """|x| in float32, infinity for NaN, which a maximum would lose."""
    x = tl.abs(x.to(tl.float32))
    return tl.where(x < float("inf"), x, float("inf"))


@triton.jit
def _step(largest):
    """The scale of rows whose largest magnitude is `largest`, as in packing.quantise_rows."""
    step = tl.maximum(tl.div_rn(largest, 127.0), 1.1754943508222875e-38)
    step = tl.where(largest == 0.0, 1.0, step)
    return tl.where(largest == float("inf"), float("nan"), step)


@triton.jit
def _codes(x, step):
    """round(x / step) as int8, ties to even; 0 where step is NaN."""
    x = tl.where(step == step, x.to(tl.float32), 0.0)
    code = tl.div_rn(x, tl.where(step == step, step, 1.0) + tl.zeros_like(x))
    return ((code + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _quantise(x, codes, steps, K, XS, UNSIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        top = tl.maximum(top, _magnitude(tl.load(x + row * XS + start + k, mask=start + k < K, other=0.0)))
    step = _step(tl.max(top, 0))
    tl.store(steps + row, step)
    for start in range(0, K, BLOCK):
        code = _codes(tl.load(x + row * XS + start + k, mask=start + k < K, other=0.0), step)
        if UNSIGNED:
            code = code.to(tl.uint8, bitcast=True) ^ 128
        tl.store(codes + row * K + start + k, code, mask=start + k < K)


@triton.jit
def _rescaled(total, step, scale, bias, n, N, HAS_BIAS: tl.constexpr):
    """y in float32 of int32 sums; step broadcasts to them, and n is the outputs' numbers with their dimensions."""
    y = (total.to(tl.float32) * step) * tl.load(scale + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    return y


@triton.jit
def _few(
    x, data, scale, bias, y, M, N, K, XS, HAS_BIAS: tl.constexpr,
    SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    column = tl.arange(0, SLICES)[:, None] * BK + tl.arange(0, BK)[None, :]
    live_m = (m < M)[None, None, :]
    live_n = (n < N)[None, :, None]
    x_at = x + m[None, None, :].to(tl.int64) * XS
    data_at = data + n[None, :, None].to(tl.int64) * K
    top = tl.zeros((SLICES, BK, BM), tl.float32)
    for start in range(0, K, SLICES * BK):
        at = (start + column)[:, :, None]
        top = tl.maximum(top, _magnitude(tl.load(x_at + at, mask=live_m & (at < K), other=0.0)))
    step = _step(tl.max(tl.max(top, 1), 0))
    total = tl.zeros((SLICES, BN, BM), tl.int32)
    for start in range(0, K, SLICES * BK):
        at = (start + column)[:, :, None]
        rows = _codes(tl.load(x_at + at, mask=live_m & (at < K), other=0.0), step[None, None, :])
        at = (start + column)[:, None, :]
        w = tl.load(data_at + at, mask=live_n & (at < K), other=0)
        total = tl.dot(w, rows, total, out_dtype=tl.int32)
    out = _rescaled(tl.sum(total, 0), step[None, :], scale, bias, n[:, None], N, HAS_BIAS)
    to = y + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(to, out.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _product(
    codes, steps, data, scale, bias, residual, y, M, N, K,
    UNSIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    codes_at = codes + m[:, None].to(tl.int64) * K + k[None, :]
    data_at = data + n[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        inside = start + k < K
        rows = tl.load(codes_at + start, mask=(m < M)[:, None] & inside[None, :], other=0)
        if UNSIGNED:
            rows = (rows ^ 128).to(tl.int8, bitcast=True)  # beyond the end -128 times a weight of 0
        w = tl.load(data_at + start, mask=(n < N)[None, :] & inside[:, None], other=0)
        total = tl.dot(rows, w, total, out_dtype=tl.int32)
    step = tl.load(steps + m, mask=m < M, other=0.0)
    out = _rescaled(total, step[:, None], scale, bias, n[None, :], N, HAS_BIAS)
    if GELU:
        out = erf_gelu(out)
    here = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    if HAS_RESIDUAL:
        out += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=here)


def _quantised(x: Tensor, unsigned: bool) -> tuple[Tensor, Tensor]:
    """Codes (M, K), int8 or, `unsigned`, 128 more as uint8, and scales (M,) of x (M, K)."""
    codes = torch.empty(x.shape, dtype=torch.uint8 if unsigned else torch.int8, device=x.device)
    steps = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        launch = launch_for("quant_linear_w8a8", "quantise", LAUNCHES, x.device)
        _quantise[(len(x),)](
            x, codes, steps, x.shape[1], x.stride(0), UNSIGNED=unsigned, **launch.blocks, num_warps=launch.num_warps
        )
    return codes, steps


def _multiply(
    codes: Tensor,
    steps: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    y: Tensor,
) -> None:
    """Into y (M, N), of codes (M, K) of either kind."""
    count, num_outputs = y.shape
    tiles = triton.cdiv(count, 128) * triton.cdiv(num_outputs, 128)
    launch = launch_for("quant_linear_w8a8", "many" if tiles >= FULL else "some", LAUNCHES, y.device)
    _product[(triton.cdiv(count, launch.blocks["BM"]), triton.cdiv(num_outputs, launch.blocks["BN"]))](
        *(codes, steps, data, scale, scale if bias is None else bias.contiguous(), y if residual is None else residual),
        *(y, count, num_outputs, data.shape[1]),
        UNSIGNED=codes.dtype == torch.uint8, HAS_BIAS=bias is not None, GELU=gelu, HAS_RESIDUAL=residual is not None,
        **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def dynamic(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, panels: Tensor | None, offset: Tensor | None
) -> Tensor:
    rows, num_outputs = rows_of(x), len(data)
    y = x.new_empty(*x.shape[:-1], num_outputs)
    if not y.numel():
        return y
    if len(rows) > FEW:
        _multiply(*_quantised(rows, False), data, scale, bias, None, False, y.view(-1, num_outputs))
        return y
    launch = launch_for("quant_linear_w8a8", "few", LAUNCHES, x.device)
    _few[(triton.cdiv(len(rows), launch.blocks["BM"]), triton.cdiv(num_outputs, launch.blocks["BN"]))](
        *(rows, data, scale, scale if bias is None else bias.contiguous(), y),
        *(len(rows), num_outputs, data.shape[1], rows.stride(0)),
        HAS_BIAS=bias is not None, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return y


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, steps = _quantised(rows_of(x), True)
    return codes.view(x.shape), steps.view(x.shape[:-1])


def rows(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    panels: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    y = row_scale.new_empty(*row_scale.shape, len(data), dtype=dtype)
    if y.numel():
        flat = codes.reshape(-1, codes.shape[-1]).contiguous()
        added = None if residual is None else residual.contiguous()
        _multiply(flat, row_scale.contiguous(), data, scale, bias, added, gelu, y.view(-1, len(data)))
    return y


def rows_quantised(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Through y in float32: a row's largest number is known only when all its tiles are."""
    return quantise(rows(row_scale, codes, data, scale, bias, None, gelu, torch.float32, panels, offset))


def cases() -> Iterator[Case]:
    """Every launch in bfloat16; products of signed codes with bias alone, of unsigned ones with all epilogues."""
    head = {"data": "*i8", "scale": "*fp32", "bias": "*bf16"}
    sizes = {"M": "i32", "N": "i32", "K": "i32"}
    ends = ("x", "codes", "data", "scale", "bias", "residual", "y", "K", "XS")
    for kind, launches in LAUNCHES.items():
        for i, launch in enumerate(launches):
            name = f"{kind}-{'x'.join(map(str, launch.blocks.values()))}"
            for rich in (False,) if kind == "few" else (False, True):
                if kind == "quantise":
                    kernel, constants = _quantise, {"UNSIGNED": rich}
                    signature = {"x": "*bf16", "codes": "*u8" if rich else "*i8", "steps": "*fp32"}
                    signature |= {"K": "i32", "XS": "i32"}
                elif kind == "few":
                    kernel, constants = _few, {"HAS_BIAS": True}
                    signature = {"x": "*bf16", **head, "y": "*bf16", **sizes, "XS": "i32"}
                else:
                    kernel = _product
                    constants = {"UNSIGNED": rich, "HAS_BIAS": True, "GELU": rich, "HAS_RESIDUAL": rich}
                    signature = {"codes": "*u8" if rich else "*i8", "steps": "*fp32", **head}
                    signature |= {"residual": "*bf16", "y": "*bf16", **sizes}
                end = tuple(e for e in ends if e in signature)
                full, constants = f"{name}{'-rows' if rich else ''}", {**constants, **launch.blocks}
                yield Case("quant_linear_w8a8", full, kernel, signature, constants, launch, i == 0, end)
