"""Pixels to patch tokens by PyTorch's own kernels: patches cut while they are bytes, then one product.

Knows PyTorch's functions; does not know other implementations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.patch_embed.reference import patches
from miss.kernels.registry import accumulator


def _rows(weight: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalised patch rows (B, N, 3 * P * P) in the weight's dtype; normalised in float32 at least."""
    cut = patches(pixels, weight.shape[-1])
    acc = accumulator(weight.dtype)
    values = torch.addcmul(shift.to(acc)[:, None, None], cut.to(acc), scale.to(acc)[:, None, None])
    return values.flatten(2).to(weight.dtype)


def forward(weight: Tensor, bias: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.linear(_rows(weight, pixels, scale, shift), weight.flatten(1), bias)


def backward(
    dy: Tensor, weight: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, need_pixels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(weight, pixels, scale, shift)
    flat = dy.reshape(-1, dy.shape[-1])
    dweight = (flat.T @ rows.reshape(len(flat), -1)).view(weight.shape)
    dpixels = pixels.new_empty(0)
    if need_pixels:
        with torch.enable_grad():
            leaf = pixels.detach().requires_grad_()
            y = _rows(weight.detach(), leaf, scale, shift)
        (dpixels,) = torch.autograd.grad(y, leaf, (dy @ weight.flatten(1)).view(y.shape))
    return dweight, flat.sum(0), dpixels.contiguous()
