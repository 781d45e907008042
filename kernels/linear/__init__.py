"""Linear layers in full precision, with weights that may be prepared once."""

from miss.kernels.linear.into import linear_into
from miss.kernels.linear.op import linear, prepare

__all__ = ["linear", "linear_into", "prepare"]
