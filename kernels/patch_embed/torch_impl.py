"""Pixels to patch tokens by PyTorch's own kernels: patches cut while they are bytes, then one product.

Knows PyTorch's functions; does not know other implementations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.patch_embed.reference import patches, unpatched
from miss.kernels.registry import accumulator


def _rows(weight: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalised patch rows (B, N, 3 * P * P) in the weight's dtype; normalised in float32 at least."""
    cut = patches(pixels, weight.shape[-1])
    acc = accumulator(weight.dtype)
    values = torch.addcmul(shift.to(acc)[:, None, None], cut.to(acc), scale.to(acc)[:, None, None])
    return values.flatten(2).to(weight.dtype)


def forward(
    weight: Tensor, bias: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, panels: Tensor | None = None
) -> Tensor:
    return F.linear(_rows(weight, pixels, scale, shift), weight.flatten(1), bias)


def backward(
    dy: Tensor, weight: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, need_pixels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(weight, pixels, scale, shift).flatten(0, 1)
    flat = dy.reshape(-1, dy.shape[-1])
    dweight = (flat.T @ rows).view(weight.shape)
    dpixels = unpatched(dy @ weight.flatten(1), scale, pixels) if need_pixels else pixels.new_empty(0)
    return dweight, flat.sum(0), dpixels
