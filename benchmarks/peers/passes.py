"""Separate passes over whole matrices, as a model without fused operations makes them.

Knows PyTorch's functions; does not know our implementations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Bound

_SHIFT = 128


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 codes around 128 (…, K), float32 scale (…, 1)) of x (…, K): largest magnitude, division, rounding."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    codes = torch.round(x / scale).clamp_(-127, 127).add_(_SHIFT).to(torch.uint8)
    return codes, scale


def norm_quantise(x: Tensor, weight: Tensor, bias: Tensor) -> Bound:
    def run() -> tuple[Tensor, Tensor]:
        codes, scale = quantise_rows(F.layer_norm(x, x.shape[-1:], weight, bias))
        return codes, scale[..., 0]

    return run


def add_norm_quantise(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Bound:
    def run() -> tuple[Tensor, Tensor, Tensor]:
        summed = x + residual
        codes, scale = quantise_rows(F.layer_norm(summed, x.shape[-1:], weight, bias))
        return codes, scale[..., 0], summed

    return run
