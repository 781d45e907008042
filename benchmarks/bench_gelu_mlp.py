"""The first half of the MLP: linear, bias, exact GELU."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Bound, Case, Peer
from miss.benchmarks.inputs import normal, weight
from miss.benchmarks.peers import onednn
from miss.benchmarks.shapes import Linear, Shapes
from miss.kernels.gelu_mlp import gelu_mlp
from miss.kernels.linear import prepare

PEERS = (
    Peer("onednn+gelu", lambda x, w, b: onednn.linear(x, w, b, F.gelu), onednn.missing()),
    Peer("onednn_fused", onednn.linear_gelu, onednn.missing()),
)


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for linear in _linears(shapes):
            yield _case(linear, dtype, shapes.device)


def _linears(shapes: Shapes) -> list[Linear]:
    if shapes.custom is not None:
        return [shapes.custom]
    every = [*shapes.vision(), *shapes.text(), *shapes.decoding(1)]
    return [linear for linear in every if linear.name.endswith("fc1")]


def _bind(x: Tensor, weight: Tensor, bias: Tensor) -> Bound:
    panels = prepare(weight)
    return lambda: gelu_mlp(x, weight, bias, panels)


def _case(linear: Linear, dtype: torch.dtype, device: torch.device) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        x = normal(generator, linear.rows, linear.columns, dtype=dtype)
        bias = normal(generator, linear.outputs, dtype=dtype, size=0.1)
        return x, weight(generator, linear.outputs, linear.columns, dtype), bias

    read = (linear.rows + linear.outputs) * linear.columns + linear.outputs
    return Case(
        "gelu_mlp", linear.label, str(dtype).removeprefix("torch."), make, gelu_mlp, linear.flops,
        reads=read * dtype.itemsize, writes=linear.rows * linear.outputs * dtype.itemsize,
        peers=PEERS if device.type == "cpu" else (), caches=("warm", "cold") if linear.rows == 1 else ("warm",),
        bind=_bind,
    )  # fmt: skip
