"""oneDNN's linears with packed weights, reached through PyTorch's dispatcher, and the passes that go with them.

Knows torch.ops.mkldnn and torch.ops.onednn; does not know our implementations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Bound
from miss.benchmarks.peers.passes import quantise_rows
from miss.kernels.quant_linear import PackedWeight, QuantRows

_SHIFT = 128  # oneDNN's fast int8 product takes unsigned rows: codes are shifted by this zero point


def missing() -> str | None:
    return None if torch.backends.mkldnn.is_available() else "this PyTorch has no oneDNN"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, after: Callable[[Tensor], Tensor] | None = None) -> Bound:
    """x @ weight.T + bias with the weight packed for x's number of rows; `after` is a pass of its own."""
    product = _product(x, weight, bias, "none", "")
    return product if after is None else lambda: after(product())


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Bound:
    """x @ weight.T + bias + residual, the sum in oneDNN's own epilogue."""
    rows, shape = x.flatten(0, -2), (*x.shape[:-1], len(weight))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
    run: Any = torch.ops.mkldnn._linear_pointwise.binary
    return lambda: run(rows, residual, packed, bias, "add").view(shape)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Bound:
    """The exact GELU in oneDNN's own epilogue."""
    return _product(x, weight, bias, "gelu", "none")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, post: str, algorithm: str) -> Bound:
    rows, shape = x.flatten(0, -2), (*x.shape[:-1], len(weight))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
    run: Any = torch.ops.mkldnn._linear_pointwise
    return lambda: run(rows, packed, bias, post, [], algorithm).view(shape)


def int8_product(num_rows: int, weight: PackedWeight, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """uint8 rows (R, K) -> float32 (R, N), weights packed, their scales and the bias in oneDNN's epilogue."""
    packed = torch.ops.onednn.qlinear_prepack(weight.data, [num_rows, weight.shape[1]])
    zeros, scale = torch.zeros(weight.shape[0], dtype=torch.int64), weight.scale
    run: Any = torch.ops.onednn.qlinear_pointwise
    return lambda codes: run(codes, 1.0, _SHIFT, packed, scale, zeros, bias, 1.0, 0, torch.float32, "none", [], "")


def quant_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Bound:
    """W8A8 with a scale a row: quantise, oneDNN's product, then rescale and bias in passes."""
    rows, shape = x.flatten(0, -2), (*x.shape[:-1], weight.shape[0])
    product = int8_product(len(rows), weight, None)

    def run() -> Tensor:
        codes, scale = quantise_rows(rows)
        y = product(codes).mul_(scale)
        y = y if bias is None else y.add_(bias)
        return y.to(x.dtype).view(shape)

    return run


def rows_to_numbers(
    rows: QuantRows, weight: PackedWeight, bias: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> Bound:
    """Codes in: oneDNN's product, then the rows' scales, bias and residual in passes."""
    product, scale = int8_product(len(rows.codes), weight, None), rows.scale[:, None]

    def run() -> Tensor:
        y = product(rows.codes).mul_(scale).add_(bias)
        return (y if residual is None else y.add_(residual)).to(dtype)

    return run


def rows_to_codes(rows: QuantRows, weight: PackedWeight, bias: Tensor) -> Bound:
    """Codes in, codes out: oneDNN's product, then the rows' scales, bias, GELU and quantising in passes."""
    product, scale = int8_product(len(rows.codes), weight, None), rows.scale[:, None]

    def run() -> tuple[Tensor, Tensor]:
        codes, scales = quantise_rows(F.gelu(product(rows.codes).mul_(scale).add_(bias)))
        return codes, scales[..., 0]

    return run
