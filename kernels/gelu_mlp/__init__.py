"""Linear, bias and exact GELU as one operation."""

from miss.kernels.gelu_mlp.op import gelu_mlp

__all__ = ["gelu_mlp"]
