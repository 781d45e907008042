"""Linear, bias and exact GELU by csrc/cpu/linear.inl.h.

Knows which function of the extension computes what; does not know how.
"""

import torch
from torch import Tensor

from miss.kernels import extension

_ops = extension.ops()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, panels: Tensor | None) -> tuple[Tensor, Tensor]:
    panels = _ops.pack_panels(weight, False, x.dtype == torch.bfloat16) if panels is None else panels
    bias = None if bias is None else bias.contiguous()
    return _ops.linear(x.contiguous(), panels, weight.shape[0], bias, True, None, keep)


def backward(dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.linear_backward(dy, x.contiguous(), weight, pre, True, True, True)
