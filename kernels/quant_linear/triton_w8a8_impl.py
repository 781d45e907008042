"""Products of 8-bit rows with 8-bit weights in Triton: int8 sums are exact, whatever their order; fp8 sums are float32.

    s = max|row| / L;  q = round(x / s);  y = gelu?((q @ data.T) * s * scale + bias) + residual     L = 127, fp8: 448

`_quantise` makes codes and scale of a row a program (x read twice, the second time from L1). `_product` is a tiled
int8 product with int32 sums; scales, bias, GELU and residual are its epilogue. Up to FEW rows `_few` does both in one
launch: each program takes the maxima of its 16 rows, then makes their codes in registers as it multiplies, K cut into
slices that lie side by side (as in `triton_impl`); the rows are small and come from L2.

Divisions are IEEE's, and rounding half to even is adding and subtracting 1.5 * 2^23, exact in the interpreter and on a
GPU: codes, scales and int8's sums are the reference's bit for bit. fp8's numbers are rounded to e4m3 in float32 first,
because the interpreter's own conversion is wrong (-31.7 becomes -16). Hopper adds fp8 products with about 14 bits
within an instruction's sum, so that every BK of them go to a float32 sum of their own (max_num_imprecise_acc). A row
that holds NaN or infinity is NaN.

FLOPs 2 M N K; bytes N K + 2 M N + M K (2 from bfloat16, 1 written, 1 read). Knows tiles; does not know who made x.

Shapes: M rows, K inputs, N outputs, XS elements between rows of x.
"""

import itertools
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
FLOAT8 = torch.float8_e4m3fn
FULL = 132  # programs that fill an H100 or H200; 108 an A100


@triton.jit
def _magnitude(x):
    """|x| in float32, infinity for NaN, which a maximum would lose."""
    x = tl.abs(x.to(tl.float32))
    return tl.where(x < float("inf"), x, float("inf"))


@triton.jit
def _step(largest, FP8: tl.constexpr):
    """The scale of rows whose largest magnitude is `largest`, as in packing.quantise_rows."""
    step = tl.maximum(tl.div_rn(largest, 448.0 if FP8 else 127.0), 1.1754943508222875e-38)
    step = tl.where(largest == 0.0, 1.0, step)
    return tl.where(largest == float("inf"), float("nan"), step)


