"""The head by PyTorch's own kernels: logits, then what is wanted of them.

Knows PyTorch's functions; does not know other implementations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.quant_linear import torch_impl as quant_linear
from miss.kernels.registry import accumulator


def _best(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """torch.topk promises no order of equal values; argmax gives the first. Ties beyond it are put right."""
    lse = torch.logsumexp(z, -1)
    if k == 1:
        indices = z.argmax(-1, keepdim=True)
        return z.gather(-1, indices), indices, lse
    values, indices = torch.topk(z, k, -1)
    equal = (z >= values[:, -1:]).sum(-1) > k  # more share the last value than there was room for
    if equal.any() or (values[:, 1:] == values[:, :-1]).any():
        values, indices = (t[:, :k].contiguous() for t in torch.sort(z, dim=-1, descending=True, stable=True))
    return values, indices, lse


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, panels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _best(F.linear(hidden, weight, bias).to(accumulator(hidden.dtype)), k)


def quant(
    hidden: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _best(quant_linear.dynamic(hidden, data, scale, bias, None, None).to(accumulator(hidden.dtype)), k)
