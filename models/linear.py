"""The linear layers of the models: full-precision and quantized, behind one call.

Knows weights and the operations that apply them; does not know which layers are quantized, or why.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miss.kernels.gelu_mlp import gelu_mlp
from miss.kernels.linear import linear, prepare
from miss.kernels.quant_linear import PackedWeight, quant_linear


class Linear(nn.Linear):
    """`y = x W^T + b` with x (…, in_features) and y (…, out_features) in x's dtype."""

    _prepared: tuple[Tensor, int, int] | None = (
        None  # panels, and the address and version of the weight that they are of
    )

    def prepare(self) -> None:
        """Lays the weight out for the kernels that want it so, in memory of its own. It is not read any more once the
        weight moves or changes in place; only a change through `.data` goes unseen."""
        panels = prepare(self.weight)
        self._prepared = None if panels is None else (panels, self.weight.data_ptr(), self.weight._version)

    def panels(self) -> Tensor | None:
        """The weight as it was prepared; None where it was not, or has changed since."""
        if self._prepared is None or torch.compiler.is_compiling():
            return None
        panels, address, version = self._prepared
        if self.weight.data_ptr() != address or self.weight._version != version:
            self._prepared = None
            return None
        return panels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x W^T + b, plus residual (…, out_features) where one is given."""
        return linear(x, self.weight, self.bias, residual, self.panels())

    def gelu(self, x: Tensor) -> Tensor:
        """`gelu(x W^T + b)`, exact (erf), as one operation."""
        return gelu_mlp(x, self.weight, self.bias, self.panels())


class QuantLinear(nn.Module):
    """`Linear` over a packed int8 or int4 weight. For inference: the weight has no gradient."""

    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Takes the packed bytes along to another device; their dtypes are part of the packing and stay."""
        super()._apply(fn, recurse)
        if self.bias is not None:
            self.packed = self.packed.to(self.bias.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return quant_linear(x, self.packed, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x))
