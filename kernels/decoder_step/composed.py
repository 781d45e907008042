"""A decode step as a sequence of single operations, each of which chooses its own implementation.

Knows the order of the operations; does not know how any of them is computed.
"""

from torch import Tensor
from torch.nn import functional as F

from miss.kernels.cross_attention import KV, cross_attention
from miss.kernels.decode_attention import decode_attention_append
from miss.kernels.decoder_step.weights import Cache, Decoder, Layer, Matrix, Norm
from miss.kernels.gelu_mlp import gelu_mlp
from miss.kernels.layer_norm import add_layer_norm, layer_norm
from miss.kernels.linear import linear
from miss.kernels.linear_top_k import linear_top_k
from miss.kernels.quant_linear import (
    PackedWeight,
    QuantRows,
    quant_linear,
    quant_linear_rows,
    quant_linear_rows_quantised,
    quantise_rows,
)
from miss.kernels.registry import accumulator


def forward(
    words: Tensor,
    decoder: Decoder,
    cache: Cache,
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    questions: Tensor,
    num_best: int,
    runner: object | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _norm(F.embedding(tokens, words) + F.embedding(positions.long(), decoder.positions), decoder.norm)
    for i, layer in enumerate(decoder.layers):
        x = _layer(x, layer, cache, i, decoder.num_heads, slots, positions, questions)
    states = _norm(_dense(x, decoder.transform, gelu=True), decoder.transform_norm)
    if num_best == 0:
        return states, *nothing(states)
    values, ids, total = linear_top_k(
        states, decoder.vocabulary.weight, decoder.vocabulary.bias, num_best, decoder.vocabulary.panels
    )
    return states, values, ids, total


def nothing(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values, ids and total where none is wanted."""
    values = states.new_empty(len(states), 0, dtype=accumulator(states.dtype))
    return values, values.long(), values.new_empty(0)


def _layer(
    x: Tensor, layer: Layer, cache: Cache, i: int, heads: int, slots: Tensor, positions: Tensor, questions: Tensor
) -> Tensor:
    q, k, v = _dense(x, layer.qkv).unflatten(-1, (3, heads, -1)).unbind(-3)
    attended = decode_attention_append(q, k, v, cache.self_k[i], cache.self_v[i], slots, positions)
    x = _add_norm(_dense(attended.flatten(-2), layer.self_output), x, layer.self_norm)
    q = _dense(x, layer.query).unflatten(-1, (heads, -1))[:, None]
    read = cross_attention(q, KV(cache.cross_k[i], cache.cross_v[i]), questions, cache.question_lengths)[:, 0]
    x = _add_norm(_dense(read.flatten(-2), layer.cross_output), x, layer.cross_norm)
    return _add_norm(_mlp(x, layer.input, layer.output), x, layer.mlp_norm)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def _add_norm(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)[0]


def _dense(x: Tensor, matrix: Matrix, gelu: bool = False) -> Tensor:
    weight, bias, panels = matrix
    if not isinstance(weight, PackedWeight):
        return gelu_mlp(x, weight, bias, panels) if gelu else linear(x, weight, bias, None, panels)
    if gelu and weight.w8a8:
        return quant_linear_rows(quantise_rows(x), weight, bias, gelu=True, dtype=x.dtype)
    y = quant_linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def _mlp(x: Tensor, first: Matrix, second: Matrix) -> Tensor:
    """Between two W8A8 products the numbers pass as codes."""
    if isinstance(first.weight, PackedWeight) and isinstance(second.weight, PackedWeight):
        if first.weight.w8a8 and second.weight.w8a8:
            rows: QuantRows = quant_linear_rows_quantised(quantise_rows(x), first.weight, first.bias, gelu=True)
            return quant_linear_rows(rows, second.weight, second.bias, dtype=x.dtype)
    return _dense(_dense(x, first, gelu=True), second)
