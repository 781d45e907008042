"""The linear layers of the models: full-precision and quantized, behind one call.

Knows weights and the operations that apply them; does not know which layers are quantized, or why.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miss.kernels.decoder_step import Matrix
from miss.kernels.gelu_mlp import gelu_mlp
from miss.kernels.linear import linear, prepare
from miss.kernels.quant_linear import (
    PackedWeight,
    QuantRows,
    quant_linear,
    quant_linear_rows,
    quant_linear_rows_quantised,
    quantise_rows,
)
from miss.kernels.quant_linear import prepare as prepare_packed


class Panels:
    """A weight laid out for the kernels that want it so, in memory of its own, for as long as it stays what it was: it
    is not read any more once the weight moves or changes in place. Only a change through `.data` goes unseen; a tensor
    made in inference mode, whose changes PyTorch does not count, is not laid out."""

    def __init__(self, weight: Tensor) -> None:
        self._panels = None if weight.is_inference() else prepare(weight.flatten(1))
        self._of = (0, 0) if self._panels is None else self._state(weight)

    @staticmethod
    def _state(weight: Tensor) -> tuple[int, int]:
        return weight.data_ptr(), weight._version

    def of(self, weight: Tensor) -> Tensor | None:
        """The panels; None where no kernel wants any, the weight has changed, or a graph is traced."""
        if self._panels is None or torch.compiler.is_compiling():
            return None
        if self._state(weight) != self._of:
            self._panels = None
        return self._panels


class Linear(nn.Linear):
    """`y = x W^T + b` with x (…, in_features) and y (…, out_features) in x's dtype."""

    takes_codes = False  # whether x may, and should, come as int8 codes
    _panels: Panels | None = None

    def prepare(self) -> None:
        """For inference: lays the weight out once instead of at every call."""
        self._panels = Panels(self.weight)

    def panels(self) -> Tensor | None:
        return None if self._panels is None else self._panels.of(self.weight)

    def matrix(self) -> Matrix:
        """What an operation over a whole layer takes."""
        return Matrix(self.weight, self.bias, self.panels())

    @staticmethod
    def last(bias: Tensor | None) -> Tensor | None:
        """The bias, where gradients are wanted as a view: its gradient then arrives after the weight's, whichever
        implementation the number of rows chooses. Processes that add up gradients as they arrive rely on one order."""
        return bias if bias is None or not torch.is_grad_enabled() else bias.view_as(bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, part: slice | None = None) -> Tensor:
        """x W^T + b, plus residual (…, out_features) where one is given. `part`: of these outputs alone."""
        if part is not None:
            return linear(x, self.weight[part], None if self.bias is None else self.bias[part], residual)
        return linear(x, self.weight, self.last(self.bias), residual, self.panels())

    def gelu(self, x: Tensor | QuantRows, then: "Linear | QuantLinear | None" = None) -> Tensor:
        """`gelu(x W^T + b)`, exact (erf), as one operation. `then`: who reads it."""
        assert isinstance(x, Tensor), "codes go to a layer that takes_codes"
        return gelu_mlp(x, self.weight, self.last(self.bias), self.panels())


class QuantLinear(nn.Module):
    """`Linear` over a packed weight. For inference: the weight has no gradient."""

    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("bias", bias)

    @property
    def takes_codes(self) -> bool:
        return self.packed.w8a8

    def prepare(self) -> None:
        """Lays the packed weight out for the kernels of this machine, once, and keeps it in that form alone where it
        holds all (int8)."""
        self.packed = prepare_packed(self.packed).in_panels()

    def matrix(self) -> Matrix:
        """What an operation over a whole layer takes."""
        return Matrix(self.packed, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Takes the packed bytes along to another device; their dtypes are part of the packing and stay."""
        super()._apply(fn, recurse)
        if self.bias is not None:
            self.packed = self.packed.to(self.bias.device)
        return self

    @property
    def _dtype(self) -> torch.dtype:
        """Of what comes of codes, which have none of their own."""
        return torch.float32 if self.bias is None else self.bias.dtype

    def forward(self, x: Tensor | QuantRows, residual: Tensor | None = None) -> Tensor:
        """x W^T + b, plus residual; x float, or codes where `takes_codes`."""
        if isinstance(x, QuantRows):
            return quant_linear_rows(x, self.packed, self.bias, False, residual, self._dtype)
        y = quant_linear(x, self.packed, self.bias)
        return y if residual is None else residual + y

    def gelu(self, x: Tensor | QuantRows, then: "Linear | QuantLinear | None" = None) -> Tensor | QuantRows:
        """`gelu(x W^T + b)`, as codes where `then`, who reads it, takes them."""
        if isinstance(x, Tensor):
            if not self.takes_codes or (torch.is_grad_enabled() and x.requires_grad):
                return F.gelu(self(x))
            x = quantise_rows(x)
        if then is not None and then.takes_codes:
            return quant_linear_rows_quantised(x, self.packed, self.bias, gelu=True)
        return quant_linear_rows(x, self.packed, self.bias, gelu=True, dtype=self._dtype)
