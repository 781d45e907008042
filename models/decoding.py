"""An answer decoder's modules as the plain weights of a decode step, collected once for as long as they stay the same.

Knows which module holds what; does not know how a step is computed.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from miss.kernels.decoder_step import Cache, Decoder, Matrix, prepare
from miss.kernels.quant_linear import PackedWeight
from miss.models.cache import KVCache
from miss.models.layers import TextLayer

if TYPE_CHECKING:
    from miss.models.decoder import AnswerDecoder


def collect(decoder: "AnswerDecoder") -> Decoder:
    """The weights as they are now."""
    embeddings, head = decoder.embeddings, decoder.head
    return Decoder(
        embeddings.word.weight,
        embeddings.position.weight,
        embeddings.norm.norm(),
        tuple(layer.weights() for layer in decoder.layers if isinstance(layer, TextLayer)),
        head.transform.matrix(),
        head.norm.norm(),
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
    changes are not `counted`, are collected anew at every step."""

    def __init__(self, decoder: "AnswerDecoder") -> None:
        self.weights = collect(decoder)
        self._tensors = _tensors(self.weights)
        self.counted = not any(t.is_inference() for t in self._tensors)
        self._state = self._now() if self.counted else []
        self.runner = prepare(self.weights) if self.counted else None

    def _now(self) -> list[int]:
        return [t._version for t in self._tensors] + [t.data_ptr() for t in self._tensors]

    @property
    def fresh(self) -> bool:
        return self.counted and self._now() == self._state


def _tensors(weights: Decoder) -> list[Tensor]:
    """Those that someone could change; packed ones are replaced, never changed."""
    found = [weights.words, weights.positions]
    for matrix in weights.matrices():
        found += [] if isinstance(matrix.weight, PackedWeight) else [matrix.weight]
        found += [] if matrix.bias is None else [matrix.bias]
    for norm in weights.norms():
        found += [norm.weight, norm.bias]
    return found
