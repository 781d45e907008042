"""One new token a row against the slot cache: the answer's own tokens, and the question's states shared by beams."""

from collections.abc import Iterator

import torch
from torch import Tensor

from miss.benchmarks.cases import Case
from miss.benchmarks.inputs import normal
from miss.benchmarks.shapes import IMAGES, NUM_QUESTION_TOKENS, Shapes
from miss.kernels.decode_attention import decode_attention

_POSITIONS = 40  # of a slot; a long answer


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    decoder = shapes.preset.decoder
    heads, width = decoder.num_heads, decoder.hidden_size // decoder.num_heads
    for dtype in dtypes:
        for rows in (1, IMAGES):
            yield _case("own tokens", rows, 1, 10, heads, width, dtype)
        yield _case("question, 3 beams", 3, 3, NUM_QUESTION_TOKENS, heads, width, dtype)
        yield _case("image, 3 beams", 3 * IMAGES, 3, shapes.tokens, heads, width, dtype)


def _case(what: str, rows: int, beams: int, length: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    slots, positions = rows // beams, max(_POSITIONS, length)

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        caches = (normal(generator, slots, positions, heads, width, dtype=dtype) for _ in range(2))
        index = torch.arange(rows, dtype=torch.int32, device=generator.device) // beams
        return normal(generator, rows, heads, width, dtype=dtype), *caches, index, torch.full_like(index, length)

    row = heads * width * dtype.itemsize
    return Case(
        "decode_attention", f"{what}: {rows} rows L={length} H={heads} D={width}", str(dtype).removeprefix("torch."),
        make, decode_attention, 4.0 * rows * length * heads * width,
        reads=(rows + 2 * slots * length) * row, writes=rows * row, caches=("warm", "cold"),
    )  # fmt: skip