@triton.jit
def _e4m3(x):
    """|x| <= 448 as e4m3, ties to even: below 2^-6 multiples of 2^-9 (1.5 * 2^14's last place), else 3 bits."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, small, normal).to(tl.float8e4nv)


@triton.jit
def _codes(x, step, FP8: tl.constexpr):
    """round(x / step) as int8 or e4m3, ties to even; 0 where step is NaN."""
    x = tl.where(step == step, x.to(tl.float32), 0.0)
    code = tl.div_rn(x, tl.where(step == step, step, 1.0) + tl.zeros_like(x))
    if FP8:
        return _e4m3(tl.minimum(tl.maximum(code, -448.0), 448.0))
    else:
        return ((code + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _dot(a, b, total, BK: tl.constexpr, FP8: tl.constexpr):
    if FP8:
        return tl.dot(a, b, total, max_num_imprecise_acc=BK)
    else:
        return tl.dot(a, b, total, out_dtype=tl.int32)


@triton.jit
def _quantise(x, codes, steps, K, XS, UNSIGNED: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        top = tl.maximum(top, _magnitude(tl.load(x + row * XS + start + k, mask=start + k < K, other=0.0)))
    step = _step(tl.max(top, 0), FP8)
    tl.store(steps + row, step)
    for start in range(0, K, BLOCK):
        code = _codes(tl.load(x + row * XS + start + k, mask=start + k < K, other=0.0), step, FP8)
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
    x, data, scale, bias, y, M, N, K, XS, HAS_BIAS: tl.constexpr, FP8: tl.constexpr,
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
    step = _step(tl.max(tl.max(top, 1), 0), FP8)
    total = tl.zeros((SLICES, BN, BM), tl.float32 if FP8 else tl.int32)
    for start in range(0, K, SLICES * BK):
        at = (start + column)[:, :, None]
        rows = _codes(tl.load(x_at + at, mask=live_m & (at < K), other=0.0), step[None, None, :], FP8)
        at = (start + column)[:, None, :]
        w = tl.load(data_at + at, mask=live_n & (at < K), other=0.0 if FP8 else 0)
        total = _dot(w, rows, total, BK, FP8)
    out = _rescaled(tl.sum(total, 0), step[None, :], scale, bias, n[:, None], N, HAS_BIAS)
    to = y + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(to, out.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _product(
    codes, steps, data, scale, bias, residual, y, M, N, K,
    UNSIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FP8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    codes_at = codes + m[:, None].to(tl.int64) * K + k[None, :]
    data_at = data + n[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros((BM, BN), tl.float32 if FP8 else tl.int32)
    for start in range(0, K, BK):
        inside = start + k < K
        rows = tl.load(codes_at + start, mask=(m < M)[:, None] & inside[None, :], other=0.0 if FP8 else 0)
        if UNSIGNED:
            rows = (rows ^ 128).to(tl.int8, bitcast=True)  # beyond the end -128 times a weight of 0
        w = tl.load(data_at + start, mask=(n < N)[None, :] & inside[:, None], other=0.0 if FP8 else 0)
        total = _dot(rows, w, total, BK, FP8)
    step = tl.load(steps + m, mask=m < M, other=0.0)
    out = _rescaled(total, step[:, None], scale, bias, n[None, :], N, HAS_BIAS)
    if GELU:
        out = erf_gelu(out)
    here = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    if HAS_RESIDUAL:
        out += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=here)


def _quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (M, K), int8, e4m3 or, as uint8, int8 and 128 more, and scales (M,) of x (M, K)."""
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    steps = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        launch = launch_for("quant_linear_w8a8", "quantise", LAUNCHES, x, x.shape[1], dtype)
        _quantise[(len(x),)](
            x, codes, steps, x.shape[1], x.stride(0), UNSIGNED=dtype == torch.uint8, FP8=dtype == FLOAT8,
            **launch.blocks, num_warps=launch.num_warps,
        )  # fmt: skip
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
    """Into y (M, N), of codes (M, K) of any kind."""
    count, num_outputs = y.shape
    tiles = triton.cdiv(count, 128) * triton.cdiv(num_outputs, 128)
    launch = launch_for("quant_linear_w8a8", "many" if tiles >= FULL else "some", LAUNCHES, y, *data.shape, codes.dtype)
    _product[(triton.cdiv(count, launch.blocks["BM"]), triton.cdiv(num_outputs, launch.blocks["BN"]))](
        *(codes, steps, data, scale, scale if bias is None else bias.contiguous(), y if residual is None else residual),
        *(y, count, num_outputs, data.shape[1]),
        UNSIGNED=codes.dtype == torch.uint8, HAS_BIAS=bias is not None, GELU=gelu, HAS_RESIDUAL=residual is not None,
        FP8=codes.dtype == FLOAT8, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def dynamic(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, panels: Tensor | None, offset: Tensor | None
) -> Tensor:
    rows, num_outputs = rows_of(x), len(data)
    y = x.new_empty(*x.shape[:-1], num_outputs)
    if not y.numel():
        return y
    if len(rows) > FEW:
        _multiply(*_quantised(rows, data.dtype), data, scale, bias, None, False, y.view(-1, num_outputs))
        return y
    launch = launch_for("quant_linear_w8a8", "few", LAUNCHES, x, *data.shape, data.dtype)
    _few[(triton.cdiv(len(rows), launch.blocks["BM"]), triton.cdiv(num_outputs, launch.blocks["BN"]))](
        *(rows, data, scale, scale if bias is None else bias.contiguous(), y),
        *(len(rows), num_outputs, data.shape[1], rows.stride(0)),
        HAS_BIAS=bias is not None, FP8=data.dtype == FLOAT8, **launch.blocks,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return y


def fp8(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return dynamic(x, data, scale, bias, None, None)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, steps = _quantised(rows_of(x), torch.uint8)
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
    """Every launch in bfloat16: int8 with bias alone, unsigned codes with all epilogues, and, from sm_90 on, fp8."""
    sizes = {"M": "i32", "N": "i32", "K": "i32"}
    ends = ("x", "codes", "data", "scale", "bias", "residual", "y", "K", "XS")
    for (kind, launches), form in itertools.product(LAUNCHES.items(), ("int8", "rows", "fp8")):
        if (kind, form) == ("few", "rows"):
            continue
        fp8, unsigned, t = form == "fp8", form == "rows", {"int8": "*i8", "rows": "*u8", "fp8": "*fp8e4nv"}[form]
        head = {"data": t if fp8 else "*i8", "scale": "*fp32", "bias": "*bf16"}
        if kind == "quantise":
            kernel, constants = _quantise, {"UNSIGNED": unsigned}
            signature = {"x": "*bf16", "codes": t, "steps": "*fp32", "K": "i32", "XS": "i32"}
        elif kind == "few":
            kernel, constants = _few, {"HAS_BIAS": True}
            signature = {"x": "*bf16", **head, "y": "*bf16", **sizes, "XS": "i32"}
        else:
            kernel = _product
            constants = {"UNSIGNED": unsigned, "HAS_BIAS": True, "GELU": unsigned, "HAS_RESIDUAL": unsigned}
            signature = {"codes": t, "steps": "*fp32", **head, "residual": "*bf16", "y": "*bf16", **sizes}
        end = tuple(e for e in ends if e in signature)
        for i, launch in enumerate(launches):
            name = f"{kind}-{form}-{'x'.join(map(str, launch.blocks.values()))}"
            known = {**constants, "FP8": fp8, **launch.blocks}
            archs = ("sm_90",) if fp8 else ("sm_80", "sm_90")
            op = "quant_linear_fp8" if fp8 else "quant_linear_w8a8"
            yield Case(op, name, kernel, signature, known, launch, i == 0, end, archs)
