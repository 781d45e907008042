"""Layer normalization by PyTorch's own kernel.

Knows PyTorch's rules about mixed dtypes; does not know other implementations.
"""

import torch
from torch import Tensor

from miss.kernels.dropout import dropout
from miss.kernels.quant_linear.packing import quantise_rows
from miss.kernels.registry import accumulator


def _parameter_dtype(x: Tensor) -> torch.dtype:
    """The CPU's kernel keeps statistics in the parameters' dtype: float32 ones keep them exact under bfloat16 inputs.
    CUDA's wants parameters in the input's dtype and keeps float32 statistics by itself."""
    return accumulator(x.dtype) if x.device.type == "cpu" else x.dtype


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _parameter_dtype(x)
    y, mean, rstd = torch.native_layer_norm(x.contiguous(), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w = weight.to(_parameter_dtype(x))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(), x.contiguous(), x.shape[-1:], mean[..., None], rstd[..., None], w, w, [True, True, True]
    )
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = residual.contiguous() + dropout(x, dropout_p, seed)
    y, mean, rstd = forward(summed, weight, bias, eps)
    return y, summed, mean, rstd


def add_backward(
    dy: Tensor,
    dsummed: Tensor,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias = backward(dy, summed, weight, mean, rstd)
    total = dx.add_(dsummed)
    return (dropout(total, dropout_p, seed) if dropout_p else total.clone()), total, dweight, dbias


def quantised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return quantise_rows(forward(x, weight, bias, eps)[0])


def add_quantised(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = residual.contiguous() + x
    y, _, _ = forward(summed, weight, bias, eps)
    return *quantise_rows(y), y if keep_y else x.new_empty(0), summed
