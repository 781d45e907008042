"""A linear layer whose result is written where the caller wants it, in any strides.

Knows the formula and who computes it; does not know what the result's dimensions stand for. For inference: no gradient.

    out = x @ weight.T + bias      x (…, K)  weight (N, K)  bias (N,) or None  out (…, *shape) with shape's product N

out of x's dtype and of any strides: a row's results go to the places that its last dimensions say, as keys and values
by layer and head do, whose readers go through one head's tokens one after the other. Everything else is `linear`'s.
"""

from math import prod

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.linear import reference, torch_impl
from miss.kernels.linear.op import CPU_DTYPES, check_dtypes, check_shapes, of_dtype, product_limits
from miss.kernels.registry import ALL_FLOATS, FLOATS, Impl, Op, lazy, triton

PIECES = (32, 64)  # elements of out's last dimension that csrc/cpu writes


def places_limits(x: Tensor, out: Tensor) -> str | None:
    """Why csrc/cpu cannot write to `out`; None where it can."""
    if out.shape[-1] not in PIECES or out.stride(-1) != 1 or out.dim() == x.dim() - 1:
        return f"out's last dimension is {out.shape[-1]}, stride {out.stride(-1)}: takes 32 or 64 dense elements"
    return None if x.dim() in (2, 3) else "takes x of 2 or 3 dimensions"


def _limits(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, out: Tensor) -> str | None:
    if out.dtype != x.dtype:
        return f"x is {x.dtype}, out {out.dtype}"
    return product_limits(x, weight, bias, panels) or places_limits(x, out)


def dense_dims(out: Tensor, start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """(size, stride) of out's dimensions start … stop - 1, those that lie densely within the one before merged into it
    and size-1 ones left out; with (1, 0) in front where fewer than `count` remain, without a limit where more do."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(out.shape[start:stop], out.stride()[start:stop], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return [(1, 0)] * (count - len(merged)) + merged


def _triton_limits(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, out: Tensor) -> str | None:
    if out.dtype != x.dtype or weight.dtype not in (x.dtype, torch.float32):
        return f"x is {x.dtype}, the weight {weight.dtype}, out {out.dtype}"
    if bias is not None and bias.dtype not in FLOATS:
        return f"takes a float32, float16 or bfloat16 bias, got {bias.dtype}"
    if not x.shape[-1]:
        return "needs at least one column"
    return steps_limits(x, out)


def steps_limits(x: Tensor, out: Tensor) -> str | None:
    """Why a Triton kernel that stores tiles at `dense_dims` cannot write to `out`; None where it can."""
    leading = x.dim() - 1
    rows, places = dense_dims(out, 0, leading, 2), dense_dims(out, leading, out.dim(), 3)
    if len(rows) > 2 or len(places) > 3:
        return f"out's strides {out.stride()}: takes rows of two steps and places of three"
    return None if places[-1][1] in (0, 1) else f"takes dense elements in out's last dimension, strides {out.stride()}"


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, out: Tensor) -> None:
    out.copy_(torch_impl.forward(x, weight, bias, None, None).view(out.shape))


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, out: Tensor) -> None:
    out.copy_(reference.forward(x, weight, bias, None, None).view(out.shape))


INTO = Op(
    "linear_into",
    Impl(
        "cpu",
        lazy("linear.cpu_impl", "into"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_limits,
    ),
    triton("linear.triton_impl", "into", _triton_limits),
    Impl("torch", _torch, dtypes=ALL_FLOATS),
    Impl("reference", _reference, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::linear_into", mutates_args=("out",))
def _into(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, out: Tensor) -> None:
    INTO(x, weight, bias, panels, out)


@_into.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, out: Tensor) -> None:
    return None


def linear_into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, panels: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias into `out` (…, *shape), which is returned.

    Raises:
        ValueError: weight, bias or out does not fit x.
    """
    check_shapes("linear_into", x, weight, bias)
    check_dtypes("linear_into", x, weight)
    check_out("linear_into", x, weight.shape[0], out)
    INTO.call(_into, x, weight, bias, of_dtype(panels, x), out)
    return out


def check_out(name: str, x: Tensor, num_outputs: int, out: Tensor) -> None:
    """Raises ValueError unless out is (…, *shape) with x (…, K) and shape's product `num_outputs`, and of x's dtype."""
    leading = x.dim() - 1
    if out.shape[:leading] != x.shape[:-1] or prod(out.shape[leading:]) != num_outputs or out.dtype != x.dtype:
        raise ValueError(
            f"{name}: out is {out.dtype} {tuple(out.shape)}; wanted {x.dtype}, {tuple(x.shape[:-1])} and then "
            f"{num_outputs} elements in any dimensions"
        )
