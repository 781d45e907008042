"""Packed tensors in a checkpoint: unpacked when it is loaded, or kept and multiplied with as they are.

Knows which parts of a state dict are packed and which modules can hold them; does not know which tensors are worth
packing or how well (`engine/runtime/quantize.py`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from miss.kernels.cross_attention import KV
from miss.kernels.quant_linear import (
    PackedWeight,
    from_flat,
    pack_int8,
    packed_names,
    quant_linear_into,
    to_flat,
    unpack,
)
from miss.models.config import from_dict
from miss.models.cross_kv import CrossKV, in_order, room_for, split_layers
from miss.models.linear import Linear, QuantLinear
from miss.models.vqa import MissVQA

VERSION = 1
PARTS = ("data", "scale", "zero", "layout")


@dataclass(frozen=True)
class Quantization:
    """What a config.json says about packed tensors.

    shapes: of packed tensors that are no matrices.
    parent: the SHA-256 of the tensors that were packed. report: how it was done and what it cost, for people.
    kept: linear layers that are not packed.
    """

    version: int = VERSION
    scheme: str = ""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    parent: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Quantization":
        """Strictly from JSON.

        Raises:
            ConfigError: an unknown key or a wrong value.
            ValueError: a version that is not known here.
        """
        read = from_dict(cls, dict(values), "quantization.")
        if read.version != VERSION:
            raise ValueError(f"quantization version {read.version}; this program reads version {VERSION}: update it")
        return read

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pack_tensors(tensors: Mapping[str, Tensor], packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """`tensors` with those that are packed replaced by their parts (`name.data`, `name.scale`, …)."""
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        state |= to_flat(packed[name], name) if name in packed else {name: value}
    return state


def unpack_tensors(tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor in float32: packed ones unpacked, the others widened.

    Raises:
        ValueError: parts are missing or do not fit each other.
    """
    shapes = Quantization.read(quantization).shapes
    packed = packed_weights(tensors)
    parts = {f"{name}.{part}" for name in packed for part in PARTS}
    state = {name: value.float() for name, value in tensors.items() if name not in parts}
    for name, weight in packed.items():
        shape = shapes.get(name, list(weight.shape))
        if prod(shape) != prod(weight.shape):
            raise ValueError(f"{name}: packed as {list(weight.shape)}, stated to be {shape}")
        state[name] = unpack(weight).reshape(shape)
    return state


def packed_weights(tensors: Mapping[str, Tensor]) -> dict[str, PackedWeight]:
    """The packed weights among a checkpoint's tensors, by the names of the tensors that they stand for."""
    return {name: from_flat(tensors, name) for name in packed_names(tensors)}


class QuantCrossKV(QuantLinear):
    """`CrossKV` over a packed weight."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None, shape: tuple[int, int, int, int]) -> None:
        super().__init__(packed, bias)
        self.shape = shape

    def layers(self, source: Tensor) -> list[KV]:
        return split_layers(self.product(source))

    def product(self, source: Tensor, out: Tensor | None = None) -> Tensor:
        """As `CrossKV.product`."""
        if out is None and (in_order(source) or not self.packed.w8a8):
            return self(source).unflatten(-1, self.shape)
        out = room_for(source, self.shape) if out is None else out
        if self.packed.w8a8:
            return quant_linear_into(source, self.packed, self.bias, out)
        return out.copy_(self(source).unflatten(-1, self.shape))


def linear_modules(model: nn.Module) -> dict[str, Linear]:
    """The linear layers by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}


def use_packed(
    model: MissVQA, packed: Mapping[str, PackedWeight], biases: Mapping[str, Tensor] | None = None
) -> MissVQA:
    """Puts packed weights in place of the model's linear layers, for inference; word tables stay as they are.

    Args:
        biases: of the layers, by name, for a model that has no memory of its own yet.
    """
    for name, module in linear_modules(model).items():
        if name not in packed:
            continue
        weight = packed[name] if biases is not None else packed[name].to(module.weight.device)
        own: Tensor | None = module.bias if biases is None else biases.get(name.removesuffix("weight") + "bias")
        bias = None if own is None else own.detach()
        new = QuantCrossKV(weight, bias, module.shape) if isinstance(module, CrossKV) else QuantLinear(weight, bias)
        model.set_submodule(name.removesuffix(".weight"), new)
    model.decoder.forget()
    return model


def use_int8(model: MissVQA, dynamic: bool = True) -> MissVQA:
    """Packs every linear layer to int8, a scale a row; `dynamic` multiplies with int8 activations (W8A8), and with a
    packed copy of the decoder's word table at the end of a step: embeddings are read from the table itself."""
    with torch.no_grad():
        use_packed(model, {n: pack_int8(m.weight, dynamic) for n, m in linear_modules(model).items()})
        table = model.decoder.embeddings.word.weight
        model.decoder.use_vocabulary(pack_int8(table, dynamic=True) if dynamic else None)
    return model
