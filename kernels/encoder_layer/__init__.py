"""A whole layer of an encoder whose linear layers take int8 codes."""

from miss.kernels.encoder_layer.op import image_layer, text_layer
from miss.kernels.encoder_layer.weights import ImageLayer, takes_codes

__all__ = ["ImageLayer", "image_layer", "takes_codes", "text_layer"]
