"""Layer normalization by csrc/cpu/norm.inl.h.

Knows which function of the extension computes what; does not know how.
"""

from torch import Tensor

from miss.kernels import extension

_ops = extension.ops()


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.layer_norm(x, weight, bias, eps)


def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _ops.layer_norm_backward(dy, x, weight, mean, rstd)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _ops.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed)


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
    dx, dresidual, dweight, dbias = _ops.add_layer_norm_backward(
        dy, dsummed, summed, weight, mean, rstd, dropout_p, seed
    )
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(weight.dtype)


def quantised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _ops.layer_norm_quantised(x, weight, bias, eps)


def add_quantised(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _ops.add_layer_norm_quantised(x, residual, weight, bias, eps, keep_y)
