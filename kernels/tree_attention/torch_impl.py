"""Tree attention by gathering each node's few ancestors.

Knows how many nodes at a time keep what is gathered in the cache; does not know other implementations.
Shapes: N nodes, L ancestors, H heads, D head width.
"""

import torch
from torch import Tensor

from miss.kernels.attention.reference import without_autocast
from miss.kernels.registry import accumulator

# At a time, so that what is gathered stays in the cache. One core with avx512_bf16, torch 2.13, float32 / bfloat16, ms:
#   (N, L, H, D)         64 nodes        512             all             SDPA under an (N, N) mask
#   (300, 6, 12, 32)     1.4 /  1.2      1.1 /  1.0      1.1 /  0.9      2.8 /  2.9
#   (1500, 6, 12, 64)   11.3 / 10.3     16.7 / 20.5     17.8 / 19.5      114 /  109
#   (2000, 12, 12, 64)  30.6 / 22.3     47.5 / 46.4      199 /  187      183 /  183
_NODES = 64


@without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, scale: float) -> Tensor:
    parts = [
        _some(rows, k, v, seen, scale) for rows, seen in zip(q.split(_NODES), ancestors.split(_NODES), strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty_like(q)


def _some(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, scale: float) -> Tensor:
    num_nodes, length = ancestors.shape
    if not length:
        return torch.zeros_like(q)
    hidden = ancestors < 0
    index = ancestors.clamp(min=0).flatten()
    keys, values = (t.index_select(0, index).unflatten(0, (num_nodes, length)) for t in (k, v))
    dtype = accumulator(q.dtype)
    scores = (q[:, None].to(dtype) * keys.to(dtype)).sum(-1) * scale  # (N, L, H)
    scores = scores.masked_fill(hidden[..., None], -torch.inf)
    p = torch.softmax(scores, 1).masked_fill(hidden[..., None], 0.0)  # all hidden: zeros
    return (p[..., None] * values.to(dtype)).sum(1).to(q.dtype)
