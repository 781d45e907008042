"""A linear layer, with a residual added where the product is finished.

Knows its formula, its gradient and who computes it; does not know which layer asks.

    y = x @ weight.T + bias + residual        x (…, K)  weight (N, K)  bias (N,) or None  residual (…, N) or None

y in x's dtype, products accumulated in float32 (float64 in float64). A float32 weight is rounded to a half x's dtype on
the way into the product, and its gradient is float32: under autocast all but the weight take the autocast dtype,
and no rounded copy of the weight or of its gradient is made (5 % of a finetuning step).

`panels` is what `prepare(weight)` returned: the weight laid out for a kernel, which spares that work at every call. It
is not read by rows that do not want it, and the caller sees to it that it is the weight's.

Gradient: dx = dy @ weight; dweight = dy.T @ x; dbias = the sum of dy over rows; dresidual = dy.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.linear import reference, torch_impl
from miss.kernels.registry import ALL_FLOATS, HALVES, Impl, Op, autocast_to, lazy

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})
LEAST_ROWS = 64  # from which laying out a weight (2 to 4 % of the product of 577 rows) is repaid in the same call


def _limits(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> str | None:
    return product_limits(x, weight, bias, rest[-1])


def product_limits(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None) -> str | None:
    """Why csrc/cpu's linear cannot serve these arguments; None where it can."""
    if weight.dtype not in (x.dtype, torch.float32):
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        return f"x is {x.dtype}, the bias {bias.dtype}"
    if panels is None and x.numel() < LEAST_ROWS * x.shape[-1]:
        return f"fewer than {LEAST_ROWS} rows of a weight that is not prepared: laying it out would take longer"
    return None


def gradient_limits(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> str | None:
    """Why csrc/cpu's gradient of a linear layer cannot serve these arguments; None where it can."""
    fits = x.dtype == dy.dtype and weight.dtype in (x.dtype, torch.float32)
    return None if fits else f"dy is {dy.dtype}, x {x.dtype}, the weight {weight.dtype}"


FORWARD = Op(
    "linear",
    Impl(
        "cpu",
        lazy("linear.cpu_impl", "forward"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_limits,
    ),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "linear_backward",
    Impl(
        "cpu",
        lazy("linear.cpu_impl", "backward"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=gradient_limits,
    ),
    Impl("torch", torch_impl.backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.backward, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, panels: Tensor | None) -> Tensor:
    return FORWARD(x, weight, bias, residual, panels)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, panels: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("miss::linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(dy, x, weight, need_x, need_weight, need_bias)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
    dx, dweight, dbias = _backward(dy.contiguous(), *ctx.saved_tensors, need_x, need_weight, need_bias)
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dy if need_residual else None,
        None,
    )


_forward.register_autograd(_grad, setup_context=_save)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    panels: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias + residual: x (…, K), weight (N, K), bias (N,), residual (…, N) -> (…, N).

    Args:
        panels: `prepare(weight)`, of x's dtype; ignored where x is cast by autocast.

    Raises:
        ValueError: weight, bias or residual does not fit x, or the weight would have to be rounded up to x's dtype.
    """
    check_shapes("linear", x, weight, bias)
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        shape = (*x.shape[:-1], weight.shape[0])
        raise ValueError(f"linear: residual is {tuple(residual.shape)}; wanted {shape}, the result's shape")
    x, bias, residual = autocast_to(x, bias, residual)
    check_dtypes("linear", x, weight)
    return FORWARD.call(_forward, x, weight, bias, residual, of_dtype(panels, x))


def check_shapes(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless x (…, K), weight (N, K), bias (N,) or None."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"{name}: x {tuple(x.shape)}, weight {tuple(weight.shape)}, "
            f"bias {None if bias is None else tuple(bias.shape)}; wanted x (…, K), weight (N, K), bias (N,)"
        )


def check_dtypes(name: str, x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless the weight is of x's dtype, or float32 where x is a half."""
    if weight.dtype != x.dtype and not (weight.dtype == torch.float32 and x.dtype in HALVES):
        raise ValueError(f"{name}: x is {x.dtype}, the weight {weight.dtype}; wanted one dtype, or a float32 weight")


def of_dtype(panels: Tensor | None, x: Tensor) -> Tensor | None:
    """`panels` where they are of x's dtype: under autocast x may be of another than the weight that was prepared."""
    return panels if panels is not None and panels.dtype == x.dtype else None


def prepare(weight: Tensor) -> Tensor | None:
    """The weight (N, K) as panels for `linear` and `gelu_mlp`; None where no row here would read them.

    float32 or bfloat16 on CPU: (ceil(N / 64), ceil(K / group), 64, group) with a group of 4 bytes, zero beyond N and K.
    """
    if weight.device.type != "cpu" or weight.dtype not in CPU_DTYPES or extension.missing() is not None:
        return None
    return extension.ops().pack_panels(weight.detach(), False, False, True)
