"""Linears over packed weights: int8 with int8 activations, and int8 or int4 weights alone."""

from collections.abc import Iterator
from typing import Any

import torch

from miss.benchmarks.cases import Case, Peer
from miss.benchmarks.inputs import int4_weight, int8_weight, normal
from miss.benchmarks.peers import onednn, torch_packed, torchao
from miss.benchmarks.shapes import Linear, Shapes
from miss.kernels.quant_linear import quant_linear

# torchao rounds weights and rows itself, weights from bfloat16 where x is.
_TORCHAO = Peer("torchao", torchao.quant_linear, torchao.missing(), tolerance=5e-2)


def _peers(scheme: str, linear: Linear) -> tuple[Peer, ...]:
    if scheme == "w8a8":
        return Peer("onednn+passes", onednn.quant_linear, onednn.missing()), _TORCHAO
    reason = torch_packed.missing(scheme, linear.outputs, linear.columns)
    if scheme == "w8":
        return Peer("weight_int8pack", torch_packed.weight_only, reason), _TORCHAO
    return (Peer("weight_int4pack", torch_packed.weight_only, reason),)


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for linear in _products(shapes):
            yield _case(linear, dtype, "w8a8", shapes.device)
        for linear in _decoding(shapes):
            yield _case(linear, dtype, "w8", shapes.device)
            yield _case(linear, dtype, "w4", shapes.device)


def _products(shapes: Shapes) -> list[Linear]:
    if shapes.custom is not None:
        return [shapes.custom]
    return [*shapes.vision(), *shapes.text(), shapes.image_kv()]


def _decoding(shapes: Shapes) -> list[Linear]:
    if shapes.custom is not None:
        return [shapes.custom]
    return [*shapes.decoding(1), shapes.head(1)]


def _case(linear: Linear, dtype: torch.dtype, scheme: str, device: torch.device) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        x = normal(generator, linear.rows, linear.columns, dtype=dtype)
        bias = normal(generator, linear.outputs, dtype=dtype, size=0.1)
        if scheme == "w4":
            return x, int4_weight(generator, linear.outputs, linear.columns), bias
        return x, int8_weight(generator, linear.outputs, linear.columns, scheme == "w8a8"), bias

    bits = 4.25 if scheme == "w4" else 8  # a float16 scale for 64 columns
    matrix = linear.outputs * linear.columns * bits / 8
    whole = scheme == "w8a8"
    return Case(
        "quant_linear_w8a8" if whole else "quant_linear",
        linear.label, f"{str(dtype).removeprefix('torch.')}/{scheme}", make, quant_linear, linear.flops,
        reads=matrix + linear.rows * linear.columns * dtype.itemsize,
        writes=linear.rows * linear.outputs * dtype.itemsize,
        peers=_peers(scheme, linear) if device.type == "cpu" else (),
        caches=("cold", "warm") if linear.rows == 1 else ("warm",),
        kind="int8" if whole else None,
        tolerance=2e-2 if whole and dtype == torch.float32 else None,  # a code that rounds the other way
    )  # fmt: skip
