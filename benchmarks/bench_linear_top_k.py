"""The language-model head of a decoded token: the best of the vocabulary and the log-sum-exp, no logits kept.

The largest logit and the log-sum-exp are checked; which token it is has its tests (two logits that round to the same
bfloat16 number have no order that all implementations share).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Bound, Case, Peer
from miss.benchmarks.inputs import int8_weight, normal, weight
from miss.benchmarks.peers import head, onednn
from miss.benchmarks.shapes import Linear, Shapes
from miss.kernels.linear import prepare
from miss.kernels.linear_top_k import linear_top_k
from miss.kernels.quant_linear import PackedWeight
from miss.kernels.quant_linear import prepare as prepare_packed


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    linears = [shapes.custom] if shapes.custom else [shapes.head(1), shapes.head(8)]
    for dtype in dtypes:
        for linear in linears:
            yield _case(linear, dtype, False, shapes.device)
            yield _case(linear, dtype, True, shapes.device)


def _call(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, _, lse = linear_top_k(hidden, weight, bias, 1)
    return values, lse


def _bind(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor) -> Bound:
    head, panels = (prepare_packed(weight), None) if isinstance(weight, PackedWeight) else (weight, prepare(weight))

    def run() -> tuple[Tensor, Tensor]:
        values, _, lse = linear_top_k(hidden, head, bias, 1, panels)
        return values, lse

    return run


def _largest(*inputs: Any) -> Bound:
    """Alone: it has no sum to check."""
    run = head.largest(*inputs)
    return lambda: run()[0]


def _both(*inputs: Any) -> Bound:
    run = head.largest_and_sum(*inputs)

    def both() -> tuple[Tensor, Tensor]:
        values, _, lse = run()
        return values, lse

    return both


_PEERS = (
    Peer("linear+argmax", _largest, onednn.missing(), results=1),
    Peer("linear+argmax+lse", _both, onednn.missing()),
)


def _case(linear: Linear, dtype: torch.dtype, packed: bool, device: torch.device) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        hidden = normal(generator, linear.rows, linear.columns, dtype=dtype)
        bias = normal(generator, linear.outputs, dtype=dtype, size=0.1)
        if packed:
            return hidden, int8_weight(generator, linear.outputs, linear.columns, True), bias
        return hidden, weight(generator, linear.outputs, linear.columns, dtype), bias

    size = 1 if packed else dtype.itemsize
    return Case(
        "linear_top_k_w8a8" if packed else "linear_top_k", linear.label,
        str(dtype).removeprefix("torch.") + ("/w8a8" if packed else ""), make, _call, linear.flops,
        reads=(linear.outputs * size + linear.rows * dtype.itemsize) * linear.columns, writes=linear.rows * 16.0,
        peers=_PEERS if device.type == "cpu" else (), caches=("cold", "warm") if linear.rows == 1 else ("cold",),
        kind="int8" if packed else None, tolerance=2e-2 if packed and dtype == torch.float32 else None, bind=_bind,
    )  # fmt: skip
