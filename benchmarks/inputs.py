"""Random inputs as a model has them: activations of unit size, weights of the size that trained ones have.

Knows tensors and packed weights; does not know operations.
"""

import torch
from torch import Tensor

from miss.kernels.quant_linear import PackedWeight, pack_codes

WEIGHT_SIZE = 0.04  # the standard deviation of BERT's and the ViT's trained matrices


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator, device=generator.device) * size).to(dtype)


def weight(generator: torch.Generator, outputs: int, columns: int, dtype: torch.dtype) -> Tensor:
    return normal(generator, outputs, columns, dtype=dtype, size=WEIGHT_SIZE)


def int8_weight(generator: torch.Generator, outputs: int, columns: int, dynamic: bool) -> PackedWeight:
    """Codes over the full range, without the seconds that packing takes."""
    codes = torch.randint(-127, 128, (outputs, columns), generator=generator, device=generator.device)
    scale = WEIGHT_SIZE / 64 * (0.5 + torch.rand(outputs, generator=generator, device=generator.device))
    return PackedWeight(codes.to(torch.int8), scale, None, "int8", 0, (outputs, columns), dynamic)


def int4_weight(generator: torch.Generator, outputs: int, columns: int, group: int = 64) -> PackedWeight:
    codes = torch.randint(0, 16, (outputs, columns), generator=generator, device=generator.device)
    shape = (outputs, -(-columns // group))
    scale = WEIGHT_SIZE / 4 * (0.5 + torch.rand(shape, generator=generator, device=generator.device))
    return pack_codes(codes, scale, None, group)


def by_pieces(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for (rows, columns / 64, 64), in memory piece by piece as heads lie; one piece where 64 does not divide."""
    piece = columns if columns % 64 else 64
    return torch.ones(columns // piece, rows, piece, dtype=dtype, device=device).transpose(0, 1)
