"""Linear and label-smoothed cross entropy as one operation."""

from miss.kernels.cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
