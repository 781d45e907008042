"""A whole decode step: one token a row through an answer decoder."""

from miss.kernels.decoder_step.op import decoder_step, prepare
from miss.kernels.decoder_step.weights import Cache, Decoder, Layer, Matrix, Norm

__all__ = ["Cache", "Decoder", "Layer", "Matrix", "Norm", "decoder_step", "prepare"]
