"""Exponential moving averages of many tensors at once."""

from miss.kernels.ema.op import ema_

__all__ = ["ema_"]
