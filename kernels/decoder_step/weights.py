"""What a decode step is made of: an answer decoder's weights and its cache, as plain tensors.

Knows shapes; does not know modules, or who computes with them.

Shapes: V vocabulary, C width, P positions, S answer slots, L answer length, Q question slots, T question length,
H heads, D head width.
"""

from typing import NamedTuple

from torch import Tensor

from miss.kernels.quant_linear import PackedWeight


class Norm(NamedTuple):
    """Layer normalization: weight, bias (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float


class Matrix(NamedTuple):
    """x W^T + bias: weight (N, K) or packed; bias (N,) or None; panels: `linear.prepare(weight)` of a plain one."""

    weight: Tensor | PackedWeight
    bias: Tensor | None
    panels: Tensor | None = None


class Layer(NamedTuple):
    """One post-norm layer: self-attention, cross-attention, MLP, in the order in which they run."""

    qkv: Matrix
    self_output: Matrix
    self_norm: Norm
    query: Matrix
    cross_output: Matrix
    cross_norm: Norm
    input: Matrix
    output: Matrix
    mlp_norm: Norm


class Decoder(NamedTuple):
    """words (V, C), positions (P, C) and their norm; the layers; transform (C, C), its norm and vocabulary (V, C)."""

    words: Tensor
    positions: Tensor
    norm: Norm
    layers: tuple[Layer, ...]
    transform: Matrix
    transform_norm: Norm
    vocabulary: Matrix
    num_heads: int

    def matrices(self) -> list[Matrix]:
        inner = [m for layer in self.layers for m in layer if isinstance(m, Matrix)]
        return [*inner, self.transform, self.vocabulary]

    def norms(self) -> list[Norm]:
        return [self.norm, *(n for layer in self.layers for n in layer if isinstance(n, Norm)), self.transform_norm]


class Cache(NamedTuple):
    """self_k, self_v (layers, S, L, H, D); cross_k, cross_v (layers, Q, T, H, D); question_lengths int32 (Q,)."""

    self_k: Tensor
    self_v: Tensor
    cross_k: Tensor
    cross_v: Tensor
    question_lengths: Tensor
