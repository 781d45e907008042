"""Linear and label-smoothed cross entropy over a vocabulary, a loss a row.

Knows its formula, its gradient and who computes it; does not know how rows are averaged.

    z = hidden @ weight.T + bias;  lse = log(sum(exp(z)));  e = label_smoothing
    loss = lse - (1 - e) * z[label] - e * mean(z)          0 where label == ignore_index

hidden (R, C), weight (V, C), bias (V,) or None, labels int64 (R,); loss and lse (R,) in float32 (float64 in float64),
whatever the dtype of the logits. Rows that are ignored are taken out before the product, and no implementation holds
float32 logits of more than a block of rows. Under autocast hidden, weight and bias take the autocast dtype, as a
linear does, and the loss stays in float32.

Gradient: dz = dloss * (softmax(z) - (1 - e) * onehot(label) - e / V), rounded to the logits' dtype as the input of two
products; dhidden = dz @ weight; dweight = dz.T @ hidden; dbias = sum(dz). lse is kept for it.

Source: arXiv 1512.00567 (label smoothing), with torch.nn.functional.cross_entropy's meaning of e.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.cross_entropy import reference, torch_impl
from miss.kernels.registry import ALL_FLOATS, FLOATS, Impl, Op, accumulator, autocast_to, lazy, triton

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})


def _triton_limits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> str | None:
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        return "takes hidden, weight and bias of one dtype"
    return None if weight.numel() else "needs at least one word and one column"


def _triton_backward_limits(dloss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> str | None:
    if hidden.dtype not in FLOATS:
        return "takes float32, float16 and bfloat16"
    return _triton_limits(hidden, weight, *rest)


def _limits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> str | None:
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        return "takes hidden, weight and bias of one dtype"
    if hidden.shape[1] == 0:
        return "needs at least one column"
    if len(hidden) * len(weight) > torch_impl.PART:
        return f"holds all logits at once, up to {torch_impl.PART}"
    return None


def _backward_limits(dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> str | None:
    return _limits(hidden, weight, bias) if hidden.dtype in CPU_DTYPES else "takes float32 and bfloat16"


FORWARD = Op(
    "linear_cross_entropy",
    Impl(
        "cpu",
        lazy("cross_entropy.cpu_impl", "forward"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_limits,
        composite=True,
    ),
    triton("cross_entropy.triton_impl", "forward", _triton_limits),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "linear_cross_entropy_backward",
    Impl(
        "cpu",
        lazy("cross_entropy.cpu_impl", "backward"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_backward_limits,
    ),
    triton("cross_entropy.triton_impl", "backward", _triton_backward_limits),
    Impl("torch", torch_impl.backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.backward, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return FORWARD(hidden, weight, bias, labels, label_smoothing, ignore_index)


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    loss = hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden.dtype))
    return loss, torch.empty_like(loss)


@torch.library.custom_op("miss::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(dloss, hidden, weight, bias, labels, lse, label_smoothing, ignore_index)


@_backward.register_fake
def _(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, ctx.label_smoothing, ctx.ignore_index = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])


def _grad(ctx: Any, dloss: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    dhidden, dweight, dbias = _backward(
        dloss.contiguous(), hidden, weight, bias, labels, lse, ctx.label_smoothing, ctx.ignore_index
    )
    return dhidden, dweight, None if bias is None else dbias, None, None, None


_forward.register_autograd(_grad, setup_context=_save)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The loss of each row, float32 (R,), 0 where the label is `ignore_index`; reductions are the caller's.

    Raises:
        ValueError: hidden is not (R, C), weight not (V, C), labels not int64 (R,), label_smoothing not in [0, 1].
    """
    _check(hidden, weight, bias, labels, label_smoothing)
    hidden, weight, bias = autocast_to(hidden, weight, bias)
    return FORWARD.call(_forward, hidden, weight, bias, labels, label_smoothing, ignore_index)[0]


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float) -> None:
    shapes_fit = (
        hidden.dim() == weight.dim() == 2
        and hidden.shape[1] == weight.shape[1]
        and labels.shape == hidden.shape[:1]
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not shapes_fit or labels.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"bias {None if bias is None else tuple(bias.shape)}, labels {labels.dtype} {tuple(labels.shape)}; "
            f"wanted (R, C), (V, C), (V,), int64 (R,)"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}; wanted 0 to 1")
