"""Attention by one named back end of PyTorch's scaled_dot_product_attention; `torch` leaves the choice to PyTorch.

Knows the back ends and how lengths and the triangle are said to them; does not know their limits (libraries.py). The
flash one runs on CPUs too, and is tested there; those for GPUs were never run here. Naming one costs about 10 us a call
(a Zen 4 core).
Shapes: B batch, T queries, N keys, H heads, D head width.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from miss.kernels.attention.reference import visible_keys
from miss.kernels.attention.torch_impl import shown_lengths


def _attend(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, None]:
    shown, nothing = shown_lengths(lengths)
    square = causal and shown is None and q.shape[1] == k.shape[1]  # PyTorch's triangle begins at the first key
    visible = None if square else visible_keys(shown, causal, q.shape[1], k.shape[1], q.device)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible, is_causal=square, scale=scale
        ).transpose(1, 2)
    return out if nothing is None else out.masked_fill(nothing, 0.0), None


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, None]:
    """(out (B, T, H, D), None)."""
    return _attend(SDPBackend.FLASH_ATTENTION, q, k, v, lengths, causal, scale)


def cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, None]:
    """(out (B, T, H, D), None)."""
    return _attend(SDPBackend.CUDNN_ATTENTION, q, k, v, lengths, causal, scale)


def efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, None]:
    """(out (B, T, H, D), None)."""
    return _attend(SDPBackend.EFFICIENT_ATTENTION, q, k, v, lengths, causal, scale)


def math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, None]:
    """(out (B, T, H, D), None): products and a softmax, all scores in memory."""
    return _attend(SDPBackend.MATH, q, k, v, lengths, causal, scale)
