"""Layer normalization over the last dimension, alone or after residual and dropout.

Knows its formula, its gradient and who computes it; does not know which layer asks.

    layer_norm:      y = (x - mean) * rstd * weight + bias                       x, y (…, C)   weight, bias (C,)
    add_layer_norm:  summed = residual + dropout(x);  y = layer_norm(summed)     x, residual, y, summed (…, C)

mean and rstd = 1 / sqrt(variance + eps) are taken over C with the biased variance, in float32 (float64 in float64).
y has x's dtype; weight and bias may be of another. Under autocast it computes in, and returns, float32.

Gradient, with xhat = (x - mean) * rstd and g = dy * weight, means over C, sums over all rows:
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat));  dweight = sum(dy * xhat);  dbias = sum(dy)
    add_layer_norm: dresidual = dx + dsummed;  the x of dropout receives dresidual * mask / (1 - p)

Source: arXiv 1607.06450. The mask is that of `miss.kernels.dropout`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.dropout import Seed, as_seed
from miss.kernels.layer_norm import reference, torch_impl
from miss.kernels.registry import ALL_FLOATS, FLOATS, Impl, Op, accumulator, autocast_to, lazy, triton

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})
TRITON_WIDTH = 4096  # columns: a row stays in a program's registers


def limits(x: Tensor, weight: Tensor, bias: Tensor, *_: object) -> str | None:
    """What csrc/cpu/norm.inl.h does not take; None where it does."""
    if weight.dtype not in CPU_DTYPES or bias.dtype not in CPU_DTYPES:
        return "takes float32 and bfloat16 parameters"
    if not (weight.is_contiguous() and bias.is_contiguous()):
        return "takes contiguous parameters"
    return None if weight.numel() else "needs at least one column"


def add_limits(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *_: object) -> str | None:
    return limits(x, weight, bias) if residual.dtype == x.dtype else "takes a residual of x's dtype"


def _backward_limits(dy: Tensor, x: Tensor, weight: Tensor, *_: object) -> str | None:
    return limits(x, weight, weight) if dy.dtype == x.dtype else "takes gradients of x's dtype"


def _add_backward_limits(dy: Tensor, dsummed: Tensor, summed: Tensor, weight: Tensor, *_: object) -> str | None:
    return _backward_limits(dy, summed, weight) or _backward_limits(dsummed, summed, weight)


def triton_limits(x: Tensor, weight: Tensor, bias: Tensor, *_: object) -> str | None:
    """What triton_impl.py does not take; None where it does."""
    if weight.dtype not in FLOATS or bias.dtype not in FLOATS:
        return "takes float32, float16 and bfloat16 parameters"
    return None if 1 <= x.shape[-1] <= TRITON_WIDTH else f"takes 1 to {TRITON_WIDTH} columns"


def triton_add_limits(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *_: object) -> str | None:
    return triton_limits(x, weight, bias) if residual.dtype == x.dtype else "takes a residual of x's dtype"


def _triton_backward_limits(dy: Tensor, x: Tensor, weight: Tensor, *_: object) -> str | None:
    return triton_limits(x, weight, weight) if dy.dtype == x.dtype else "takes gradients of x's dtype"


def _triton_add_backward_limits(dy: Tensor, dsummed: Tensor, summed: Tensor, weight: Tensor, *_: object) -> str | None:
    return _triton_backward_limits(dy, summed, weight) or _triton_backward_limits(dsummed, summed, weight)


def cpu(function: str, limits: Callable[..., str | None]) -> Impl:
    """The `cpu` row of one of this folder's tables."""
    run = lazy("layer_norm.cpu_impl", function)
    return Impl("cpu", run, device="cpu", dtypes=CPU_DTYPES, needs=extension.missing, limits=limits)


