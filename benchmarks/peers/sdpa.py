"""PyTorch's scaled_dot_product_attention, called directly.

Knows SDPA; does not know our implementations. Shapes as in kernels/attention/op.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Bound


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, causal: bool = False) -> Bound:
    """Over (B, T, H, D); lengths become a mask before the clock runs."""
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    mask: Tensor | None = None
    if lengths is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None]
    run: Any = F.scaled_dot_product_attention
    return lambda: run(*heads, attn_mask=mask, is_causal=causal).transpose(1, 2)


def repeated(q: Tensor, source: Any, image_index: Tensor) -> Bound:
    """Every row with a copy of its image's keys and values, made once before the clock runs."""
    k, v = (t[image_index.long()] for t in source)
    return attention(q, k, v)


def repeating(q: Tensor, source: Any, image_index: Tensor) -> Bound:
    """The copies are made in each call, as where a batch is put together layer by layer."""
    index = image_index.long()
    run: Any = F.scaled_dot_product_attention

    def call() -> Tensor:
        k, v = (t[index].transpose(1, 2) for t in source)
        return run(q.transpose(1, 2), k, v).transpose(1, 2)

    return call
