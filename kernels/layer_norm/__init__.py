"""Layer normalization, plain and after residual and dropout, and its result as int8 codes."""

from miss.kernels.layer_norm.op import add_layer_norm, layer_norm
from miss.kernels.layer_norm.quantised import add_layer_norm_quantised, layer_norm_quantised

__all__ = ["add_layer_norm", "add_layer_norm_quantised", "layer_norm", "layer_norm_quantised"]
