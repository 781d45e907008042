"""Products with packed weights by csrc/cpu: weight_only.inl.h, and linear.inl.h for int8 activations.

Knows which function of the extension computes what, and what it wants the weight laid out as; does not know how.
"""

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.quant_linear.packing import PackedWeight, Prepared, from_nibbles

_ops = extension.ops()


def prepared(packed: PackedWeight) -> PackedWeight:
    """`packed` with its panels."""
    if packed.scheme == "int8":
        return packed._replace(prepared=Prepared(*_ops.pack_int8(packed.data)))
    codes = from_nibbles(packed.data, packed.group).flatten(1).contiguous()
    panels = _ops.pack_int4(codes, packed.scale.contiguous(), packed.zero, packed.group)
    return packed._replace(prepared=Prepared(panels, None))


def forward(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    columns: int,
    group: int,
    panels: Tensor,
    offset: Tensor | None,
) -> Tensor:
    scales = scale if group == 0 else None
    bias = None if bias is None else _bias(bias, x.dtype)
    return _ops.linear_weight_only(x.contiguous(), panels, scales, scale.shape[0], group, zero is not None, bias)


def dynamic(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, panels: Tensor, offset: Tensor) -> Tensor:
    bias = None if bias is None else _bias(bias, x.dtype)
    return _ops.linear_int8(x.contiguous(), None, panels, offset, scale, bias, False, None, x.dtype)


def into(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, panels: Tensor, offset: Tensor, out: Tensor
) -> None:
    bias = None if bias is None else _bias(bias, x.dtype)
    _ops.linear_int8_into(x.contiguous(), None, panels, offset, scale, bias, out)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    return _ops.quantise_rows(x.contiguous())


def rows(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    panels: Tensor,
    offset: Tensor,
) -> Tensor:
    bias = None if bias is None else _bias(bias, dtype)
    residual = None if residual is None else residual.contiguous()
    return _ops.linear_int8(
        codes.contiguous(), row_scale.contiguous(), panels, offset, scale, bias, gelu, residual, dtype
    )


def rows_quantised(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    panels: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else _bias(bias, torch.bfloat16 if bias.dtype == torch.bfloat16 else torch.float32)
    return _ops.linear_int8_codes(codes.contiguous(), row_scale.contiguous(), panels, offset, scale, bias, gelu)


def _bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    return (bias if bias.dtype in (dtype, torch.float32) else bias.to(dtype)).contiguous()
