"""Pieces that several operations' Triton kernels share."""

import os

import triton
import triton.language as tl

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
