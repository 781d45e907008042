"""Exponential moving averages of many tensors, in place and in one call: the momentum twin of a model.

Knows its formula and who computes it; does not know which parameters have a twin, or when it is due.

    average += (1 - momentum) * (value - average)        for each pair; float32 (float64 for a float64 average)

Averages are float32 or float64; values any float dtype and shape, pair by pair alike. A bfloat16 average is refused:
(1 - momentum) * (value - average) at momentum 0.995 is below half of its last place unless the two differ by 40 %, so
that it would stand still. No gradient. Averages may not overlap each other or the values.

Source: arXiv 1911.05722 (momentum encoder).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from miss.kernels.ema import reference, torch_impl
from miss.kernels.registry import FLOATS, Impl, Op, triton

AVERAGES = frozenset({torch.float32, torch.float64})


def _limits(first: Tensor, averages: list[Tensor], values: list[Tensor], momentum: float) -> str | None:
    if not all(a.is_contiguous() and v.is_contiguous() for a, v in zip(averages, values, strict=True)):
        return "takes contiguous tensors"
    return None if all(v.dtype in FLOATS for v in values) else "takes float32, float16 and bfloat16 values"


UPDATE = Op(
    "ema",
    triton("ema.triton_impl", "update", _limits, dtypes=frozenset({torch.float32})),
    Impl("torch", torch_impl.update, dtypes=AVERAGES),
    Impl("reference", reference.update, dtypes=AVERAGES),
)


@torch.library.custom_op("miss::ema", mutates_args=("averages",))
def _update(averages: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> None:
    UPDATE(averages[0], list(averages), list(values), momentum)


@_update.register_fake
def _(averages: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> None:
    return None


@torch.no_grad()
def ema_(averages: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> None:
    """Moves every average towards its value, in place; nothing happens where there are none.

    Raises:
        ValueError: lists of different lengths, a pair of different shapes or devices, averages that are not all
            float32 or all float64, momentum not in [0, 1].
    """
    _check(averages, values, momentum)
    if not averages:
        return
    values = [v.detach() for v in values]
    if torch.compiler.is_compiling():
        _update(averages, values, momentum)
    else:
        UPDATE(averages[0], list(averages), values, momentum)


def _check(averages: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> None:
    if len(averages) != len(values):
        raise ValueError(f"ema: got {len(averages)} averages and {len(values)} values; wanted as many")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum: got {momentum}; wanted 0 to 1")
    for index, (average, value) in enumerate(zip(averages, values, strict=True)):
        if average.dtype not in AVERAGES or average.dtype != averages[0].dtype:
            raise ValueError(
                f"ema: average {index} is {average.dtype}; wanted all float32 or all float64 (in bfloat16 the update "
                f"is lost in rounding)"
            )
        if average.shape != value.shape or average.device != value.device or not value.is_floating_point():
            raise ValueError(
                f"ema: average {index} {tuple(average.shape)} on {average.device}, value {value.dtype} "
                f"{tuple(value.shape)} on {value.device}; wanted floats of one shape and device"
            )
