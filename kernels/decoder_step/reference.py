"""A decode step in plain PyTorch: the definition that the fast ones must match.

Knows the formulas; does not know speed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.attention.reference import without_autocast
from miss.kernels.decoder_step.composed import nothing
from miss.kernels.decoder_step.weights import Cache, Decoder, Layer, Matrix, Norm
from miss.kernels.linear_top_k.reference import best
from miss.kernels.quant_linear import PackedWeight, unpack
from miss.kernels.quant_linear import reference as quant_linear
from miss.kernels.quant_linear.fp8 import reference as fp8_linear
from miss.kernels.registry import accumulator


@without_autocast
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
    acc = accumulator(words.dtype)
    slots, positions, questions = slots.long(), positions.long(), questions.long()
    x = _norm(words[tokens].to(acc) + decoder.positions[positions].to(acc), decoder.norm)
    for i, layer in enumerate(decoder.layers):
        x = _layer(x, layer, cache, i, decoder.num_heads, slots, positions, questions)
    states = _norm(F.gelu(_dense(x, decoder.transform)), decoder.transform_norm)
    if num_best == 0:
        return states.to(words.dtype), *nothing(states)
    return states.to(words.dtype), *best(_dense(states, decoder.vocabulary), num_best)


def _layer(
    x: Tensor, layer: Layer, cache: Cache, i: int, heads: int, slots: Tensor, positions: Tensor, questions: Tensor
) -> Tensor:
    q, k, v = _dense(x, layer.qkv).unflatten(-1, (3, heads, -1)).unbind(-3)
    cache.self_k[i][slots, positions] = k.to(cache.self_k.dtype)
    cache.self_v[i][slots, positions] = v.to(cache.self_v.dtype)
    attended = _attend(q, cache.self_k[i][slots], cache.self_v[i][slots], positions + 1)
    x = _norm(x + _dense(attended, layer.self_output), layer.self_norm)
    q = _dense(x, layer.query).unflatten(-1, (heads, -1))
    lengths = cache.question_lengths[questions]
    read = _attend(q, cache.cross_k[i][questions], cache.cross_v[i][questions], lengths)
    x = _norm(x + _dense(read, layer.cross_output), layer.cross_norm)
    return _norm(x + _dense(F.gelu(_dense(x, layer.input)), layer.output), layer.mlp_norm)


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """q (R, H, D) over the first lengths (R,) of k, v (R, N, H, D) -> (R, C); zeros where there is nothing to see."""
    hidden = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
    scores = torch.einsum("rhd,rnhd->rhn", q, k.to(q)) * q.shape[-1] ** -0.5
    shares = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1).nan_to_num(0.0)
    return torch.einsum("rhn,rnhd->rhd", shares, v.to(q)).flatten(1)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x), norm.bias.to(x), norm.eps)


def _dense(x: Tensor, matrix: Matrix) -> Tensor:
    weight, bias, _ = matrix
    if not isinstance(weight, PackedWeight):
        return F.linear(x, weight.to(x), None if bias is None else bias.to(x))
    if weight.scheme == "fp8":
        return fp8_linear(x, weight.data, weight.scale, bias)
    if weight.w8a8:
        return quant_linear.dynamic(x, weight.data, weight.scale, bias, None, None)
    return F.linear(x, unpack(weight, x.dtype), None if bias is None else bias.to(x))
