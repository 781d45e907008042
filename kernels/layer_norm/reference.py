"""Layer normalization in plain PyTorch: the definition that the fast ones must match.

Knows the formulas; does not know speed.
"""

import torch
from torch import Tensor

from miss.kernels.dropout import keep_mask
from miss.kernels.quant_linear.packing import quantise_rows
from miss.kernels.registry import accumulator

Stats = tuple[Tensor, Tensor, Tensor]


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Stats:
    acc = accumulator(x.dtype)
    xf = x.to(acc)
    mean = xf.mean(-1)
    centred = xf - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None] * weight.to(acc) + bias.to(acc)
    return y.to(x.dtype).contiguous(), mean, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Stats:
    acc = accumulator(x.dtype)
    dyf = dy.to(acc)
    xhat = (x.to(acc) - mean[..., None]) * rstd[..., None]
    wdy = weight.to(acc) * dyf
    c1 = (xhat * wdy).mean(-1, keepdim=True)
    c2 = wdy.mean(-1, keepdim=True)
    dx = (wdy - xhat * c1 - c2) * rstd[..., None]
    dweight = (dyf * xhat).reshape(-1, x.shape[-1]).sum(0)
    dbias = dyf.reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _scaled_mask(like: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | float:
    """What dropout multiplies with, in the accumulator's dtype."""
    if dropout_p == 0:
        return 1.0
    assert seed is not None
    kept = keep_mask(seed, like.shape, dropout_p, like.device)
    return kept.to(accumulator(like.dtype)) / (1 - dropout_p)


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    # The norm reads the sum as it is stored, so that backward, which only has the stored one, differentiates the same.
    summed = (residual.to(acc) + x.to(acc) * _scaled_mask(x, dropout_p, seed)).to(x.dtype).contiguous()
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
    acc = accumulator(summed.dtype)
    dx, dweight, dbias = backward(dy.to(acc), summed.to(acc), weight.to(acc), mean, rstd)
    total = dx + dsummed.to(acc)
    dx = (total * _scaled_mask(summed, dropout_p, seed)).to(summed.dtype, copy=True)
    return dx, total.to(summed.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def quantised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    return quantise_rows(forward(x.to(acc), weight, bias, eps)[0])


def add_quantised(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    summed = (residual.to(acc) + x.to(acc)).to(x.dtype).contiguous()
    y, _, _ = forward(summed.to(acc), weight, bias, eps)
    return *quantise_rows(y), y.to(x.dtype, copy=True) if keep_y else x.new_empty(0), summed
