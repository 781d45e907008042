"""Questions over images: keys and values at hand, or the image's tokens and weights (the absorbed form)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Case, Peer
from miss.benchmarks.inputs import normal, weight
from miss.benchmarks.peers import sdpa
from miss.benchmarks.shapes import IMAGES, Shapes
from miss.kernels.cross_attention import KV, Tokens, cross_attention

_TEXT = 20  # tokens of a question, a round number at BERT's 18
KV_PEERS = (Peer("sdpa_repeated", sdpa.repeated), Peer("sdpa_repeating", sdpa.repeating))


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    encoder = shapes.preset.encoder
    own = encoder.hidden_size // encoder.num_heads
    for dtype in dtypes:
        for width in (64, 32) if shapes.name == "base" else (own,):
            for images, questions in ((1, 1), (1, IMAGES), (4, 4 * IMAGES)):
                yield case(shapes.tokens, images, questions, encoder.num_heads, width, dtype)
        for questions in (1, 3, IMAGES):
            source = shapes.preset.vision.hidden_size
            yield _absorbed(shapes.tokens, questions, encoder.num_heads, own, source, dtype)


def _index(images: int, questions: int, device: torch.device) -> Tensor:
    return torch.arange(questions, dtype=torch.int32, device=device) * images // questions


def case(tokens: int, images: int, questions: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        q = normal(generator, questions, _TEXT, heads, width, dtype=dtype)
        source = KV(*(normal(generator, images, tokens, heads, width, dtype=dtype) for _ in range(2)))
        return q, source, _index(images, questions, generator.device)

    row = heads * width * dtype.itemsize
    return Case(
        "cross_attention", f"{questions} x {_TEXT} over {images} x {tokens} H={heads} D={width}",
        str(dtype).removeprefix("torch."), make, cross_attention, 4.0 * questions * _TEXT * tokens * heads * width,
        reads=(questions * _TEXT + 2 * images * tokens) * row, writes=questions * _TEXT * row, peers=KV_PEERS,
    )  # fmt: skip


def _project_and_attend(q: Tensor, source: Tokens, image_index: Tensor) -> Any:
    """Keys and values in two products, then SDPA on copies."""
    heads = q.shape[2]

    def call() -> Tensor:
        k = torch.nn.functional.linear(source.x, source.w_k).unflatten(-1, (heads, -1))
        v = torch.nn.functional.linear(source.x, source.w_v, source.b_v).unflatten(-1, (heads, -1))
        return sdpa.repeating(q, (k, v), image_index)()

    return call


def _absorbed(tokens: int, questions: int, heads: int, width: int, source: int, dtype: torch.dtype) -> Case:
    """The FLOPs are those of the cheaper form: q W_k, two products with the tokens, W_v; or keys and values first."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        w_k, w_v = (weight(generator, heads * width, source, dtype) for _ in range(2))
        x = normal(generator, 1, tokens, source, dtype=dtype)
        q = normal(generator, questions, _TEXT, heads, width, dtype=dtype)
        bias = normal(generator, heads * width, dtype=dtype, size=0.1)
        return q, Tokens(x, w_k, w_v, bias), _index(1, questions, generator.device)

    rows, inner = questions * _TEXT, heads * width
    return Case(
        "cross_attention_tokens", f"{questions} x {_TEXT} over {tokens} C={source} H={heads} D={width}",
        str(dtype).removeprefix("torch."), make, cross_attention,
        flops=4.0 * min(rows * source * (inner + heads * tokens), tokens * inner * (source + rows)),
        reads=(2 * rows * inner + tokens * source + 2 * inner * source) * dtype.itemsize,
        writes=rows * inner * dtype.itemsize, peers=(Peer("project+sdpa", _project_and_attend),),
    )  # fmt: skip
