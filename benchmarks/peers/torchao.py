"""torchao's quantised linears, compiled, where the package is installed. It packs the weights itself, from the floats.

Knows torchao's configurations; does not know our implementations.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Bound
from miss.kernels.quant_linear import PackedWeight, unpack


def missing() -> str | None:
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One for all: weights and rows are arguments, so that a shape is compiled once."""
    return torch.compile(F.linear, dynamic=False)


def quant_linear(x: Tensor, weight: PackedWeight, bias: Tensor) -> Bound:
    """W8A8 with a scale a row, or int8 weights alone."""
    quantization = importlib.import_module("torchao.quantization")
    name = "Int8DynamicActivationInt8WeightConfig" if weight.dynamic else "Int8WeightOnlyConfig"
    layer: Any = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=x.dtype, device=x.device)
    layer.weight.data = unpack(weight, x.dtype)
    quantization.quantize_(layer, getattr(quantization, name)())
    packed, run = layer.weight, _compiled()
    return lambda: run(x, packed, bias)
