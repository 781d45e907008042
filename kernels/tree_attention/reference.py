"""Tree attention in plain PyTorch over all pairs of nodes: the definition that the fast ones must match.

Knows the formula; does not know speed. Computes in float32 (float64 in float64), whatever autocast says.
Shapes: N nodes, L ancestors, H heads, D head width.
"""

import torch
from torch import Tensor

from miss.kernels.attention.reference import attend, without_autocast


@without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, scale: float) -> Tensor:
    nodes = torch.arange(q.shape[0], device=q.device)
    visible = (ancestors[:, :, None] == nodes).any(1)  # (N, N)
    return attend(q[None], k[None], v[None], visible[None, None], scale, None)[0][0]
