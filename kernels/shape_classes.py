"""The class of calls that one measurement stands for, by a call's arguments.

Knows dtypes, options and sizes; does not know what was measured (evidence.py) or tables.
"""

import functools
from typing import Any

import torch
from torch import Tensor

# Operations on rows of numbers: leading dimensions are one, however many they are.
_ROWWISE = ("layer_norm", "add_layer_norm", "linear_into", "gelu_mlp", "quant_linear", "quantise_rows")

Item = Any  # of a signature: (dtype, shape), a bool, a number's size, a name
Signature = tuple[Item, ...]


def signature(args: tuple[Any, ...]) -> Signature:
    """What of a call's arguments its shape class depends on: cheap, as it is made at every call on a GPU."""
    return tuple([(a.dtype, a.shape) if isinstance(a, Tensor) else None if a is None else _item(a) for a in args])


def _item(value: Any) -> Item:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value.bit_length()
    if isinstance(value, float):
        return "0" if value == 0.0 else "x"  # whether there is dropout, smoothing, …
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        return len(value).bit_length(), value[0].dtype, sum(v.numel() for v in value).bit_length()
    return type(value).__name__


@functools.lru_cache(maxsize=4096)
def shape_class(op: str, call: Signature) -> str:
    """The class of calls that one measurement stands for: dtypes, options, and sizes down to a power of two.

    Total: whatever the arguments, there is a class; one without a record is unvalidated.
    """
    rowwise = op.removesuffix("_backward").startswith(_ROWWISE) or op.removesuffix("_backward") == "linear"
    names = [_name(item, rowwise) for item in call]
    parts: list[list[Any]] = []
    for name in names:
        if parts and parts[-1][0] == name:
            parts[-1][1] += 1
        else:
            parts.append([name, 1])
    return " ".join(name if count == 1 else f"{count}*{name}" for name, count in parts)


def _name(item: Item, rowwise: bool) -> str:
    if not isinstance(item, tuple):
        return "-" if item is None else str(_floor(item) if type(item) is int else item)
    if len(item) == 3:
        count, dtype, total = item
        return f"{_floor(count)} of {_short(dtype)}[{_floor(total)}]"
    dtype, sizes = item
    if rowwise and len(sizes) > 2:
        sizes = (sizes.numel() // max(1, sizes[-1]), sizes[-1])
    return f"{_short(dtype)}[{','.join(str(_floor(size.bit_length())) for size in sizes)}]"


def _floor(bits: int) -> int:
    return 1 << (bits - 1) if bits else 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_gradient(name: str) -> str:
    """The class of the same call whose gradient is wanted: its time is that of both passes."""
    return f"{name} with gradient"
