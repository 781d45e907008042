"""Layer normalization whose result is written as int8 codes for the next int8 product.

Knows its formula and who computes it; does not know that product. For inference: there is no gradient.

    layer_norm_quantised:      QuantRows of layer_norm(x)
    add_layer_norm_quantised:  summed = residual + x;  QuantRows of y = layer_norm(summed), and y where it is kept

x, residual, y, summed (…, C) in x's dtype; codes uint8 (…, C), scale float32 (…): `quant_linear.packing.QuantRows`. The
codes are those of y in float32, before it is rounded to x's dtype (the `torch` row has only the rounded y). A row with
NaN or infinity has the scale NaN and codes 128.
"""

import torch
from torch import Tensor

from miss.kernels.layer_norm import reference, torch_impl
from miss.kernels.layer_norm.op import add_limits, check, cpu, limits, triton_add_limits, triton_limits
from miss.kernels.quant_linear.packing import QuantRows
from miss.kernels.registry import ALL_FLOATS, Impl, Op, triton

QUANTISED = Op(
    "layer_norm_quantised",
    cpu("quantised", limits),
    triton("layer_norm.triton_impl", "quantised", triton_limits),
    Impl("torch", torch_impl.quantised, dtypes=ALL_FLOATS),
    Impl("reference", reference.quantised, dtypes=ALL_FLOATS),
)
ADD_QUANTISED = Op(
    "add_layer_norm_quantised",
    cpu("add_quantised", add_limits),
    triton("layer_norm.triton_impl", "add_quantised", triton_add_limits),
    Impl("torch", torch_impl.add_quantised, dtypes=ALL_FLOATS),
    Impl("reference", reference.add_quantised, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::layer_norm_quantised", mutates_args=())
def _quantised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return QUANTISED(x, weight, bias, eps)


@_quantised.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("miss::add_layer_norm_quantised", mutates_args=())
def _add_quantised(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ADD_QUANTISED(x, residual, weight, bias, eps, keep_y)


@_add_quantised.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return codes, scale, x.new_empty(x.shape if keep_y else 0), x.new_empty(x.shape)


def layer_norm_quantised(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> QuantRows:
    """The rows of layer_norm(x) (…, C) as codes and scales.

    Raises:
        ValueError: weight or bias is not (C,).
    """
    check(x, weight, bias)
    return QuantRows(*QUANTISED.call(_quantised, x, weight, bias, eps))


def add_layer_norm_quantised(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, keep_y: bool = False
) -> tuple[QuantRows, Tensor | None, Tensor]:
    """(rows, y, summed): summed = residual + x, y = layer_norm(summed) (None unless `keep_y`), rows its codes.

    Raises:
        ValueError: residual is not of x's shape, weight or bias is not (C,).
    """
    check(x, weight, bias, residual)
    codes, scale, y, summed = ADD_QUANTISED.call(_add_quantised, x, residual, weight, bias, eps, keep_y)
    return QuantRows(codes, scale), y if keep_y else None, summed
