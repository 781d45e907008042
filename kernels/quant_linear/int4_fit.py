"""Scales, zero points and codes of int4 groups for the least squared error.

Knows groups of columns as floats; does not know how codes lie in bytes (`packing.py`).

Shapes: N rows, G groups of `group` columns; `cost` (1, G, group) is what a column's squared error counts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Fractions of the full range that the scale search tries: outliers are often better cut than kept.
FRACTIONS = tuple(1.15 - 0.025 * i for i in range(28))


class Fit(NamedTuple):
    """A quantisation of all groups: codes (N, G, group) float, scale and zero (N, G), squared error (N, G)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    error: Tensor


def fit(groups: Tensor, cost: Tensor, scale: Tensor, zero: Tensor) -> Fit:
    """The nearest codes under these scales, as stored in float16."""
    scale = scale.half().float()
    scale = torch.where(scale == 0, 1.0, scale)  # an all but empty group: every code is its zero point
    codes = torch.round(groups / scale[..., None] + zero[..., None]).clamp_(0, 15)
    error = (codes - zero[..., None]).mul_(scale[..., None]).sub_(groups).square_().mul_(cost).sum(-1)
    return Fit(codes, scale, zero, error)


def better(a: Fit, b: Fit) -> Fit:
    """Group by group the one with the smaller error."""
    take = b.error < a.error
    rest = (torch.where(take, y, x) for x, y in zip(a[1:], b[1:], strict=True))
    return Fit(torch.where(take[..., None], b.codes, a.codes), *rest)


def range_fit(groups: Tensor, cost: Tensor, symmetric: bool) -> Fit:
    """The scale that just covers the group's range."""
    if symmetric:
        scale = groups.abs().amax(-1) / 7
        return fit(groups, cost, scale, torch.full_like(scale, 8))
    return _asymmetric(groups, cost, 1.0, 0)


def _asymmetric(groups: Tensor, cost: Tensor, fraction: float, shift: int) -> Fit:
    low, high = groups.amin(-1).clamp_max(0) * fraction, groups.amax(-1).clamp_min(0) * fraction
    scale = (high - low) / 15
    zero = torch.round(-low / torch.where(scale == 0, 1.0, scale)) + shift
    return fit(groups, cost, scale, zero.clamp_(0, 15))


def candidates(groups: Tensor, cost: Tensor, symmetric: bool, fraction: float) -> list[Fit]:
    if not symmetric:
        return [_asymmetric(groups, cost, fraction, shift) for shift in (-1, 0, 1)]
    # The codes reach from -8 to 7: a negative scale gives the longer side to the positive weights.
    scale = groups.abs().amax(-1) / 8 * fraction
    zero = torch.full_like(scale, 8)
    return [fit(groups, cost, sign * scale, zero) for sign in (1, -1)]


def least_squares(groups: Tensor, cost: Tensor, found: Fit) -> Fit:
    """The best scale for the codes at hand, and the best codes for that scale."""
    steps = found.codes - found.zero[..., None]
    power = (steps * steps * cost).sum(-1)
    scale = (steps * groups * cost).sum(-1) / torch.where(power == 0, 1.0, power)
    return fit(groups, cost, scale, found.zero)
