"""An encoder's layer in plain PyTorch: the definition that the fast ones must match.

Knows the formulas; does not know speed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.attention.quantised import codes_of
from miss.kernels.attention.reference import without_autocast
from miss.kernels.cross_attention import KV
from miss.kernels.decoder_step.weights import Layer, Matrix, Norm
from miss.kernels.encoder_layer.weights import ImageLayer
from miss.kernels.quant_linear import PackedWeight, unpack
from miss.kernels.registry import accumulator


@without_autocast
def image_layer(x: Tensor, layer: ImageLayer, num_heads: int) -> Tensor:
    y = x.to(accumulator(x.dtype))
    q, k, v = _dense(_norm(y, layer.norm1), layer.qkv).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    (queries, a), (keys, b) = codes_of(q), codes_of(k - k.mean(1, keepdim=True))
    y = y + _dense(_attend(queries * a, keys * b, v, None), layer.output)
    return (y + _mlp(_norm(y, layer.norm2), layer.input, layer.mlp_output)).to(x.dtype)


@without_autocast
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
    y = x.to(accumulator(x.dtype))
    q, k, v = _dense(y, layer.qkv).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    if offsets is None:
        attended = _attend(q, k, v, lengths)
    else:
        parts = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        rows = [_attend(q[None, a:b], k[None, a:b], v[None, a:b], None)[0] for a, b in parts]
        attended = torch.cat([y[:0], *rows])
    y = _norm(y + _dense(attended, layer.self_output), layer.self_norm)
    if source is not None:
        assert index is not None
        q = _dense(y, layer.query).unflatten(-1, (num_heads, -1))
        k, v = (t.to(y)[index.long()] for t in source)
        read = _attend(q if offsets is None else q[:, None], k, v, None)
        y = _norm(y + _dense(read if offsets is None else read[:, 0], layer.cross_output), layer.cross_norm)
    return _norm(y + _mlp(y, layer.input, layer.output), layer.mlp_norm).to(x.dtype)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x), norm.bias.to(x), norm.eps)


def _dense(x: Tensor, matrix: Matrix) -> Tensor:
    """x rounded to codes row by row, times the weight."""
    assert isinstance(matrix.weight, PackedWeight)
    codes, scale = codes_of(x)
    bias = None if matrix.bias is None else matrix.bias.to(x)
    return F.linear(codes * scale, unpack(matrix.weight, x.dtype), bias)


def _mlp(x: Tensor, first: Matrix, second: Matrix) -> Tensor:
    return _dense(F.gelu(_dense(x, first)), second)


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """q (B, T, H, D) over k, v (B, N, H, D) -> (B, T, C)."""
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) * q.shape[-1] ** -0.5
    if lengths is not None:
        hidden = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return torch.einsum("bhtn,bnhd->bthd", scores.softmax(-1).nan_to_num(0.0), v).flatten(-2)
