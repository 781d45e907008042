"""The keys and values of all cross-attention layers as one product over the source.

Owns these weights for every layer (so that a sharding engine gathers them once); does not know what the source is:
image tokens for the joint encoder, question states for the decoder.
"""

from torch import Tensor

from miss.kernels.cross_attention import KV
from miss.models.config import TextConfig
from miss.models.linear import Linear


class CrossKV(Linear):
    """weight (layers * 2 * C, source width): layer 0 K, layer 0 V, layer 1 K, … bias (layers * 2 * C,)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.source_width, config.num_layers * 2 * config.hidden_size)
        self.shape = (config.num_layers, 2, config.num_heads, config.hidden_size // config.num_heads)

    def layers(self, source: Tensor) -> list[KV]:
        """source (I, N, S) -> per layer K and V (I, N, H, D), views of one product."""
        return split_layers(self(source).unflatten(-1, self.shape))


def split_layers(projected: Tensor) -> list[KV]:
    """(I, N, layers, 2, H, D) -> per layer KV of (I, N, H, D) views."""
    return [KV(*layer.unbind(2)) for layer in projected.unbind(2)]
