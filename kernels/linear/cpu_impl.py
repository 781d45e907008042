"""Linear layers by csrc/cpu/linear.inl.h.

Knows which function of the extension computes what; does not know how.
"""

import torch
from torch import Tensor

from miss.kernels import extension

_ops = extension.ops()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, panels: Tensor | None) -> Tensor:
    panels = _ops.pack_panels(weight, False, x.dtype == torch.bfloat16) if panels is None else panels
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    return _ops.linear(x.contiguous(), panels, weight.shape[0], bias, False, residual, False)[0]


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.linear_backward(dy, x.contiguous(), weight, None, need_x, need_weight, need_bias)


def into(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, out: Tensor) -> None:
    panels = _ops.pack_panels(weight, False, x.dtype == torch.bfloat16) if panels is None else panels
    _ops.linear_into(x.contiguous(), panels, weight.shape[0], None if bias is None else bias.contiguous(), out)
