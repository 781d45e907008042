"""Linear, bias and exact GELU in plain PyTorch: the definition that the fast ones must match.

Knows the formulas; does not know speed.
"""

import math

import torch
from torch import Tensor

from miss.kernels.registry import accumulator


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, panels: Tensor | None) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    pre = x.to(acc) @ weight.to(acc).T
    if bias is not None:
        pre = pre + bias.to(acc)
    y = 0.5 * pre * (1 + torch.erf(pre / math.sqrt(2)))
    return y.to(x.dtype), pre.to(x.dtype, copy=True) if keep else x.new_empty(0)


def backward(dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    z = pre.to(acc)
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    dz = dy.to(acc) * (cdf + z * density)
    rows = dz.reshape(-1, dz.shape[-1])
    dx = dz @ weight.to(acc)
    dweight = rows.T @ x.to(acc).reshape(-1, x.shape[-1])
    return dx.to(x.dtype), dweight.to(weight.dtype), rows.sum(0).to(x.dtype)
