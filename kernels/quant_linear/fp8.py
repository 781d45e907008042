"""Products with float8 (e4m3) weights and activations.

Knows the product, its gradient in x and who computes it; does not know how weights are packed (`packing.py`).

    s = max|x row| / 448;  q = e4m3(x / s);  y = (q @ data.T) * s * scale + bias

x (…, K), y (…, N) in x's dtype; data float8_e4m3fn (N, K), scale float32 (N,), bias (N,) or None. Sums are float32
(float64 in float64). A row that holds NaN or infinity is NaN. Gradient: dx = dy @ W, straight through the rounding of
x, and dbias = sum(dy); W has none.

Source: arXiv 2209.05433 (FP8 formats).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.quant_linear import limits
from miss.kernels.quant_linear.packing import PackedWeight, dequantise, quantise_rows_fp8
from miss.kernels.quant_linear.reference import rescale
from miss.kernels.registry import ALL_FLOATS, Impl, Op, accumulator, triton


def _total(codes: Tensor, data: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, N) sums in `dtype`. GPUs from 8.9 on multiply float8 where sizes divide by 16; elsewhere it is unpacked."""
    fits = data.shape[0] % 16 == 0 and data.shape[1] % 16 == 0 and 0 not in (*codes.shape, *data.shape)
    if codes.is_cuda and fits and dtype == torch.float32 and torch.cuda.get_device_capability(codes.device) >= (8, 9):
        return scaled_product(codes, data)
    return F.linear(codes.to(dtype), data.to(dtype))


def scaled_product(codes: Tensor, data: Tensor) -> Tensor:
    """By PyTorch's float8 product, its own scales left at 1."""
    one = torch.ones((), device=codes.device)
    total: Tensor = torch._scaled_mm(codes, data.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return total


def _torch(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    codes, steps = quantise_rows_fp8(x.reshape(-1, x.shape[-1]))
    y = rescale(_total(codes, data, accumulator(x.dtype)), steps[:, None], scale, bias, x.dtype)
    return y.view(*x.shape[:-1], len(data))


def reference(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    codes, steps = quantise_rows_fp8(x.reshape(-1, x.shape[-1]))
    total = codes.double() @ data.double().T
    y = rescale(total, steps[:, None].to(accumulator(x.dtype)), scale, bias, x.dtype)
    return y.view(*x.shape[:-1], len(data))


FP8_OP = Op(
    "quant_linear_fp8",
    triton("quant_linear.triton_w8a8_impl", "fp8", limits.fp8, capability=(9, 0)),
    Impl("torch", _torch, dtypes=ALL_FLOATS),
    Impl("reference", reference, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::quant_linear_fp8", mutates_args=())
def _fp8(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return FP8_OP(x, data, scale, bias)


@_fp8.register_fake
def _(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, data, scale, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(data, scale)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    data, scale = ctx.saved_tensors
    dx = dy @ dequantise(data, scale, None, data.shape[1], 0, dy.dtype)
    return dx, None, None, None if ctx.bias_dtype is None else dy.reshape(-1, len(data)).sum(0).to(ctx.bias_dtype)


_fp8.register_autograd(_grad, setup_context=_save)


def fp8_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """`quant_linear` over an fp8 weight."""
    return FP8_OP.call(_fp8, x, packed.data, packed.scale, bias)