FORWARD = Op(
    "layer_norm",
    cpu("forward", limits),
    triton("layer_norm.triton_impl", "forward", triton_limits),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "layer_norm_backward",
    cpu("backward", _backward_limits),
    triton("layer_norm.triton_impl", "backward", _triton_backward_limits),
    Impl("torch", torch_impl.backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.backward, dtypes=ALL_FLOATS),
)
ADD_FORWARD = Op(
    "add_layer_norm",
    cpu("add_forward", add_limits),
    triton("layer_norm.triton_impl", "add_forward", triton_add_limits),
    Impl("torch", torch_impl.add_forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.add_forward, dtypes=ALL_FLOATS),
)
ADD_BACKWARD = Op(
    "add_layer_norm_backward",
    cpu("add_backward", _add_backward_limits),
    triton("layer_norm.triton_impl", "add_backward", _triton_add_backward_limits),
    Impl("torch", torch_impl.add_backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.add_backward, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::layer_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return FORWARD(x, weight, bias, eps)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stat = x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))
    return x.new_empty(x.shape), stat, torch.empty_like(stat)


@torch.library.custom_op("miss::layer_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(dy, x, weight, mean, rstd)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)


def _grad(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dy.contiguous(), *ctx.saved_tensors), None


_forward.register_autograd(_grad, setup_context=_save)


@torch.library.custom_op("miss::add_layer_norm", mutates_args=())
def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ADD_FORWARD(x, residual, weight, bias, eps, dropout_p, seed)


@_add_forward.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    stat = x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))
    return y, torch.empty_like(y), stat, torch.empty_like(stat)


@torch.library.custom_op("miss::add_layer_norm_backward", mutates_args=())
def _add_backward(
    dy: Tensor,
    dsummed: Tensor,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ADD_BACKWARD(dy, dsummed, summed, weight, mean, rstd, dropout_p, seed)


@_add_backward.register_fake
def _(
    dy: Tensor,
    dsummed: Tensor,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = summed.new_empty(summed.shape)
    return dx, torch.empty_like(dx), torch.empty_like(weight), torch.empty_like(weight)


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, _, ctx.dropout_p, seed = inputs
    _, summed, mean, rstd = output
    ctx.save_for_backward(summed, weight, mean, rstd, seed)


def _add_grad(ctx: Any, dy: Tensor, dsummed: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    summed, weight, mean, rstd, seed = ctx.saved_tensors
    grads = _add_backward(dy.contiguous(), dsummed.contiguous(), summed, weight, mean, rstd, ctx.dropout_p, seed)
    return *grads, None, None, None


_add_forward.register_autograd(_add_grad, setup_context=_add_save)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """y (…, C) of x (…, C), weight (C,), bias (C,).

    Raises:
        ValueError: weight or bias is not (C,).
    """
    check(x, weight, bias)
    x, weight, bias = autocast_to(x, weight, bias, dtype=torch.float32)
    return FORWARD.call(_forward, x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Seed = None,
) -> tuple[Tensor, Tensor]:
    """(y, summed), both (…, C): summed = residual + dropout(x), y its normalization.

    `seed` (an int, or an int64 0-dim tensor) alone decides what is dropped; without one, and with dropout_p > 0, it is
    drawn from PyTorch's default generator.

    Raises:
        ValueError: residual is not of x's shape, weight or bias is not (C,), dropout_p is not in [0, 1).
    """
    check(x, weight, bias, residual)
    x, residual, weight, bias = autocast_to(x, residual, weight, bias, dtype=torch.float32)
    args = (x, residual, weight, bias, eps, dropout_p, as_seed(seed, dropout_p))
    y, summed, _, _ = ADD_FORWARD.call(_add_forward, *args)
    return y, summed


def check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> None:
    """Raises ValueError where shapes do not fit each other."""
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"layer norm over the last of {tuple(x.shape)}: weight is {tuple(weight.shape)}, bias {tuple(bias.shape)}; "
            f"wanted ({x.shape[-1]},) for both"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"add_layer_norm: residual is {tuple(residual.shape)}; wanted x's shape, {tuple(x.shape)}")
