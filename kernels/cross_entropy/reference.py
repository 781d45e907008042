"""Linear and cross entropy in plain PyTorch: the definition that the fast ones must match.

Knows the formulas; does not know speed or memory.

Shapes: R rows, C width, V vocabulary.
"""

import torch
from torch import Tensor

from miss.kernels.registry import accumulator


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulator(hidden.dtype)
    z = hidden.to(acc) @ weight.to(acc).T
    return z if bias is None else z + bias.to(acc)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    valid = (labels != ignore_index).nonzero()[:, 0]
    z = _logits(hidden[valid], weight, bias)
    lse = torch.logsumexp(z, -1)
    chosen = z.gather(1, labels[valid][:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * chosen - label_smoothing * z.mean(-1)
    rows = z.new_zeros(len(labels))
    return rows.index_copy(0, valid, loss), rows.index_copy(0, valid, lse)


def backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(hidden.dtype)
    valid = (labels != ignore_index).nonzero()[:, 0]
    z = _logits(hidden[valid], weight, bias)
    dz = torch.exp(z - lse[valid, None]) - label_smoothing / len(weight)
    dz[torch.arange(len(valid), device=dz.device), labels[valid]] -= 1 - label_smoothing
    dz *= dloss[valid, None]
    dhidden = torch.zeros(hidden.shape, dtype=acc, device=hidden.device).index_copy(0, valid, dz @ weight.to(acc))
    dweight = dz.T @ hidden[valid].to(acc)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dz.sum(0).to(weight.dtype)
