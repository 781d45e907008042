"""A decode step of the whole answer decoder, the head included: how near it comes to reading every weight once.

The weights (a 123 MB in int8 at base) are far more than the caches hold, so that every step reads them from memory.
The largest logits and the log-sum-exp are checked with the states; which word it is has its tests.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from miss.benchmarks.cases import Bound, Case, Peer
from miss.benchmarks.inputs import int8_weight, normal, weight
from miss.benchmarks.shapes import NUM_QUESTION_TOKENS, Shapes
from miss.kernels import registry
from miss.kernels.decoder_step import Cache, Decoder, Layer, Matrix, Norm, decoder_step, prepare
from miss.kernels.encoder_layer import ImageLayer
from miss.kernels.linear import prepare as lay_out
from miss.kernels.quant_linear import PackedWeight
from miss.kernels.quant_linear import prepare as prepare_packed
from miss.models.config import TextConfig

_POSITION, _LENGTH = 4, 20
_ROWS = (1, 3, 8)  # one answer; three beams of one question; a batch
AnyLayer = TypeVar("AnyLayer", Layer, ImageLayer)
Inputs = tuple[Decoder, Cache, Tensor, Tensor, Tensor, Tensor]


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    for dtype in dtypes:
        for packed in (False, True):
            for rows in _ROWS:
                yield _case(shapes, rows, dtype, packed)


def _decoder(generator: torch.Generator, config: TextConfig, dtype: torch.dtype, packed: bool) -> Decoder:
    width, inner = config.hidden_size, config.intermediate_size

    def norm() -> Norm:
        gain = 1 + normal(generator, width, dtype=torch.float32, size=0.1)
        return Norm(gain.to(dtype), normal(generator, width, dtype=dtype, size=0.1), config.layer_norm_eps)

    def dense(outputs: int, inputs: int) -> Matrix:
        one = int8_weight(generator, outputs, inputs, True) if packed else weight(generator, outputs, inputs, dtype)
        return Matrix(one, normal(generator, outputs, dtype=dtype, size=0.1))

    def layer() -> Layer:
        return Layer(
            *(dense(3 * width, width), dense(width, width), norm()),
            *(dense(width, width), dense(width, width), norm()),
            *(dense(inner, width), dense(width, inner), norm()),
        )

    tables = (normal(generator, count, width, dtype=dtype) for count in (config.vocab_size, config.max_positions))
    layers = tuple(layer() for _ in range(config.num_layers))
    head = dense(width, width), norm(), dense(config.vocab_size, width)
    return Decoder(next(tables), next(tables), norm(), layers, *head, config.num_heads)


def _matrix_laid_out(m: Matrix) -> Matrix:
    if isinstance(m.weight, PackedWeight):
        return m._replace(weight=prepare_packed(m.weight))
    return m._replace(panels=lay_out(m.weight))


def laid_out(layer: AnyLayer) -> AnyLayer:
    """A layer whose weights the kernels take."""
    return type(layer)._make(_matrix_laid_out(p) if isinstance(p, Matrix) else p for p in layer)


def _laid_out(decoder: Decoder) -> Decoder:
    return decoder._replace(
        layers=tuple(laid_out(one) for one in decoder.layers),
        transform=_matrix_laid_out(decoder.transform),
        vocabulary=_matrix_laid_out(decoder.vocabulary),
    )


def _results(decoder: Decoder, runner: object | None, cache: Cache, *index: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, slots, positions, questions = index
    states, values, _, total = decoder_step(decoder, cache, tokens, slots, positions, questions, 1, runner)
    return states, values, total


def _bind(decoder: Decoder, *rest: Any) -> Bound:
    laid = _laid_out(decoder)
    runner = prepare(laid)
    return lambda: _results(laid, runner, *rest)


def _rows_of_torch(decoder: Decoder, *rest: Any) -> Bound:
    """The same operations, each by PyTorch's own."""
    plain = {op.name: "torch" for op in registry.OPS.values() if "torch" in op.names} | {"decoder_step": "composed"}

    def run() -> tuple[Tensor, Tensor, Tensor]:
        with registry.use(**plain):
            return _results(decoder, None, *rest)

    return run


def _case(shapes: Shapes, rows: int, dtype: torch.dtype, packed: bool) -> Case:
    config = shapes.preset.decoder
    heads, width, inner = config.num_heads, config.hidden_size, config.intermediate_size
    questions = 1 if rows == 3 else rows
    attended = config.num_layers * width * (rows * (_POSITION + 1 + NUM_QUESTION_TOKENS))
    a_token = 2 * config.num_layers * width * dtype.itemsize  # of the caches
    products = config.num_layers * (6 * width * width + 2 * width * inner) + width * (width + config.vocab_size)

    def make(generator: torch.Generator) -> Inputs:
        def cached(count: int, length: int) -> Tensor:
            return normal(generator, config.num_layers, count, length, heads, width // heads, dtype=dtype)

        device = generator.device
        row = torch.arange(rows, dtype=torch.int32, device=device)
        lengths = torch.full((questions,), NUM_QUESTION_TOKENS, dtype=torch.int32, device=device)
        caches = (cached(rows, _LENGTH), cached(rows, _LENGTH), cached(questions, 35), cached(questions, 35))
        tokens = torch.randint(config.vocab_size, (rows,), generator=generator, device=device)
        index = (tokens, row, torch.full_like(row, _POSITION), row * questions // rows)
        return _decoder(generator, config, dtype, packed), Cache(*caches, lengths), *index

    size = 1 if packed else dtype.itemsize
    return Case(
        "decoder_step", f"{rows} rows, {config.num_layers} layers C={width} V={config.vocab_size}",
        str(dtype).removeprefix("torch.") + ("/w8a8" if packed else ""), make,
        lambda decoder, *rest: _results(decoder, None, *rest), 2.0 * rows * products + 4.0 * attended,
        reads=float(products * size + a_token * (rows * (_POSITION + 1) + questions * NUM_QUESTION_TOKENS)),
        writes=float(rows * (width * dtype.itemsize + a_token)), caches=("warm",),
        peers=(Peer("rows of torch", _rows_of_torch),), kind="int8" if packed else None,
        # Over all layers bfloat16's roundings add up, and a code that rounds the other way is a 127th off.
        tolerance=1e-4 if dtype == torch.float32 and not packed else 0.1, bind=_bind,
    )  # fmt: skip
