"""The keys and values of all cross-attention layers as one product over the source.

Owns these weights for every layer (so that a sharding engine gathers them once); does not know what the source is:
image tokens for the joint encoder, question states for the decoder.
"""

import torch
from torch import Tensor

from miss.kernels.cross_attention import KV
from miss.kernels.linear import linear_into
from miss.kernels.memory import huge_zeros
from miss.models.config import TextConfig
from miss.models.linear import Linear

Shape = tuple[int, int, int, int]  # layers, 2, heads, head width


class CrossKV(Linear):
    """weight (layers * 2 * C, source width): layer 0 K, layer 0 V, layer 1 K, … bias (layers * 2 * C,)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.source_width, config.num_layers * 2 * config.hidden_size)
        self.shape: Shape = (config.num_layers, 2, config.num_heads, config.hidden_size // config.num_heads)

    def layers(self, source: Tensor) -> list[KV]:
        """source (I, N, S) -> per layer K and V (I, N, H, D), views of one product."""
        return split_layers(self.product(source))

    def product(self, source: Tensor, out: Tensor | None = None) -> Tensor:
        """source (I, N, S) -> (I, N, layers, 2, H, D), in `out` where it is given: inference's, of any strides."""
        if out is None and in_order(source):
            return self(source).unflatten(-1, self.shape)
        out = room_for(source, self.shape) if out is None else out
        return linear_into(source, self.weight, self.bias, out, self.panels())


def in_order(source: Tensor) -> bool:
    """Whether the product is left as it comes, token by token: for its gradient, and where a kernel writes no other."""
    return source.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()


def room_for(source: Tensor, shape: Shape) -> Tensor:
    """Memory for a product of `source` (I, N, S), see `new_room`."""
    return new_room(source, source.shape[0], source.shape[1], shape)


def new_room(like: Tensor, num_images: int, num_tokens: int, shape: Shape, stays: bool = False) -> Tensor:
    """Memory for keys and values as (I, N, layers, 2, H, D), in which a head's tokens lie one after the other.

    Token by token they lie 36 KB apart (base, bfloat16), each in a page of its own: cross-attention of one question
    over 577 tokens then takes 330 us a layer on two Zen 4 cores, of which its products are 70. `stays`: in huge pages.
    """
    layers, two, heads, width = shape
    sizes = (num_images, layers, two, heads, num_tokens, width)
    room = huge_zeros(sizes, like.dtype) if stays and like.device.type == "cpu" else like.new_empty(sizes)
    return room.permute(0, 4, 1, 2, 3, 5)


def split_layers(projected: Tensor) -> list[KV]:
    """(I, N, layers, 2, H, D) -> per layer KV of (I, N, H, D) views."""
    return [KV(*layer.unbind(2)) for layer in projected.unbind(2)]
