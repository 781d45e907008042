"""Weight-only products and embedding rows in Triton: packed weights become floats in registers, never in memory.

    y^T = W x^T + bias      W (BN, BK) is the first operand of each product: its rows fill the tensor cores' 16 or 64
                            rows even where x has one row, and Hopper's wgmma may take it from registers

int8: codes are exact in every float type, so the scale is applied to the sum. int4: (code - zero) * scale in float32,
rounded to x's dtype; a step of the sum is one group's bytes, whose low and high nibbles are two runs of columns, hence
two products and nothing to interleave. Up to FEW rows `_few` runs: K is cut into slices that lie side by side in one
program (a batched product, a slice a warp) and are added at the end, so that 16 rows of W make a program of 4 warps:
48 programs at N = 768, one launch, no partial sums in memory. More rows run `_many`, a plain tiled product. Sums are
float32. W is read once a BM rows of x (from L2 after the first), x once a BN rows of W.

FLOPs 2 M N K; bytes N K (int8) or N K / 2 (int4) and its scales, 2 M (K + N). Knows tiles; does not know how the bytes
were chosen, or W8A8 (`triton_w8a8_impl`) and gradients (`triton_backward_impl`).

Shapes: M rows of x, K inputs, N outputs, G groups of 2 HALF columns (HALF = 0 for int8), XS elements between rows of x.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import INTERPRETED, dot

FEW = 64  # rows up to which tiles of 64 rows would leave most of a GPU idle (12 of 132 programs at N = 768)
LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "few-int8": (
        Launch({"SLICES": 4, "BM": 16, "BN": 16, "BK": 64}, 4, 4),
        Launch({"SLICES": 4, "BM": 16, "BN": 16, "BK": 128}, 4, 3),
    ),
    "few-int4": (
        Launch({"SLICES": 4, "BM": 16, "BN": 16}, 4, 4),
        Launch({"SLICES": 8, "BM": 16, "BN": 16}, 8, 3),
    ),
    "many-int8": (
        Launch({"BM": 64, "BN": 64, "BK": 64}, 4, 3),
        Launch({"BM": 128, "BN": 128, "BK": 64}, 8, 3),
    ),
    "many-int4": (
        Launch({"BM": 64, "BN": 64}, 4, 3),
        Launch({"BM": 128, "BN": 128}, 8, 3),
    ),
    "float32-int8": (Launch({"BM": 16, "BN": 32, "BK": 32}, 4, 2),),
    "float32-int4": (Launch({"BM": 16, "BN": 32}, 4, 2),),
    "embedding": (Launch({"BLOCK": 512}, 4, 1),),
}


@triton.jit
def as_float(codes, dtype: tl.constexpr):
    """int8 codes, exact in `dtype`. The interpreter cannot turn whole numbers into bfloat16 but by float32."""
    if INTERPRETED:
        return codes.to(tl.float32).to(dtype)
    return codes.to(dtype)


@triton.jit
def nibbles(pairs, scale, zero, dtype: tl.constexpr):
    """The numbers (low nibbles, high nibbles) of bytes; scale and zero of a shape that broadcasts to theirs."""
    low = as_float((pairs & 15).to(tl.int8) - zero, dtype).to(tl.float32)  # exact, and no int to float32 unit
    high = as_float((pairs >> 4).to(tl.int8) - zero, dtype).to(tl.float32)
    return (low * scale).to(dtype), (high * scale).to(dtype)


@triton.jit
def group_parts(scale, zero, at, mask, HAS_ZERO: tl.constexpr):
    """A group's scale in float32 and its zero in int8, at the offsets `at`."""
    s = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ZERO:
        z = tl.load(zero + at, mask=mask, other=0).to(tl.int8)
    else:
        z = tl.full(at.shape, 8, tl.int8)
    return s, z


