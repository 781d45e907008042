"""An encoder's layer by one call of csrc/cpu/ops_encoder_layer.cpp.

Knows the order of the tensors that it takes; does not know what it computes.
"""

from torch import Tensor

from miss.kernels import extension
from miss.kernels.cross_attention import KV
from miss.kernels.cross_attention.rows import check_index
from miss.kernels.decoder_step.weights import Layer
from miss.kernels.encoder_layer.weights import ImageLayer, tensors

_ops = extension.ops()


def image_layer(x: Tensor, layer: ImageLayer, num_heads: int) -> Tensor:
    eps1, eps2 = layer.norm1.eps, layer.norm2.eps
    return _ops.image_layer(x.contiguous(), tensors(layer), num_heads, eps1, eps2)  # type: ignore[no-any-return]


def text_layer(
    x: Tensor,
    layer: Layer,
    num_heads: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
    source: KV | None,
    index: Tensor | None,
) -> Tensor:
    k, v = (None, None) if source is None else source
    eps = layer.self_norm.eps
    weights = tensors(layer)
    try:
        return _ops.text_layer(  # type: ignore[no-any-return]
            x.contiguous(), weights, num_heads, eps, lengths, offsets, max_length, k, v, index
        )
    except RuntimeError:
        if index is not None and k is not None:
            check_index(index, k.shape[0])  # says which row, as a ValueError
        raise
