"""PyTorch's scaled_dot_product_attention, called directly.

Knows SDPA; does not know our implementations. Shapes as in kernels/attention/op.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Bound, Peer


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


def backends(device: torch.device) -> Iterator[Peer]:
    """Each of SDPA's own ways by itself; which of them it would take is its own choice."""
    missing = None if device.type == "cuda" else "needs CUDA"
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        yield Peer(f"sdpa_{name.partition('_')[0].lower()}", _only(name), missing)


def _only(name: str) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, name)

    def bind(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Bound:
        call = attention(q, k, v, lengths)

        def run() -> Any:
            with sdpa_kernel(backend):
                return call()

        return run

    return bind
