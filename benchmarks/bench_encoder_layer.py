"""A whole layer of the image encoder and of the joint encoder over an image, in int8: what lies between its operations.

Its products alone are benched in bench_quant_linear; the peers here are the same operations called one by one, by our
own rows and by PyTorch's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.bench_decoder_step import AnyLayer, laid_out
from miss.benchmarks.cases import Bound, Case, Peer
from miss.benchmarks.inputs import int8_weight, normal
from miss.benchmarks.shapes import NUM_QUESTION_TOKENS, Shapes
from miss.kernels import registry
from miss.kernels.cross_attention import KV
from miss.kernels.decoder_step import Layer, Matrix, Norm
from miss.kernels.encoder_layer import ImageLayer, image_layer, text_layer


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    for dtype in dtypes:
        for count in (1, 8):
            yield _image(shapes, count, dtype)
            yield _text(shapes, count, dtype)


class _Parts:
    """Norms and matrices of one width and dtype."""

    def __init__(self, generator: torch.Generator, width: int, dtype: torch.dtype) -> None:
        self.generator, self.width, self.dtype = generator, width, dtype

    def norm(self) -> Norm:
        gain = 1 + normal(self.generator, self.width, dtype=torch.float32, size=0.1)
        return Norm(gain.to(self.dtype), normal(self.generator, self.width, dtype=self.dtype, size=0.1), 1e-6)

    def dense(self, outputs: int, inputs: int) -> Matrix:
        bias = normal(self.generator, outputs, dtype=self.dtype, size=0.1)
        return Matrix(int8_weight(self.generator, outputs, inputs, True), bias)


def _image(shapes: Shapes, images: int, dtype: torch.dtype) -> Case:
    config = shapes.preset.vision
    width, inner, tokens = config.hidden_size, config.intermediate_size, config.num_positions

    def make(generator: torch.Generator) -> tuple[Tensor, ImageLayer]:
        parts = _Parts(generator, width, dtype)
        layer = ImageLayer(
            *(parts.norm(), parts.dense(3 * width, width), parts.dense(width, width)),
            *(parts.norm(), parts.dense(inner, width), parts.dense(width, inner)),
        )
        return normal(generator, images, tokens, width, dtype=dtype), layer

    products, attended = images * tokens * (4 * width + 2 * inner) * width, images * tokens * tokens * width
    return _case(
        "image_layer", f"{images}x{tokens} tokens C={width}", dtype, make,
        lambda x, layer: image_layer(x, layer, config.num_heads),
        2.0 * products + 4.0 * attended, (4 * width + 2 * inner) * width, images * tokens * width, 0,
    )  # fmt: skip


def _text(shapes: Shapes, rows: int, dtype: torch.dtype) -> Case:
    config, tokens = shapes.preset.encoder, NUM_QUESTION_TOKENS
    width, inner, heads, keys = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        shapes.preset.vision.num_positions,
    )

    def make(generator: torch.Generator) -> tuple[Tensor, Layer, KV, Tensor]:
        parts = _Parts(generator, width, dtype)
        layer = Layer(
            *(parts.dense(3 * width, width), parts.dense(width, width), parts.norm()),
            *(parts.dense(width, width), parts.dense(width, width), parts.norm()),
            *(parts.dense(inner, width), parts.dense(width, inner), parts.norm()),
        )
        k, v = (normal(generator, 1, heads, keys, width // heads, dtype=dtype).transpose(1, 2) for _ in range(2))
        index = torch.zeros(rows, dtype=torch.int32, device=generator.device)
        return normal(generator, rows, tokens, width, dtype=dtype), layer, KV(k, v), index

    products, attended = rows * tokens * (6 * width + 2 * inner) * width, rows * tokens * (tokens + keys) * width
    return _case(
        "text_layer", f"{rows}x{tokens} tokens over {keys} C={width}", dtype, make,
        lambda x, layer, source, index: text_layer(x, layer, heads, source=source, index=index),
        2.0 * products + 4.0 * attended, (6 * width + 2 * inner) * width,
        rows * tokens * width, 2 * keys * width,
    )  # fmt: skip


def _case(
    op: str, shape: str, dtype: torch.dtype, make: Any, call: Any, flops: float, weights: int, numbers: int, read: int
) -> Case:
    single = {op: "composed"}
    plain = {o.name: "torch" for o in registry.OPS.values() if "torch" in o.names} | single
    size = dtype.itemsize
    return Case(
        op, shape, str(dtype).removeprefix("torch.") + "/w8a8", make, call, flops,
        reads=float(weights + (numbers + read) * size), writes=float(numbers * size), caches=("warm",),
        peers=(Peer("single operations", _with(single, call)), Peer("rows of torch", _with(plain, call))),
        kind="int8", tolerance=0.1, bind=_with({}, call),
    )  # fmt: skip


def _with(choice: dict[str, str], call: Any) -> Any:
    def bind(x: Tensor, layer: AnyLayer, *rest: Any) -> Bound:
        ready = laid_out(layer)

        def run() -> Tensor:
            with registry.use(**choice):
                return call(x, ready, *rest)  # type: ignore[no-any-return]

        return run if choice else lambda: call(x, ready, *rest)

    return bind
