"""A linear layer in plain PyTorch: the definition that the fast ones must match.

Knows the formulas; does not know speed.
"""

from torch import Tensor

from miss.kernels.registry import accumulator


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, panels: Tensor | None) -> Tensor:
    acc = accumulator(x.dtype)
    y = x.to(acc) @ weight.to(acc).T
    for term in (bias, residual):
        y = y if term is None else y + term.to(acc)
    return y.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    rows = dy.to(acc).reshape(-1, dy.shape[-1])
    dx = (rows @ weight.to(acc)).to(x.dtype).view(x.shape) if need_x else x.new_empty(0)
    dweight = (rows.T @ x.to(acc).reshape(-1, x.shape[-1])).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dx, dweight, rows.sum(0).to(x.dtype) if need_bias else x.new_empty(0)
