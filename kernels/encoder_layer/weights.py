"""What an encoder's layer is made of, as plain tensors.

Knows names; does not know modules, or who computes with them. A text's layer is `decoder_step.weights.Layer`.
"""

from typing import NamedTuple

from torch import Tensor

from miss.kernels.decoder_step.weights import Layer, Matrix, Norm
from miss.kernels.quant_linear import PackedWeight


class ImageLayer(NamedTuple):
    """One pre-norm layer, in the order in which it runs."""

    norm1: Norm
    qkv: Matrix
    output: Matrix
    norm2: Norm
    input: Matrix
    mlp_output: Matrix


def matrices(layer: ImageLayer | Layer) -> list[Matrix]:
    return [part for part in layer if isinstance(part, Matrix)]


def takes_codes(layer: ImageLayer | Layer) -> bool:
    """Whether all of its products are those of int8 codes on both sides."""
    return all(isinstance(m.weight, PackedWeight) and m.weight.w8a8 for m in matrices(layer))


def tensors(layer: ImageLayer | Layer) -> list[Tensor]:
    """All in order, as csrc/cpu takes it: of a norm weight and bias, of a matrix panels, offset, scale and bias."""
    found: list[Tensor] = []
    for part in layer:
        if isinstance(part, Norm):
            found += [part.weight, part.bias]
            continue
        packed = part.weight
        assert isinstance(packed, PackedWeight) and packed.prepared is not None and part.bias is not None
        panels, offset = packed.prepared
        assert offset is not None, "int8 has one"
        found += [panels, offset, packed.scale, part.bias]
    return found
