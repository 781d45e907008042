"""The first half of a transformer's MLP: linear, bias, exact GELU.

Knows its formula, its gradient and who computes it; does not know what follows.

    z = x @ weight.T + bias;  y = z * Phi(z) = z / 2 * (1 + erf(z / sqrt(2)))     x (…, C)  weight (F, C)  bias (F,)

y (…, F) in x's dtype, products accumulated in float32 (float64 in float64). BERT and the ViT use the exact form; the
tanh approximation, the only one that most fused libraries offer, differs by up to 5e-4. Under autocast all but the
weight is in the autocast dtype, and the weight is rounded to it inside, as in `linear`.

Gradient, with phi the normal density: dz = dy * (Phi(z) + z * phi(z)); dx = dz @ weight; dweight = dz.T @ x;
dbias = the sum of dz over rows. z is kept for it, in x's dtype, where a gradient is needed, and is empty elsewhere.

`panels` is what `miss.kernels.linear.prepare(weight)` returned, as for `linear`.

Source: arXiv 1606.08415.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.gelu_mlp import reference, torch_impl
from miss.kernels.linear.op import CPU_DTYPES, check_dtypes, check_shapes, gradient_limits, of_dtype, product_limits
from miss.kernels.registry import ALL_FLOATS, FLOATS, Impl, Op, autocast_to, lazy, triton


def _limits(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, panels: Tensor | None) -> str | None:
    return product_limits(x, weight, bias, panels)


def _triton_limits(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> str | None:
    if weight.dtype not in (x.dtype, torch.float32):
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if bias is not None and bias.dtype not in FLOATS:
        return f"takes a float32, float16 or bfloat16 bias, got {bias.dtype}"
    return None if weight.numel() else "needs at least one column of x and of y"


def _triton_backward_limits(dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor) -> str | None:
    if not dy.dtype == x.dtype == pre.dtype:
        return f"dy is {dy.dtype}, x {x.dtype}, z {pre.dtype}: takes one dtype"
    return _triton_limits(x, weight, None)


FORWARD = Op(
    "gelu_mlp",
    Impl(
        "cpu",
        lazy("gelu_mlp.cpu_impl", "forward"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_limits,
    ),
    triton("gelu_mlp.triton_impl", "forward", _triton_limits),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "gelu_mlp_backward",
    Impl(
        "cpu",
        lazy("gelu_mlp.cpu_impl", "backward"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=gradient_limits,
    ),
    triton("gelu_mlp.triton_impl", "backward", _triton_backward_limits),
    Impl("torch", torch_impl.backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.backward, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::gelu_mlp", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, panels: Tensor | None
) -> tuple[Tensor, Tensor]:
    return FORWARD(x, weight, bias, keep, panels)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, panels: Tensor | None) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@torch.library.custom_op("miss::gelu_mlp_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(dy, x, weight, pre)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *_ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, output[1])


def _grad(ctx: Any, dy: Tensor, _dpre: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = _backward(dy.contiguous(), *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None, None, None


_forward.register_autograd(_grad, setup_context=_save)


def gelu_mlp(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None = None) -> Tensor:
    """gelu(x @ weight.T + bias), exact: x (…, C), weight (F, C), bias (F,) or None -> (…, F).

    Args:
        panels: `miss.kernels.linear.prepare(weight)`, of x's dtype; ignored where x is cast by autocast.

    Raises:
        ValueError: weight or bias does not fit x.
    """
    check_shapes("gelu_mlp", x, weight, bias)
    x, bias = autocast_to(x, bias)
    check_dtypes("gelu_mlp", x, weight)
    keep = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    return FORWARD.call(_forward, x, weight, bias, keep, of_dtype(panels, x))[0]
