"""What a call of an operation costs at least: operations of arithmetic, bytes read and bytes written.

Knows the arguments of every table that answering goes through; does not know who runs it, or how fast.

Counted as in the benchmarks: a multiply-add is two operations, every input is read and every output written once, and
nothing lies between. A weight that comes in a second layout (`panels`) is read once, as that.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miss.kernels.cross_attention import KV
from miss.kernels.decoder_step.weights import Cache, Decoder, Layer, Matrix
from miss.kernels.encoder_layer.weights import ImageLayer, matrices
from miss.kernels.quant_linear import PackedWeight


@dataclass(frozen=True)
class Cost:
    """flops; bytes read and written; `kind`: the arithmetic whose ceiling counts, fp32, bf16, fp16 or int8."""

    flops: float
    reads: float
    writes: float
    kind: str


_KINDS = {torch.float64: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NORM, _QUANTISE = 8.0, 3.0  # operations a number, as benchmarks/bench_layer_norm.py counts them


def _linear(x: Tensor, weight: Tensor, *_: Any) -> float:
    return 2.0 * x.numel() * weight.shape[0]


def _quant(x: Tensor, data: Tensor, scale: Tensor, *_: Any) -> float:
    return 2.0 * x.numel() * scale.shape[0]


def _after_scale(row_scale: Tensor, x: Tensor, data: Tensor, scale: Tensor, *_: Any) -> float:
    return 2.0 * x.numel() * scale.shape[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, *_: Any) -> float:
    batch, queries, heads, width = q.shape
    keys = float(batch * k.shape[1]) if lengths is None else float(lengths.sum())
    seen = (queries + 1) / 2 / queries if causal and queries == k.shape[1] else 1.0
    return 4.0 * queries * keys * heads * width * seen


def _coded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    return _attention(q, k, v, None, False)


def _varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, causal: bool, *_: Any) -> float:
    lengths = offsets.diff().double()
    pairs = float((lengths * ((lengths + 1) / 2 if causal else lengths)).sum())
    return 4.0 * pairs * q.shape[-2] * q.shape[-1]


def _cross(q: Tensor, k: Tensor, v: Tensor, index: Tensor, lengths: Tensor | None, *_: Any) -> float:
    keys = float(len(q) * k.shape[1]) if lengths is None else float(lengths[index].sum())
    return 4.0 * q.shape[1] * keys * q.shape[2] * q.shape[3]


def _decode(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, *_: Any) -> float:
    return 4.0 * float(lengths.sum()) * q.shape[1] * q.shape[2]


def _decode_append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, *_: Any
) -> float:
    return _decode(q, k_cache, v_cache, slots, positions + 1)


def _patch(weight: Tensor, bias: Tensor, pixels: Tensor, *_: Any) -> float:
    patches = pixels.shape[0] * (pixels.shape[1] // weight.shape[-2]) * (pixels.shape[2] // weight.shape[-1])
    return 2.0 * patches * weight.numel()


def _step(
    words: Tensor, decoder: Decoder, cache: Cache, tokens: Tensor, slots: Tensor, at: Tensor, asked: Tensor, *rest: Any
) -> float:
    """Products and attention; norms are a 500th of them."""
    products = sum(math.prod(m.weight.shape) for m in _matrices(decoder, rest[0]))
    keys = float((at + 1).sum() + cache.question_lengths[asked.long()].sum())
    return 2.0 * len(tokens) * products + 4.0 * len(decoder.layers) * keys * words.shape[1]


def _step_traffic(
    words: Tensor, decoder: Decoder, cache: Cache, tokens: Tensor, slots: Tensor, at: Tensor, asked: Tensor, *rest: Any
) -> tuple[float, float]:
    """(bytes read, bytes written): every weight once, of the caches what is attended to, the new keys and values."""
    matrices, norms = _matrices(decoder, rest[0]), decoder.norms()
    read = [m.weight for m in matrices] + [m.bias for m in matrices if m.bias is not None]
    weights = sum(t.nbytes for t in [*read, *(n.weight for n in norms), *(n.bias for n in norms)])
    a_token = 2.0 * len(decoder.layers) * words.shape[1] * words.element_size()
    deepest = torch.zeros(cache.self_k.shape[1]).scatter_reduce_(0, slots.cpu().long(), at.cpu() + 1.0, "amax")
    states = float(cache.question_lengths[asked.long().unique()].sum())
    embedded = 2.0 * len(tokens) * words.shape[1] * words.element_size()
    return weights + embedded + (float(deepest.sum()) + states) * a_token, len(tokens) * a_token


def _image_layer(x: Tensor, layer: ImageLayer, num_heads: int) -> float:
    products = sum(math.prod(m.weight.shape) for m in matrices(layer))
    return x.numel() / x.shape[-1] * (2.0 * products + 4.0 * x.shape[1] * x.shape[2])


def _text_layer(
    x: Tensor,
    layer: Layer,
    num_heads: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    longest: int,
    source: KV | None,
    index: Tensor | None,
) -> float:
    """Products and attention, as `_step`."""
    width, tokens = x.shape[-1], x.numel() / x.shape[-1]
    products = sum(math.prod(m.weight.shape) for m in _used(layer, source))
    seen = x.shape[1] if offsets is None else float(offsets.diff().double().square().sum()) / max(tokens, 1.0)
    keys = seen + (0 if source is None else source.k.shape[1])
    return tokens * (2.0 * products + 4.0 * keys * width)


def _used(layer: Layer, source: KV | None) -> list[Matrix]:
    crossed = (layer.query, layer.cross_output)
    return [m for m in matrices(layer) if source is not None or not any(m is one for one in crossed)]


def _layer_traffic(args: tuple[Any, ...], writes: float) -> tuple[float, float]:
    """(bytes read, bytes written): weights, x, and of an image what is attended to, each once."""
    x, layer = args[:2]
    source, index = args[6:8] if len(args) > 3 else (None, None)
    used = _used(layer, source) if len(args) > 3 else matrices(layer)
    reads = (
        float(x.nbytes) + sum(m.weight.nbytes for m in used) + sum(m.bias.nbytes for m in used if m.bias is not None)
    )
    if source is not None and len(source.k):
        reads += float(len(index.unique())) * 2.0 * source.k[0].nbytes
    return reads, writes


def _matrices(decoder: Decoder, num_best: int) -> list[Matrix]:
    """Those that a step multiplies with: the vocabulary's only where best words are wanted."""
    return decoder.matrices() if num_best else decoder.matrices()[:-1]


