"""Pieces that several operations' Triton kernels share."""

import os

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) accumulated in float32. The interpreter multiplies bfloat16's bits, hence the casts there."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def keep_mask(seed, offset, p):
    """Whether the elements at `offset` (row-major, a tensor) are kept: the bits of miss.kernels.dropout.keep_mask.

    p is rounded to 1/65536 in float32 here, so a p within 1e-7 of half a step may round to the other neighbour.
    """
    index = offset.to(tl.uint64)
    z = tl.cast(seed, tl.uint64) + (index // 4 + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    field = ((z >> ((index % 4) * 16)) & 0xFFFF).to(tl.int32)
    steps = tl.minimum(tl.cast(p * 65536.0 + 0.5, tl.int32), 65535)
    return (field ^ 0x8000) >= steps  # a signed 16-bit field >= steps - 32768


@triton.jit
def erf_gelu(x):
    """x * Phi(x) with the exact erf; x in float32."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def erf_gelu_grad(x):
    """d erf_gelu / dx = Phi(x) + x * phi(x); x in float32."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def tile_corner(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of program_id(0)'s tile of an (M, N) product.

    Programs go GROUP tiles down before one across, so that those running at a time share what L2 holds of both factors.
    """
    across = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * across)
    within = tl.program_id(0) % (GROUP * across)
    down = tl.minimum(tl.cdiv(M, BM) - group * GROUP, GROUP)
    return (group * GROUP + within % down) * BM, within // down * BN


@triton.jit
def linear_tile(
    x, w, M, N, K, x_stride, w_stride,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Float32 (BM, BN) of x (M, K) @ w (N, K).T, with its first row's and column's number, for program_id(0).

    Rows beyond M and columns beyond N compute the last one again, which spares the masks of their loads. EVEN: K is a
    multiple of BK.
    """
    top, left = tile_corner(M, N, BM, BN, GROUP)
    k = tl.arange(0, BK)
    row = tl.minimum(top + tl.arange(0, BM), M - 1)
    column = tl.minimum(left + tl.arange(0, BN), N - 1)
    x_at = x + row[:, None].to(tl.int64) * x_stride + k[None, :]
    w_at = w + column[None, :].to(tl.int64) * w_stride + k[:, None]
    z = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            z = dot(tl.load(x_at), tl.load(w_at), z)
        else:
            inside = start + k < K
            a = tl.load(x_at, mask=inside[None, :], other=0.0)
            z = dot(a, tl.load(w_at, mask=inside[:, None], other=0.0), z)
        x_at += BK
        w_at += BK
    return z, top, left


@triton.jit
def sum_parts(partial, first, second, P, C, OUTPUTS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """Float32 partial (P, OUTPUTS, C) over P in a fixed order: first by programs (…, 0), second by (…, 1)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    which = tl.program_id(1)
    total = tl.zeros((BP, BC), tl.float32)
    for start in range(0, P, BP):
        part = start + tl.arange(0, BP)
        at = partial + (part[:, None].to(tl.int64) * OUTPUTS + which) * C + c[None, :]
        total += tl.load(at, mask=(part < P)[:, None] & (c < C)[None, :], other=0.0)
    out = first
    if which == 1:
        out = second
    tl.store(out + c, tl.sum(total, 0).to(first.dtype.element_ty), mask=c < C)


def dense_rows(tensor: Tensor) -> Tensor:
    """A tensor (…, C) as (R, C) with dense rows at any distance; copied only where the strides leave no other way."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
