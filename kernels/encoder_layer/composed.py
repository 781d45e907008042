"""An encoder's layer as a sequence of single operations, each of which chooses its own implementation.

Knows the order of the operations; does not know how any of them is computed.
"""

from torch import Tensor

from miss.kernels.attention import attention, attention_quantised, attention_varlen
from miss.kernels.cross_attention import KV, cross_attention
from miss.kernels.decoder_step.weights import Layer, Matrix, Norm
from miss.kernels.encoder_layer.weights import ImageLayer
from miss.kernels.layer_norm import add_layer_norm, add_layer_norm_quantised, layer_norm_quantised
from miss.kernels.quant_linear import (
    PackedWeight,
    QuantRows,
    quant_linear,
    quant_linear_rows,
    quant_linear_rows_quantised,
)


def image_layer(x: Tensor, layer: ImageLayer, num_heads: int) -> Tensor:
    rows = layer_norm_quantised(x, *layer.norm1)
    q, k, v = _of_codes(rows, layer.qkv, x).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    attended = _of_numbers(attention_quantised(q, k, v).flatten(-2), layer.output)
    rows, _, summed = add_layer_norm_quantised(attended, x, *layer.norm2, keep_y=False)
    return _of_codes(_gelu(rows, layer.input), layer.mlp_output, x, summed)


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
    q, k, v = _of_numbers(x, layer.qkv).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    out = attention(q, k, v, lengths) if offsets is None else attention_varlen(q, k, v, offsets, max_length)
    y, rows = _add_norm(_of_numbers(out.flatten(-2), layer.self_output), x, layer.self_norm)
    if source is not None:
        assert index is not None, "the public function has looked"
        q = _of_codes(rows, layer.query, x).unflatten(-1, (num_heads, -1))
        read = cross_attention(q[:, None] if offsets is not None else q, source, index).flatten(-2)
        read = read[:, 0] if offsets is not None else read
        y, rows = _add_norm(_of_numbers(read, layer.cross_output), y, layer.cross_norm)
    out = _of_codes(_gelu(rows, layer.input), layer.output, x)
    return add_layer_norm(out, y, *layer.mlp_norm)[0]


def _of_numbers(x: Tensor, matrix: Matrix) -> Tensor:
    return quant_linear(x, _packed(matrix), matrix.bias)


def _of_codes(rows: QuantRows, matrix: Matrix, like: Tensor, residual: Tensor | None = None) -> Tensor:
    return quant_linear_rows(rows, _packed(matrix), matrix.bias, residual=residual, dtype=like.dtype)


def _gelu(rows: QuantRows, matrix: Matrix) -> QuantRows:
    return quant_linear_rows_quantised(rows, _packed(matrix), matrix.bias, gelu=True)


def _add_norm(x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, QuantRows]:
    """The norm of the sum as numbers, which the next sum takes, and as codes, which the next product takes."""
    rows, y, _ = add_layer_norm_quantised(x, residual, *norm, keep_y=True)
    assert y is not None
    return y, rows


def _packed(matrix: Matrix) -> PackedWeight:
    assert isinstance(matrix.weight, PackedWeight), "the public function has looked"
    return matrix.weight
