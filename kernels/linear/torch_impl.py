"""Linear layers by PyTorch's own kernels.

Knows PyTorch's functions; does not know other implementations.
"""

from torch import Tensor
from torch.nn import functional as F


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, panels: Tensor | None) -> Tensor:
    y = F.linear(x, weight.to(x.dtype), bias)
    return y if residual is None else residual + y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = dy.reshape(-1, dy.shape[-1])
    dx = (rows @ weight.to(rows.dtype)).view(x.shape) if need_x else x.new_empty(0)
    dweight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dx, dweight, rows.sum(0) if need_bias else x.new_empty(0)
