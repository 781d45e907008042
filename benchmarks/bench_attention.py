"""Self-attention of the image tower and of the text towers, at both head widths."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Case, Peer
from miss.benchmarks.inputs import normal
from miss.benchmarks.peers import sdpa
from miss.benchmarks.shapes import IMAGES, NUM_QUESTION_TOKENS, Shapes
from miss.kernels.attention import attention, attention_quantised
from miss.kernels.registry import OPS, use

_LENGTHS = (257, 577, 901)  # 224, 384 and 480 pixels


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    vision, encoder = shapes.preset.vision, shapes.preset.encoder
    wide, narrow = vision.hidden_size // vision.num_heads, encoder.hidden_size // encoder.num_heads
    for dtype in dtypes:
        for tokens in _LENGTHS if shapes.name == "base" else (shapes.tokens,):
            for width in (64, 32) if shapes.name == "base" else (wide,):
                yield case("vit", 1, tokens, vision.num_heads, width, dtype)
        yield case("vit", IMAGES, shapes.tokens, vision.num_heads, wide, dtype)
        if dtype == torch.bfloat16:
            yield _quantised("vit", 1, shapes.tokens, vision.num_heads, wide, dtype)
        yield case("bert", IMAGES, NUM_QUESTION_TOKENS, encoder.num_heads, narrow, dtype, padded=True)
        yield case("decoder", IMAGES, NUM_QUESTION_TOKENS, encoder.num_heads, narrow, dtype, causal=True)
        yield _backward("vit", 2, shapes.tokens, vision.num_heads, wide, dtype)
        yield _backward("bert", 6 * IMAGES, NUM_QUESTION_TOKENS, encoder.num_heads, narrow, dtype)


def case(
    tower: str, batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype, padded=False, causal=False
) -> Case:
    """q, k and v are views of one packed projection, as the model's are."""
    lengths = [tokens - (3 * i) % (tokens // 2) for i in range(batch)] if padded else [tokens] * batch

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        qkv = normal(generator, batch, tokens, 3, heads, width, dtype=dtype)
        valid = torch.tensor(lengths, dtype=torch.int32, device=generator.device) if padded else None
        return *qkv.unbind(2), valid

    def call(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        return attention(q, k, v, valid, causal)

    pairs = sum(n * (n + 1) / 2 if causal else tokens * n for n in lengths)
    matrix = batch * tokens * heads * width * dtype.itemsize
    kind = "padded " if padded else "causal " if causal else ""
    peer = Peer("sdpa", lambda q, k, v, valid: sdpa.attention(q, k, v, valid, causal))
    return Case(
        "attention", f"{kind}{tower} B={batch} T={tokens} H={heads} D={width}", str(dtype).removeprefix("torch."),
        make, call, flops=4 * heads * width * pairs, reads=3 * matrix, writes=matrix, peers=(peer,),
    )  # fmt: skip


def _quantised(tower: str, batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    """Scores of int8 codes, against SDPA without any."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        return normal(generator, batch, tokens, 3, heads, width, dtype=dtype).unbind(2)

    matrix = batch * tokens * heads * width * dtype.itemsize
    return Case(
        "attention_quantised", f"{tower} B={batch} T={tokens} H={heads} D={width}", str(dtype).removeprefix("torch."),
        make, attention_quantised, flops=4.0 * batch * heads * width * tokens**2, reads=3 * matrix, writes=matrix,
        peers=(Peer("sdpa", lambda q, k, v: sdpa.attention(q, k, v, None, False)),), tolerance=5e-2,
    )  # fmt: skip


def _backward(tower: str, batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    """dq, dk, dv from dout and what the forward pass kept."""
    scale = width**-0.5

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        q, k, v = normal(generator, batch, tokens, 3, heads, width, dtype=dtype).unbind(2)
        dout = normal(generator, batch, tokens, heads, width, dtype=dtype)
        with use(attention="reference"):
            out, lse = OPS["attention"](q, k, v, None, False, scale, 0.0, None)
        return dout, q, k, v, out, lse, None, False, scale, 0.0, None

    matrix = batch * tokens * heads * width * dtype.itemsize
    return Case(
        "attention_backward", f"{tower} B={batch} T={tokens} H={heads} D={width}", str(dtype).removeprefix("torch."),
        make, OPS["attention_backward"], flops=10.0 * batch * heads * width * tokens**2, reads=5 * matrix,
        writes=3 * matrix, tolerance=1e-4 if dtype == torch.float32 else 5e-2,
    )  # fmt: skip
