"""Moving averages by PyTorch's multi-tensor kernels.

Knows which pairs may go together; does not know other implementations.
"""

import torch
from torch import Tensor


def update(first: Tensor, averages: list[Tensor], values: list[Tensor], momentum: float) -> None:
    """Values of another dtype than their average are cast first: a temporary of the averages' size."""
    torch._foreach_lerp_(averages, [v.to(a.dtype) for a, v in zip(averages, values, strict=True)], 1 - momentum)
