"""The head by PyTorch's own kernels: logits, then what is wanted of them.

Knows PyTorch's functions; does not know other implementations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.quant_linear import torch_impl as quant_linear
from miss.kernels.registry import accumulator

_MOST_PASSES = 32  # three times argmax over 64 rows of 30,524 logits: in a call of 20 ms; a stable sort: in one of 253


def _best(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """argmax gives the first of equal values, torch.topk any of them (bfloat16 logits have many)."""
    lse = torch.logsumexp(z, -1)
    if k == 1:
        indices = z.argmax(-1, keepdim=True)
        return z.gather(-1, indices), indices, lse
    if k <= _MOST_PASSES and z.device.type == "cpu":  # looking for -inf would wait for another device
        left = z.clone()
        found: list[Tensor] = []
        for i in range(k):
            if i:
                left.scatter_(-1, found[-1], -torch.inf)
            found.append(left.argmax(-1, keepdim=True))
        indices = torch.cat(found, -1)
        values = z.gather(-1, indices)
        if not (values == -torch.inf).any():  # else what was taken is found again
            return values, indices, lse
    values, indices = torch.sort(z, dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous(), lse


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
