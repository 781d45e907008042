"""An answer decoder's modules as the plain weights of a decode step, collected once for as long as they stay the same.

Knows which module holds what; does not know how a step is computed.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from miss.kernels.decoder_step import Cache, Decoder, Layer, Matrix, Norm, prepare
from miss.kernels.quant_linear import PackedWeight
from miss.models.cache import KVCache
from miss.models.layers import LayerNorm, TextLayer
from miss.models.linear import Linear, QuantLinear

if TYPE_CHECKING:
    from miss.models.decoder import AnswerDecoder


def collect(decoder: "AnswerDecoder") -> Decoder:
    """The weights as they are now."""
    embeddings, head = decoder.embeddings, decoder.head
    return Decoder(
        embeddings.word.weight,
        embeddings.position.weight,
        _norm(embeddings.norm),
        tuple(_layer(layer) for layer in decoder.layers if isinstance(layer, TextLayer)),
        _matrix(head.transform),
        _norm(head.norm),
        vocabulary(decoder),
        decoder.config.num_heads,
    )


def vocabulary(decoder: "AnswerDecoder") -> Matrix:
    """The matrix of the last product: the word table, or its packed form where there is one."""
    if decoder.packed_vocabulary is not None:
        return Matrix(decoder.packed_vocabulary, decoder.head.bias)
    table, panels = decoder.embeddings.word.weight, decoder.vocabulary_panels
    return Matrix(table, decoder.head.bias, None if panels is None else panels.of(table))


def cache_of(cache: KVCache) -> Cache:
    return Cache(cache.self_k, cache.self_v, cache.cross_k, cache.cross_v, cache.question_lengths)


class Laid:
    """A decoder's weights and what a step's fastest implementation made of them; stale once one of them moves or
    changes in place. As with `Panels`, a change through `.data` goes unseen, and tensors made in inference mode, whose
    changes are not counted, are collected anew at every step."""

    def __init__(self, decoder: "AnswerDecoder") -> None:
        self.weights = collect(decoder)
        self._tensors = _tensors(self.weights)
        self._counted = not any(t.is_inference() for t in self._tensors)
        self._state = self._now() if self._counted else []
        self.runner = prepare(self.weights) if self._counted else None

    def _now(self) -> list[int]:
        # 0.1 us a tensor: 15 us of a step of base, whose weights take 4 ms to read.
        return [t._version for t in self._tensors] + [t.data_ptr() for t in self._tensors]

    @property
    def fresh(self) -> bool:
        return self._counted and self._now() == self._state


def _matrix(module: Linear | QuantLinear) -> Matrix:
    if isinstance(module, QuantLinear):
        return Matrix(module.packed, module.bias)
    return Matrix(module.weight, module.bias, module.panels())


def _norm(module: LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


def _layer(layer: TextLayer) -> Layer:
    own, cross, mlp = layer.self_attention, layer.cross_attention, layer.mlp
    return Layer(
        *(_matrix(own.qkv), _matrix(own.output), _norm(own.norm)),
        *(_matrix(cross.query), _matrix(cross.output), _norm(cross.norm)),
        *(_matrix(mlp.input), _matrix(mlp.output), _norm(mlp.norm)),
    )


def _tensors(weights: Decoder) -> list[Tensor]:
    """Those that someone could change; packed ones are replaced, never changed."""
    found = [weights.words, weights.positions]
    for matrix in weights.matrices():
        found += [] if isinstance(matrix.weight, PackedWeight) else [matrix.weight]
        found += [] if matrix.bias is None else [matrix.bias]
    for norm in weights.norms():
        found += [norm.weight, norm.bias]
    return found
