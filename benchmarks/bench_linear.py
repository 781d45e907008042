"""Linear layers in float32 and bfloat16, with the residual where the model adds one, and their gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Bound, Case, Peer
from miss.benchmarks.inputs import by_pieces, normal, weight
from miss.benchmarks.peers import onednn
from miss.benchmarks.shapes import Linear, Shapes
from miss.kernels.linear import linear, linear_into, prepare
from miss.kernels.registry import OPS

_ADDING = ("out", "fc2")  # after which the residual is added


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for one in _linears(shapes):
            yield _case(one, dtype, shapes.device)
        yield _into(shapes.custom or shapes.image_kv(), dtype)
        for one in [shapes.custom] if shapes.custom else [_training(shapes, "vit"), _training(shapes, "bert")]:
            yield _backward(one, dtype)


def _linears(shapes: Shapes) -> list[Linear]:
    if shapes.custom is not None:
        return [shapes.custom]
    texts = [*shapes.text(), *shapes.decoding(1), *shapes.decoding(8)]
    every = [*shapes.vision(), *texts, shapes.image_kv()]
    return [one for one in every if not one.name.endswith("fc1")]  # that is gelu_mlp's


def _training(shapes: Shapes, tower: str) -> Linear:
    """fc1 over two images, or over the questions of a step."""
    rows = 2 * shapes.tokens if tower == "vit" else 48 * 18
    return next(one for one in shapes.tower(tower, rows) if one.name.endswith("fc1"))


def _bind(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Bound:
    panels = prepare(weight)
    return lambda: linear(x, weight, bias, residual, panels)


def _peers(adds: bool) -> tuple[Peer, ...]:
    def passes(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Bound:
        return onednn.linear(x, weight, bias, None if residual is None else residual.add)

    plain = Peer("onednn+add" if adds else "onednn_packed", passes, onednn.missing())
    return (plain, Peer("onednn_fused", onednn.linear_add, onednn.missing())) if adds else (plain,)


def _case(one: Linear, dtype: torch.dtype, device: torch.device) -> Case:
    adds = one.name.endswith(_ADDING)

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        x = normal(generator, one.rows, one.columns, dtype=dtype)
        bias = normal(generator, one.outputs, dtype=dtype, size=0.1)
        residual = normal(generator, one.rows, one.outputs, dtype=dtype) if adds else None
        return x, weight(generator, one.outputs, one.columns, dtype), bias, residual

    read = (one.rows + one.outputs) * one.columns + one.outputs + adds * one.rows * one.outputs
    return Case(
        "linear", one.label, str(dtype).removeprefix("torch."), make, linear, one.flops, reads=read * dtype.itemsize,
        writes=one.rows * one.outputs * dtype.itemsize, peers=_peers(adds) if device.type == "cpu" else (),
        caches=("warm", "cold") if one.rows == 1 else ("warm",), bind=_bind,
    )  # fmt: skip


def _into(one: Linear, dtype: torch.dtype) -> Case:
    """Keys and values of all layers, head by head."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        x = normal(generator, one.rows, one.columns, dtype=dtype)
        bias = normal(generator, one.outputs, dtype=dtype, size=0.1)
        table = weight(generator, one.outputs, one.columns, dtype)
        return x, table, bias, by_pieces(one.rows, one.outputs, dtype, generator.device)

    def bind(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Bound:
        panels = prepare(weight)
        return lambda: linear_into(x, weight, bias, out, panels)

    read = (one.rows + one.outputs) * one.columns + one.outputs
    return Case(
        "linear_into", one.label, str(dtype).removeprefix("torch."), make, linear_into, one.flops,
        reads=read * dtype.itemsize, writes=one.rows * one.outputs * dtype.itemsize, bind=bind,
    )  # fmt: skip


def _backward(one: Linear, dtype: torch.dtype) -> Case:
    """dx, dweight and dbias."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        dy = normal(generator, one.rows, one.outputs, dtype=dtype)
        x = normal(generator, one.rows, one.columns, dtype=dtype)
        return dy, x, weight(generator, one.outputs, one.columns, dtype), True, True, True

    matrices = one.rows * one.columns + one.outputs * one.columns
    return Case(
        "linear_backward", one.label, str(dtype).removeprefix("torch."), make, OPS["linear_backward"], 2 * one.flops,
        reads=(matrices + one.rows * one.outputs) * dtype.itemsize, writes=(matrices + one.outputs) * dtype.itemsize,
        tolerance=1e-4 if dtype == torch.float32 else 6e-2,
    )  # fmt: skip
