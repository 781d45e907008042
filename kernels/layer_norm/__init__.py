"""Layer normalization, plain and after residual and dropout."""

from miss.kernels.layer_norm.op import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
