"""Decode attention by the compiled CPU kernels.

Knows the extension's operation; does not know other implementations.
"""

from torch import Tensor

from miss.kernels import extension


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return extension.ops().decode_attention(q, k_cache, v_cache, slots, lengths, scale)  # type: ignore[no-any-return]
