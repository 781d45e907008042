"""Pixels to patch tokens in plain PyTorch: the definition that the fast ones must match.

Knows the formulas and the order of a patch's values; does not know speed.

Shapes: B batch, N patches, C width, P patch size.
"""

import math

import torch
from torch import Tensor

from miss.kernels.registry import accumulator


def patches(pixels: Tensor, size: int) -> Tensor:
    """pixels (B, height, width, 3) -> (B, N, 3, P, P): patches row by row, a patch's values in the weight's order."""
    batch, height, width, channels = pixels.shape
    rows, columns = height // size, width // size
    grid = pixels.reshape(batch, rows, size, columns, size, channels)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(batch, rows * columns, channels, size, size)


def _normalised(pixels: Tensor, scale: Tensor, shift: Tensor, size: int, acc: torch.dtype) -> Tensor:
    values = patches(pixels, size).to(acc)
    return (values * scale.to(acc)[:, None, None] + shift.to(acc)[:, None, None]).flatten(2)


def unpatched(drows: Tensor, scale: Tensor, pixels: Tensor) -> Tensor:
    """Gradient of normalised rows (B, N, 3 * P * P) as one of pixels (B, height, width, 3), in the pixels' dtype."""
    batch, height, width, channels = pixels.shape
    size = math.isqrt(drows.shape[-1] // channels)
    values = drows.view(batch, height // size, width // size, channels, size, size)
    values = values * scale.to(accumulator(drows.dtype))[:, None, None]
    return values.permute(0, 1, 4, 2, 5, 3).reshape(pixels.shape).to(pixels.dtype)


def forward(
    weight: Tensor, bias: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, panels: Tensor | None = None
) -> Tensor:
    acc = accumulator(weight.dtype)
    rows = _normalised(pixels, scale, shift, weight.shape[-1], acc)
    return (rows @ weight.to(acc).flatten(1).T + bias.to(acc)).to(weight.dtype)


def backward(
    dy: Tensor, weight: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, need_pixels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(weight.dtype)
    size, dyf = weight.shape[-1], dy.to(acc)
    rows = _normalised(pixels, scale, shift, size, acc)
    dweight = torch.einsum("bnc,bnk->ck", dyf, rows).view(weight.shape)
    dpixels = pixels.new_empty(0)
    if need_pixels:
        dpixels = unpatched(dyf @ weight.to(acc).flatten(1), scale, pixels)
    return dweight.to(weight.dtype), dyf.sum((0, 1)).to(weight.dtype), dpixels
