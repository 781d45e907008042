"""Attention by PyTorch's FlexAttention, compiled for each shape. Never run on a GPU here; uncompiled its results are
tested on the CPU.

Knows how lengths and the triangle are said as a block mask; does not know what else runs.
Shapes: B batch, T queries, N keys, H heads, D head width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def block_mask(q: Tensor, k: Tensor, lengths: Tensor | None, causal: bool) -> BlockMask | None:
    """None where every query sees every key."""
    queries, keys = q.shape[1], k.shape[1]
    if lengths is None and not causal:
        return None

    def visible(b: Tensor, h: Tensor, t: Tensor, n: Tensor) -> Tensor:
        seen = n < (keys if lengths is None else lengths[b])
        return seen & (n <= t + keys - queries) if causal else seen

    return create_block_mask(visible, None if lengths is None else q.shape[0], None, queries, keys, device=q.device)


def attend(
    kernel: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), lse (B, H, T)) by `flex_attention` or what is compiled of it."""
    out, beside = kernel(
        *(t.transpose(1, 2) for t in (q, k, v)),
        block_mask=block_mask(q, k, lengths, causal),
        scale=scale,
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2), beside.lse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return attend(_compiled(), q, k, v, lengths, causal, scale)