def _norm(x: Tensor, *_: Any) -> float:
    return _NORM * x.numel()


def _norm_quantised(x: Tensor, *_: Any) -> float:
    return (_NORM + _QUANTISE) * x.numel()


def _contrast(student: Tensor, teacher: Tensor, batch: Tensor, queue: Tensor, *_: Any) -> float:
    return 4.0 * student.numel() * (len(batch) + len(queue))


def _average(first: Tensor, averages: list[Tensor], *_: Any) -> float:
    return 3.0 * sum(a.numel() for a in averages)


def _nothing(*_: Any) -> float:
    return 0.0


_FLOPS: dict[str, Callable[..., float]] = {
    "patch_embed": _patch,
    "layer_norm": _norm,
    "add_layer_norm": _norm,
    "layer_norm_quantised": _norm_quantised,
    "add_layer_norm_quantised": _norm_quantised,
    "attention": _attention,
    "attention_quantised": _coded,
    "attention_varlen": _varlen,
    "cross_attention": _cross,
    "decode_attention": _decode,
    "decode_attention_append": _decode_append,
    "linear": _linear,
    "linear_into": _linear,
    "gelu_mlp": _linear,
    "quant_linear": _quant,
    "quant_linear_w8a8": _quant,
    "quant_linear_into": _quant,
    "quant_linear_rows": _after_scale,
    "quant_linear_rows_quantised": _after_scale,
    "quantise_rows": lambda x: _QUANTISE * x.numel(),
    "quant_embedding": _nothing,
    "linear_top_k": _linear,
    "linear_top_k_w8a8": _quant,
    "decoder_step": _step,
    "image_layer": _image_layer,
    "text_layer": _text_layer,
    "contrastive": _contrast,
    "hard_negatives": _linear,
    "ema": _average,
    "kv_append": _nothing,
    "kv_reorder": _nothing,
}
_INT8 = (
    "quant_linear_w8a8",
    "quant_linear_into",
    "quant_linear_rows",
    "quant_linear_rows_quantised",
    "linear_top_k_w8a8",
    "image_layer",
    "text_layer",
)
# Where arguments end that are read once each: what comes after are other layouts of the same weight.
_READ = {
    "linear": 4,
    "linear_into": 3,
    "gelu_mlp": 3,
    "quant_linear": 5,
    "quant_linear_w8a8": 4,
    "quant_linear_into": 4,
    "quant_linear_rows": 6,
    "quant_linear_rows_quantised": 5,
    "linear_top_k": 3,
    "linear_top_k_w8a8": 4,
}


