"""Products with weights in bitsandbytes' forms: nf4, and LLM.int8 with its outlier columns.

Knows the products, their gradient in x and who computes them; does not know how weights are packed (`packing.py`).

    nf4:       y = x @ W.T + bias,  W = unpack(packed)
    llm-int8:  columns of x with a number of at least 6 in any row times W as they are, the others rounded to int8 by
               rows of x; what a row gives then depends on what shares its batch, unlike everything else here

x (…, K), y (…, N) in x's dtype; bias (N,) or None. Gradient: dx = dy @ W, dbias = sum(dy); W has none.

Source: arXiv 2305.14314 (nf4), 2208.07339 (LLM.int8).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.quant_linear.packing import (
    NF4_BLOCK,
    OUTLIER,
    PackedWeight,
    dequantise,
    dequantise_nf4,
    quantise_rows,
)
from miss.kernels.registry import ALL_FLOATS, Impl, Op, accumulator, lazy


def _nf4_reference(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    acc = accumulator(x.dtype)
    weight = dequantise_nf4(data, scale, (2 * len(data) // columns, columns), acc)
    y = x.to(acc) @ weight.T
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def _nf4_torch(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    weight = dequantise_nf4(data, scale, (2 * len(data) // columns, columns), x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _llm_int8_reference(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulator(x.dtype)
    xf, rows = x.to(acc), x.reshape(-1, x.shape[-1])
    outlier = (rows.abs() >= OUTLIER).any(0)
    codes = quantise_rows(xf.masked_fill(outlier, 0))
    seen = torch.where(outlier, xf, (codes.codes.to(acc) - 128) * codes.scale.to(acc)[..., None])
    y = seen @ dequantise(data, scale, None, data.shape[1], 0, acc).T
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def _nf4_limits(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, columns: int) -> str | None:
    """bitsandbytes 0.50.2's CPU product is wrong where rows do not end with a block (it takes scales of other
    blocks): a (64, 160) matrix gives errors as large as its outputs."""
    return f"rows of {columns} do not end with a block of {NF4_BLOCK}" if columns % NF4_BLOCK else None


def _llm_int8_limits(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    """It multiplies by torch._int_mm, which is wrong there (`torch_impl.dynamic_limits`)."""
    return "torch._int_mm is wrong for one column on CPU" if x.device.type == "cpu" and data.shape[1] == 1 else None


NF4_OP = Op(
    "quant_linear_nf4",
    Impl("bitsandbytes", lazy("quant_linear.bitsandbytes_impl", "nf4"), requires="bitsandbytes", limits=_nf4_limits),
    Impl("torch", _nf4_torch, dtypes=ALL_FLOATS),
    Impl("reference", _nf4_reference, dtypes=ALL_FLOATS),
)
LLM_INT8_OP = Op(
    "quant_linear_llm_int8",
    Impl(
        "bitsandbytes",
        lazy("quant_linear.bitsandbytes_impl", "llm_int8"),
        requires="bitsandbytes",
        limits=_llm_int8_limits,
    ),
    Impl("torch", _llm_int8_reference, dtypes=ALL_FLOATS),
    Impl("reference", _llm_int8_reference, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::quant_linear_nf4", mutates_args=())
def _nf4(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    return NF4_OP(x, data, scale, bias, columns)


@_nf4.register_fake
def _(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], 2 * data.shape[0] // columns))


@torch.library.custom_op("miss::quant_linear_llm_int8", mutates_args=())
def _llm_int8(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return LLM_INT8_OP(x, data, scale, bias)


@_llm_int8.register_fake
def _(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, data, scale, bias, *columns = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.shape = (output.shape[-1], columns[0] if columns else data.shape[1])
    ctx.save_for_backward(data, scale)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    data, scale = ctx.saved_tensors
    if data.dtype == torch.uint8:
        weight = dequantise_nf4(data, scale, ctx.shape, dy.dtype)
    else:
        weight = dequantise(data, scale, None, ctx.shape[1], 0, dy.dtype)
    dbias = None if ctx.bias_dtype is None else dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (dy @ weight, None, None, dbias, *([None] if data.dtype == torch.uint8 else []))


_nf4.register_autograd(_grad, setup_context=_save)
_llm_int8.register_autograd(_grad, setup_context=_save)


def library_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """`quant_linear` over an nf4 or llm-int8 weight."""
    if packed.scheme == "nf4":
        return NF4_OP.call(_nf4, x, packed.data, packed.scale, bias, packed.shape[1])
    return LLM_INT8_OP.call(_llm_int8, x, packed.data, packed.scale, bias)
