"""A model as an engine with hooks wants it: tensors go out as one flat tuple, and come back as what the model returned.

Knows dataclasses, tuples, lists and dictionaries of tensors; does not know models or engines. Why: DeepSpeed finds the
tensors of tuples only, and where it finds none, its backward pass begins without the weights it needs.
"""

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, nn


class Slot(NamedTuple):
    """Where in a flat tuple a tensor stands."""

    place: int


class Opened(nn.Module):
    """Calls the model's `forward` past its hooks, so that its own parameters are those of this module's call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.shape: Any = None  # what the last call returned, with slots for tensors

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        tensors: list[Tensor] = []
        self.shape = take_out(self.model.forward(*args, **kwargs), tensors)
        return tuple(tensors)


def take_out(value: Any, tensors: list[Tensor]) -> Any:
    """The value with a slot for each tensor, which is appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Slot(len(tensors) - 1)
    return _mapped(value, lambda inner: take_out(inner, tensors))


def put_back(shape: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The inverse of `take_out`."""
    if isinstance(shape, Slot):
        return tensors[shape.place]
    return _mapped(shape, lambda inner: put_back(inner, tensors))


def _mapped(value: Any, function: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: function(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {key: function(inner) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    return type(value)(map(function, value)) if isinstance(value, list | tuple) else value
