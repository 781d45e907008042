"""Linears over packed weights: int8 with int8 activations (numbers in, or codes in), and int8 or int4 weights alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Bound, Case, Peer
from miss.benchmarks.inputs import by_pieces, int4_weight, int8_weight, normal
from miss.benchmarks.peers import onednn, torch_packed, torchao
from miss.benchmarks.shapes import Linear, Shapes
from miss.kernels.quant_linear import (
    PackedWeight,
    QuantRows,
    prepare,
    quant_linear,
    quant_linear_into,
    quant_linear_rows,
    quant_linear_rows_quantised,
    quantise_rows,
)

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
            if not linear.name.endswith("fc1"):  # whose result goes on as codes
                yield _rows(linear, dtype, shapes.device)
        yield _into(shapes.custom or shapes.image_kv(), dtype)
        for linear in _decoding(shapes):
            yield _case(linear, dtype, "w8", shapes.device)
            yield _case(linear, dtype, "w4", shapes.device)

    for linear in _products(shapes):
        if linear.name.endswith(("fc1", "custom")):
            yield _quantised(linear, shapes.device)


def _products(shapes: Shapes) -> list[Linear]:
    if shapes.custom is not None:
        return [shapes.custom]
    return [*shapes.vision(), *shapes.text(), shapes.image_kv()]


def _decoding(shapes: Shapes) -> list[Linear]:
    if shapes.custom is not None:
        return [shapes.custom]
    return [*shapes.decoding(1), shapes.head(1)]


def _bind(x: Tensor, weight: PackedWeight, bias: Tensor) -> Bound:
    prepared = prepare(weight)
    return lambda: quant_linear(x, prepared, bias)


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
        bind=_bind,
    )  # fmt: skip


def _into(linear: Linear, dtype: torch.dtype) -> Case:
    """Keys and values of all layers, head by head."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        x = normal(generator, linear.rows, linear.columns, dtype=dtype)
        bias = normal(generator, linear.outputs, dtype=dtype, size=0.1)
        packed = int8_weight(generator, linear.outputs, linear.columns, True)
        return x, packed, bias, by_pieces(linear.rows, linear.outputs, dtype, generator.device)

    def run(x: Tensor, weight: PackedWeight, bias: Tensor, out: Tensor) -> Bound:
        prepared = prepare(weight)
        return lambda: quant_linear_into(x, prepared, bias, out)

    return Case(
        "quant_linear_into", linear.label, f"{str(dtype).removeprefix('torch.')}/w8a8", make, quant_linear_into,
        linear.flops, reads=linear.outputs * linear.columns + linear.rows * linear.columns * dtype.itemsize,
        writes=linear.rows * linear.outputs * dtype.itemsize, kind="int8", bind=run,
        tolerance=2e-2 if dtype == torch.float32 else None,  # a code that rounds the other way
    )  # fmt: skip


def _codes(generator: torch.Generator, linear: Linear) -> tuple[QuantRows, PackedWeight, Tensor]:
    rows = quantise_rows(normal(generator, linear.rows, linear.columns))
    bias = normal(generator, linear.outputs, size=0.1)
    return rows, int8_weight(generator, linear.outputs, linear.columns, True), bias


def _read(linear: Linear) -> float:
    return (linear.rows + linear.outputs) * linear.columns + 8.0 * linear.outputs + 4.0 * linear.rows


def _rows(linear: Linear, dtype: torch.dtype, device: torch.device) -> Case:
    """Codes of the norm before in; the residual is added where the model adds one."""
    adds = linear.name.endswith(("out", "fc2"))

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        residual = normal(generator, linear.rows, linear.outputs, dtype=dtype) if adds else None
        return *_codes(generator, linear), residual

    def run(rows: QuantRows, weight: PackedWeight, bias: Tensor, residual: Tensor | None) -> Bound:
        prepared = prepare(weight)
        return lambda: quant_linear_rows(rows, prepared, bias, False, residual, dtype)

    def truth(rows: QuantRows, weight: PackedWeight, bias: Tensor, residual: Tensor | None) -> Tensor:
        return quant_linear_rows(rows, weight, bias, False, residual, torch.float64)

    def peer(rows: QuantRows, weight: PackedWeight, bias: Tensor, residual: Tensor | None) -> Bound:
        return onednn.rows_to_numbers(rows, weight, bias, residual, dtype)

    passes = (Peer("onednn+passes", peer, onednn.missing()),)
    matrix = linear.rows * linear.outputs * dtype.itemsize
    return Case(
        "quant_linear_rows", linear.label, f"{str(dtype).removeprefix('torch.')}/w8a8", make, quant_linear_rows,
        linear.flops, reads=_read(linear) + adds * matrix, writes=matrix,
        peers=passes if device.type == "cpu" else (), kind="int8", truth=truth, bind=run,
        tolerance=2e-5 if dtype == torch.float32 else 3e-2,
    )  # fmt: skip


def _quantised(linear: Linear, device: torch.device) -> Case:
    """Codes in, GELU, codes out: the middle of the MLP."""

    def run(rows: QuantRows, weight: PackedWeight, bias: Tensor) -> Bound:
        prepared = prepare(weight)
        return lambda: quant_linear_rows_quantised(rows, prepared, bias, True)

    def truth(rows: QuantRows, weight: PackedWeight, bias: Tensor) -> QuantRows:
        return quant_linear_rows_quantised(rows, weight, bias, True)

    passes = (Peer("onednn+passes", onednn.rows_to_codes, onednn.missing()),)
    return Case(
        "quant_linear_rows_quantised", linear.label, "codes/w8a8", lambda generator: _codes(generator, linear), truth,
        linear.flops, reads=_read(linear), writes=linear.rows * (linear.outputs + 4.0),
        peers=passes if device.type == "cpu" else (), kind="int8", bind=run, tolerance=1e-2,
    )  # fmt: skip