def known(op: str) -> bool:
    """Whether calls of the operation have a cost here."""
    return op in _FLOPS


def cost(op: str, args: tuple[Any, ...], result: Any) -> Cost:
    """Of one call of the table `op`, with the arguments that its implementations take and what came of it.

    Raises:
        ValueError: an operation that is not known here.
    """
    if op not in _FLOPS:
        raise ValueError(f"no cost is known of {op}; known: {', '.join(_FLOPS)}")
    writes = float(sum(t.nbytes for t in _tensors(args[-1] if op.endswith("_into") else result)))
    kind = "int8" if op in _INT8 or _is_int8_step(args) else "fp32" if "norm" in op or op == "ema" else _kind(args)
    return Cost(_FLOPS[op](*args), *_traffic(op, args, writes), kind)


def _traffic(op: str, args: tuple[Any, ...], writes: float) -> tuple[float, float]:
    """(bytes read, bytes written)."""
    if op == "decode_attention":
        q, k, _, slots, lengths = args[:5]
        deepest = torch.zeros(len(k), dtype=lengths.dtype).scatter_reduce_(0, slots.cpu().long(), lengths.cpu(), "amax")
        return q.nbytes + 2.0 * float(deepest.sum()) * k.shape[2] * k.shape[3] * k.element_size(), writes
    if op == "decode_attention_append":
        q, new_k, _, k, v, slots, positions = args[:7]
        return _traffic("decode_attention", (q, k, v, slots, positions + 1), writes + 2.0 * new_k.nbytes)
    if op == "cross_attention":
        q, k, v, index = args[:4]
        return q.nbytes + float(len(index.unique())) * (k[0].nbytes + v[0].nbytes) if len(k) else 0.0, writes
    if op == "decoder_step":
        reads, appended = _step_traffic(*args)
        return reads, writes + appended
    if op in ("image_layer", "text_layer"):
        return _layer_traffic(args, writes)
    if op == "kv_append":
        moved = float(args[2].nbytes + args[3].nbytes)
        return moved, moved
    if op == "kv_reorder":
        moved = 2.0 * len(args[2]) * args[0][0].nbytes
        return moved, moved
    if op == "ema":  # the first argument is the list's first, too
        return float(sum(t.nbytes for t in _tensors(args[1:]))), float(sum(t.nbytes for t in args[1]))
    if op == "quant_embedding":
        return writes, writes
    return float(sum(t.nbytes for t in _tensors(args[: _READ.get(op, len(args))]))), writes


def _is_int8_step(args: tuple[Any, ...]) -> bool:
    if len(args) < 2 or not isinstance(args[1], Decoder):
        return False
    return any(isinstance(m.weight, PackedWeight) and m.weight.w8a8 for m in args[1].matrices())


def _kind(args: tuple[Any, ...]) -> str:
    return next((_KINDS[t.dtype] for t in _tensors(args) if t.dtype in _KINDS), "fp32")


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
