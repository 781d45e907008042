"""The head by csrc/cpu/top_k.inl.h.

Knows which function of the extension computes what; does not know how.
"""

from torch import Tensor

from miss.kernels import extension

_ops = extension.ops()


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, panels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if panels is None:
        panels = _ops.pack_panels(weight)
    bias = None if bias is None else bias.contiguous()
    return _ops.linear_top_k(hidden.contiguous(), panels, len(weight), bias, k)


def quant(
    hidden: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if panels is None or offset is None:
        panels, offset = _ops.pack_int8(data)
    bias = None if bias is None else bias.contiguous()
    return _ops.linear_top_k_int8(hidden.contiguous(), panels, offset, scale, bias, k)
