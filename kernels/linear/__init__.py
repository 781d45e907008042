"""Linear layers in full precision, with weights that may be prepared once."""

from miss.kernels.linear.op import linear, prepare

__all__ = ["linear", "prepare"]
