"""A product with int8 activations whose result is written where the caller wants it, in any strides.

Knows the product and who computes it; does not know what the result's dimensions stand for. For inference: no gradient.

    out = quant_linear(x, packed, bias) with W8A8      x (…, K)  packed (N, K)  out (…, *shape) with shape's product N

out of x's dtype and of any strides, as in `linear_into`.
"""

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.linear.into import check_out, places_limits, steps_limits
from miss.kernels.quant_linear import limits, reference, torch_impl
from miss.kernels.quant_linear.op import CPU_DTYPES
from miss.kernels.quant_linear.packing import PackedWeight
from miss.kernels.registry import ALL_FLOATS, Impl, Op, lazy, triton


def _limits(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> str | None:
    return "the weight is not prepared (`prepare`)" if panels is None else places_limits(x, out)


def _triton_limits(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> str | None:
    if out.dtype != x.dtype:
        return f"x is {x.dtype}, out {out.dtype}"
    if not x.shape[-1]:
        return "needs at least one column"
    return limits.dynamic(x, data, scale, bias, panels, offset) or steps_limits(x, out)


def _torch(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    out.copy_(torch_impl.dynamic(x, data, scale, bias, None, None).view(out.shape))


def _torch_limits(x: Tensor, data: Tensor, scale: Tensor, *rest: Tensor | None) -> str | None:
    return torch_impl.dynamic_limits(x, data, scale, None, None, None)


def _reference(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    out.copy_(reference.dynamic(x, data, scale, bias, None, None).view(out.shape))


INTO = Op(
    "quant_linear_into",
    Impl(
        "cpu",
        lazy("quant_linear.cpu_impl", "into"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_limits,
    ),
    triton("quant_linear.triton_into_impl", "into", _triton_limits),
    Impl("torch", _torch, dtypes=ALL_FLOATS, limits=_torch_limits),
    Impl("reference", _reference, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::quant_linear_into", mutates_args=("out",))
def _into(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    INTO(x, data, scale, bias, panels, offset, out)


@_into.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    return None


def quant_linear_into(x: Tensor, packed: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """x (…, K) times a packed int8 (N, K) weight, plus bias, with int8 activations, into `out`, which is returned.

    Raises:
        ValueError: the weight is not int8 with int8 activations, or x, bias or out does not fit it.
    """
    num_outputs, columns = packed.shape
    fits = x.shape[-1] == columns and (bias is None or bias.shape == (num_outputs,))
    if packed.scheme != "int8" or not packed.dynamic or not fits:
        raise ValueError(
            f"quant_linear_into: x {tuple(x.shape)}, bias {None if bias is None else tuple(bias.shape)}, "
            f"{packed.scheme} weight {packed.shape}; wanted (…, {columns}), ({num_outputs},) and W8A8"
        )
    check_out("quant_linear_into", x, num_outputs, out)
    panels, offset = packed.prepared or (None, None)
    INTO.call(_into, x, packed.data, packed.scale, bias, panels, offset, out)
    return out
