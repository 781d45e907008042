"""Moving averages in plain PyTorch: the definition that the fast ones must match.

Knows the formula; does not know speed.
"""

from torch import Tensor


def update(first: Tensor, averages: list[Tensor], values: list[Tensor], momentum: float) -> None:
    for average, value in zip(averages, values, strict=True):
        average.add_((value.to(average.dtype) - average) * (1 - momentum))
