"""The head in plain PyTorch: the definition that the fast ones must match.

Knows the formulas; does not know speed.
"""

import torch
from torch import Tensor

from miss.kernels.quant_linear import reference as quant_linear
from miss.kernels.registry import accumulator


def best(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, indices, lse) of logits (R, V). A stable sort keeps equal values in the order of their indices."""
    values, indices = torch.sort(z, dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous(), torch.logsumexp(z, -1)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, panels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(hidden.dtype)
    z = hidden.to(acc) @ weight.to(acc).T
    return best(z if bias is None else z + bias.to(acc), k)


def quant(
    hidden: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return best(quant_linear.dynamic(hidden.to(accumulator(hidden.dtype)), data, scale, bias, None, None), k)
