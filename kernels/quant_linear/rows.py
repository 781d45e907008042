"""Products of rows that are int8 codes already, and what may follow them in the same pass.

Knows the products and who computes them; does not know who made the codes: a norm, or a product before.

    y = gelu?((q @ data.T) * s * scale + bias) + residual         q = codes - 128, s = rows.scale
    quantise_rows:                        x -> codes and scale, as `QuantRows` describes them
    quant_linear_rows:                    y in `dtype`
    quant_linear_rows_quantised:          y (without residual) as codes and scale

codes uint8 (…, K), s float32 (…), data int8 (N, K), scale float32 (N,), bias (N,) or None, residual (…, N) of y's
dtype or None; sums int32 and exact. For inference: nothing here has a gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels import extension
from miss.kernels.quant_linear import limits, packing
from miss.kernels.quant_linear.op import CPU_DTYPES, on_cpu
from miss.kernels.quant_linear.packing import PackedWeight, QuantRows
from miss.kernels.registry import ALL_FLOATS, Impl, Op, lazy, triton


def _signed(codes: Tensor) -> Tensor:
    """uint8 codes as the int8 numbers that they stand for."""
    return codes.bitwise_xor(128).view(torch.int8)


def _total(codes: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """(R, N) int32 sums by PyTorch's own product; one column in float64, because torch 2.13's is wrong there."""
    data = packing.row_major(data, scale, codes.shape[-1])
    flat = _signed(codes).reshape(-1, codes.shape[-1])
    if 0 in (*flat.shape, *data.shape):
        return flat.new_zeros(len(flat), len(data), dtype=torch.int32)
    if data.shape[1] == 1 or codes.device.type != "cpu":
        return (flat.double() @ data.double().T).to(torch.int32)
    return torch._int_mm(flat, data.t())


def _finished(
    total: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool
) -> Tensor:
    """y (…, N), float32 (float64 where the row scales are)."""
    acc = row_scale.dtype
    y = (total.to(acc) * row_scale.reshape(-1, 1)) * scale.to(acc)
    y = y if bias is None else y + bias.to(acc)
    y = (F.gelu(y) if gelu else y).view(*row_scale.shape, total.shape[-1])
    return y if residual is None else y + residual.to(acc)


def _torch_rows(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    panels: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    return _finished(_total(codes, data, scale), row_scale, scale, bias, residual, gelu).to(dtype)


def _reference_rows(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    panels: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    flat = codes.reshape(-1, codes.shape[-1]).double() - 128  # float64 sums are exact whatever their order
    data = packing.row_major(data, scale, codes.shape[-1])
    return _finished(flat @ data.double().T, row_scale, scale, bias, residual, gelu).to(dtype)


def _torch_quantised(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return packing.quantise_rows(_finished(_total(codes, data, scale), row_scale, scale, bias, None, gelu))


def _reference_quantised(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = _reference_rows(row_scale, codes, data, scale, bias, None, gelu, row_scale.dtype, None, None)
    return packing.quantise_rows(y)


# The row scales come first: a table judges device and dtype by its first tensor, and codes are bytes.
ROWS = Op(
    "quant_linear_rows",
    on_cpu("rows"),
    triton("quant_linear.triton_w8a8_impl", "rows", limits.rows, frozenset({torch.float32})),
    Impl("torch", _torch_rows, dtypes=ALL_FLOATS),
    Impl("reference", _reference_rows, dtypes=ALL_FLOATS),
)
QUANTISED = Op(
    "quant_linear_rows_quantised",
    on_cpu("rows_quantised"),
    triton("quant_linear.triton_w8a8_impl", "rows_quantised", limits.rows_quantised, frozenset({torch.float32})),
    Impl("torch", _torch_quantised, dtypes=ALL_FLOATS),
    Impl("reference", _reference_quantised, dtypes=ALL_FLOATS),
)
QUANTISE = Op(
    "quantise_rows",
    Impl("cpu", lazy("quant_linear.cpu_impl", "quantise"), device="cpu", dtypes=CPU_DTYPES, needs=extension.missing),
    triton("quant_linear.triton_w8a8_impl", "quantise", limits.quantise),
    Impl("torch", packing.quantise_rows, dtypes=ALL_FLOATS),
    Impl("reference", packing.quantise_rows, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::quant_linear_rows", mutates_args=())
def _rows(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    panels: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    return ROWS(row_scale, codes, data, scale, bias, residual, gelu, dtype, panels, offset)


@_rows.register_fake
def _(row_scale: Tensor, codes: Tensor, data: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], scale.shape[0]), dtype=rest[3])


@torch.library.custom_op("miss::quant_linear_rows_quantised", mutates_args=())
def _quantised(
    row_scale: Tensor,
    codes: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return tuple(QUANTISED(row_scale, codes, data, scale, bias, gelu, panels, offset))


@_quantised.register_fake
def _(row_scale: Tensor, codes: Tensor, data: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return codes.new_empty((*codes.shape[:-1], scale.shape[0])), row_scale.new_empty(row_scale.shape)


@torch.library.custom_op("miss::quantise_rows", mutates_args=())
def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(QUANTISE(x))


@_quantise.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def quantise_rows(x: Tensor) -> QuantRows:
    """x (…, K) as codes and a scale a row."""
    return QuantRows(*QUANTISE.call(_quantise, x.detach()))


def quant_linear_rows(
    rows: QuantRows,
    packed: PackedWeight,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """gelu?(rows times a packed int8 (N, K) weight, plus bias) + residual -> (…, N) in `dtype`.

    Raises:
        ValueError: rows, bias or residual does not fit the weight, or the weight is not int8.
    """
    panels, offset = _check(rows, packed, bias)
    if residual is not None and residual.shape != (*rows.scale.shape, packed.shape[0]):
        shape = (*rows.scale.shape, packed.shape[0])
        raise ValueError(f"quant_linear_rows: residual is {tuple(residual.shape)}; wanted {shape}")
    residual = None if residual is None else residual.to(dtype)
    args = (rows.scale, rows.codes, packed.data, packed.scale, bias, residual, gelu, dtype, panels, offset)
    return ROWS.call(_rows, *args)


def quant_linear_rows_quantised(
    rows: QuantRows, packed: PackedWeight, bias: Tensor | None = None, gelu: bool = False
) -> QuantRows:
    """The same as codes and scales for the next product.

    Raises:
        ValueError: rows or bias does not fit the weight, or the weight is not int8.
    """
    panels, offset = _check(rows, packed, bias)
    args = (rows.scale, rows.codes, packed.data, packed.scale, bias, gelu, panels, offset)
    return QuantRows(*QUANTISED.call(_quantised, *args))


def _check(rows: QuantRows, packed: PackedWeight, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The prepared weight's panels and offset, once everything fits."""
    num_outputs, columns = packed.shape
    fits = rows.codes.shape == (*rows.scale.shape, columns) and (bias is None or bias.shape == (num_outputs,))
    if packed.scheme != "int8" or not fits:
        raise ValueError(
            f"quant_linear_rows: codes {tuple(rows.codes.shape)}, scales {tuple(rows.scale.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}, {packed.scheme} weight {packed.shape}; "
            f"wanted (…, {columns}), (…), ({num_outputs},) and int8"
        )
    return packed.prepared or (None, None)
