"""Logits of chosen words alone: a few rows of the head's matrix a state.

Knows its formula and who computes it; does not know why a word is chosen.

    z[r, a] = hidden[r] . weight[ids[r, a]] + bias[ids[r, a]]

hidden (R, C), weight (V, C) plain or packed for W8A8, bias (V,) or None, ids int64 (R, A); z float32 (float64 in
float64), of a packed weight exactly the numbers that `linear_top_k` finds. No gradient.
"""

import torch
from torch import Tensor

from miss.kernels.quant_linear import PackedWeight
from miss.kernels.quant_linear.packing import rows_at
from miss.kernels.quant_linear.reference import dynamic, quantise_rows, rescale
from miss.kernels.registry import ALL_FLOATS, Impl, Op, accumulator, autocast_to


def gathered(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """Reads the chosen rows alone; sums in float32."""
    acc = accumulator(hidden.dtype)
    z = torch.matmul(weight[ids].to(acc), hidden.to(acc)[..., None])[..., 0]
    return z if bias is None else z + bias.to(acc)[ids]


def gathered_quant(hidden: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """In float64 the sums of codes are exact whatever their order."""
    acc = accumulator(hidden.dtype)
    codes, x_scale = quantise_rows(hidden)
    total = torch.matmul(rows_at(data, scale, ids, hidden.shape[1]).double(), codes.double()[..., None])[..., 0]
    return rescale(total, x_scale, scale[ids], None if bias is None else bias.to(acc)[ids], acc)


def reference_quant(hidden: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    return dynamic(hidden.to(accumulator(hidden.dtype)), data, scale, bias).gather(1, ids)


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    acc = accumulator(hidden.dtype)
    z = hidden.to(acc) @ weight.to(acc).T
    return (z if bias is None else z + bias.to(acc)).gather(1, ids)


CHOSEN = Op(
    "linear_at",
    Impl("torch", gathered, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference, dtypes=ALL_FLOATS),
)
CHOSEN_QUANT = Op(
    "linear_at_w8a8",
    Impl("torch", gathered_quant, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference_quant, dtypes=ALL_FLOATS),
)


def linear_at(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, ids: Tensor) -> Tensor:
    """z (R, A) of hidden (R, C) at the rows ids (R, A) of weight (V, C).

    Raises:
        ValueError: shapes that do not fit each other, or a packed weight that is not W8A8.
    """
    if hidden.dim() != 2 or ids.dim() != 2 or len(ids) != len(hidden) or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_at: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, ids {tuple(ids.shape)}; "
            "wanted (R, C), (V, C), (R, A)"
        )
    if isinstance(weight, PackedWeight):
        if not weight.w8a8:
            raise ValueError("linear_at: a packed weight is wanted with int8 activations (W8A8)")
        hidden, bias = autocast_to(hidden, bias)
        return CHOSEN_QUANT(hidden, weight.data, weight.scale, bias, ids)  # type: ignore[no-any-return]
    hidden, weight, bias = autocast_to(hidden, weight, bias)
    return CHOSEN(hidden, weight, bias, ids)  # type: ignore[no-any-return]