@triton.jit
def _finish(acc, scale, bias, y, m, n, M, N, HALF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scale (int8's), bias and store of acc (BN, BM)."""
    if HALF == 0:
        acc *= tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = y + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _few(
    x, data, scale, zero, bias, y, M, N, K, XS, G, HALF: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    s = tl.arange(0, SLICES)
    k = tl.arange(0, BK)
    live_m = (m < M)[None, None, :]
    live_n = (n < N)[None, :]
    x_at = x + m[None, None, :].to(tl.int64) * XS
    n_at = n[None, :].to(tl.int64)
    acc = tl.zeros((SLICES, BN, BM), tl.float32)
    if HALF == 0:
        column = s[:, None] * BK + k[None, :]
        for start in range(0, K, SLICES * BK):
            at = start + column
            codes = tl.load(
                data + n_at[:, :, None] * K + at[:, None, :],
                mask=live_n[:, :, None] & (at < K)[:, None, :],
                other=0,
            )
            rows = tl.load(x_at + at[:, :, None], mask=live_m & (at < K)[:, :, None], other=0.0)
            acc = dot(as_float(codes, x.dtype.element_ty), rows, acc)
    else:
        for first in range(0, G, SLICES):
            group = first + s
            live = live_n & (group < G)[:, None]
            part = n_at * G + group[:, None]
            step, zeros = group_parts(scale, zero, part, live, HAS_ZERO)
            pairs = tl.load(data + part[:, :, None] * HALF + k[None, None, :], mask=live[:, :, None], other=0)
            low, high = nibbles(pairs, step[:, :, None], zeros[:, :, None], x.dtype.element_ty)
            at = group[:, None] * (2 * HALF) + k[None, :]
            rows = tl.load(x_at + at[:, :, None], mask=live_m & (at < K)[:, :, None], other=0.0)
            acc = dot(low, rows, acc)
            at += HALF
            rows = tl.load(x_at + at[:, :, None], mask=live_m & (at < K)[:, :, None], other=0.0)
            acc = dot(high, rows, acc)
    _finish(tl.sum(acc, 0), scale, bias, y, m, n, M, N, HALF, HAS_BIAS)


@triton.jit
def _many(
    x, data, scale, zero, bias, y, M, N, K, XS, G, HALF: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live_m = (m < M)[None, :]
    live_n = n < N
    x_at = x + m[None, :].to(tl.int64) * XS + k[:, None]
    n_at = n.to(tl.int64)
    acc = tl.zeros((BN, BM), tl.float32)
    if HALF == 0:
        data_at = data + n_at[:, None] * K + k[None, :]
        for start in range(0, K, BK):
            inside = start + k < K
            codes = tl.load(data_at + start, mask=live_n[:, None] & inside[None, :], other=0)
            rows = tl.load(x_at + start, mask=live_m & inside[:, None], other=0.0)
            acc = dot(as_float(codes, x.dtype.element_ty), rows, acc)
    else:
        data_at = data + n_at[:, None] * G * HALF + k[None, :]
        for group in range(0, G):
            step, zeros = group_parts(scale, zero, n_at * G + group, live_n, HAS_ZERO)
            pairs = tl.load(data_at + group * HALF, mask=live_n[:, None], other=0)
            low, high = nibbles(pairs, step[:, None], zeros[:, None], x.dtype.element_ty)
            start = group * 2 * HALF
            rows = tl.load(x_at + start, mask=live_m & (start + k < K)[:, None], other=0.0)
            acc = dot(low, rows, acc)
            start += HALF
            rows = tl.load(x_at + start, mask=live_m & (start + k < K)[:, None], other=0.0)
            acc = dot(high, rows, acc)
    _finish(acc, scale, bias, y, m, n, M, N, HALF, HAS_BIAS)


@triton.jit
def _embedding(
    scale, data, zero, ids, y, V, K, G, HALF: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes BLOCK numbers (int8) or the numbers of BLOCK bytes of one row; NaN where the table has none."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(ids + row).to(tl.int64)
    word = tl.where(word < 0, word + V, word)
    unknown = tl.where((word < 0) | (word >= V), float("nan"), 1.0)
    word = tl.minimum(tl.maximum(word, 0), V - 1)
    to = y + row * K
    if HALF == 0:
        codes = tl.load(data + word * K + j, mask=j < K, other=0)
        w = codes.to(tl.float32) * (tl.load(scale + word) * unknown)
        tl.store(to + j, w.to(y.dtype.element_ty), mask=j < K)
    else:
        group = j // HALF
        step, zeros = group_parts(scale, zero, word * G + group, group < G, HAS_ZERO)
        pairs = tl.load(data + word * G * HALF + j, mask=group < G, other=0)
        low, high = nibbles(pairs, step * unknown, zeros, y.dtype.element_ty)
        column = j + group * HALF
        tl.store(to + column, low, mask=column < K)
        tl.store(to + column + HALF, high, mask=column + HALF < K)


def rows_of(x: Tensor) -> Tensor:
    """x as (M, K), its columns side by side; rows may lie apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def launch_for(
    op: str, kind: str, table: dict[str, tuple[Launch, ...]], like: Tensor, *own: int | torch.dtype
) -> Launch:
    return choose(op, kind, {name: launches[0] for name, launches in table.items()}, like, *own)


def _blocks(launch: Launch, half: int) -> dict[str, int]:
    return {**launch.blocks, "BK": half} if half else dict(launch.blocks)


def forward(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    columns: int,
    group: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    rows, num_outputs = rows_of(x), len(data)
    y = x.new_empty(*x.shape[:-1], num_outputs)
    if not y.numel():
        return y
    few = len(rows) <= FEW
    form = "float32" if x.dtype == torch.float32 else "few" if few else "many"
    launch = launch_for("quant_linear", f"{form}-int{4 if group else 8}", LAUNCHES, x, num_outputs, columns)
    grid = (triton.cdiv(len(rows), launch.blocks["BM"]), triton.cdiv(num_outputs, launch.blocks["BN"]))
    kernel = _few if form == "few" else _many
    kernel[grid](
        *(rows, data, scale, data if zero is None else zero, scale if bias is None else bias.contiguous(), y),
        *(len(rows), num_outputs, columns, rows.stride(0), -(-columns // group) if group else 0),
        HALF=group // 2, HAS_ZERO=zero is not None, HAS_BIAS=bias is not None, **_blocks(launch, group // 2),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return y


def embedding(
    scale: Tensor, data: Tensor, zero: Tensor | None, ids: Tensor, columns: int, group: int, dtype: torch.dtype
) -> Tensor:
    y = scale.new_empty(*ids.shape, columns, dtype=dtype)
    if not y.numel():
        return y
    launch = launch_for("quant_embedding", "embedding", LAUNCHES, scale, columns, dtype)
    grid = (ids.numel(), triton.cdiv(data.shape[1], launch.blocks["BLOCK"]))
    _embedding[grid](
        *(scale, data, data if zero is None else zero, ids.contiguous(), y, len(data), columns),
        *(-(-columns // group) if group else 0,),
        HALF=group // 2, HAS_ZERO=zero is not None, **launch.blocks, num_warps=launch.num_warps,
    )  # fmt: skip
    return y


PACKED = {8: {"data": "*i8", "scale": "*fp32"}, 4: {"data": "*u8", "scale": "*fp16"}}


def cases() -> Iterator[Case]:
    """Every launch in bfloat16 with groups of 64 and zero points (the defaults also of 32 and 128); float32's own."""
    sizes = {"M": "i32", "N": "i32", "K": "i32", "XS": "i32", "G": "i32"}
    ends = ("x", "data", "scale", "zero", "bias", "y", "K", "XS")
    for kind, launches in LAUNCHES.items():
        if kind == "embedding":
            continue
        form, bits = kind.split("-int")
        t = "*fp32" if form == "float32" else "*bf16"
        signature = {"x": t, **PACKED[int(bits)], "zero": PACKED[int(bits)]["data"], "bias": t, "y": t, **sizes}
        for i, launch in enumerate(launches):
            groups = (0,) if bits == "8" else (64, 32, 128) if i == 0 and form != "float32" else (64,)
            for group in groups:
                constants = {"HALF": group // 2, "HAS_ZERO": group > 0, "HAS_BIAS": True, **_blocks(launch, group // 2)}
                name = f"{kind}{f'-group{group}' if group else ''}-{'x'.join(map(str, launch.blocks.values()))}"
                kernel = _few if form == "few" else _many
                yield Case("quant_linear", name, kernel, signature, constants, launch, i == 0, ends)
    for width, group in ((8, 0), (4, 64)):
        parts, launch = PACKED[width], LAUNCHES["embedding"][0]
        signature = {"scale": parts["scale"], "data": parts["data"], "zero": parts["data"], "ids": "*i64"}
        signature |= {"y": "*bf16", "V": "i32", "K": "i32", "G": "i32"}
        constants = {"HALF": group // 2, "HAS_ZERO": group > 0, **launch.blocks}
        known = ("scale", "data", "zero", "ids", "y", "K")
        yield Case("quant_embedding", f"int{width}", _embedding, signature, constants, launch, True, known)
