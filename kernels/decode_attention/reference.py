"""Decode attention in plain PyTorch: the definition that the fast ones must match.

Knows the formula; does not know speed.
"""

from torch import Tensor

from miss.kernels.attention.reference import attend, visible_keys, without_autocast


@without_autocast
def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    k, v = k_cache[slots], v_cache[slots]
    visible = visible_keys(lengths, False, 1, k.shape[1], q.device)
    return attend(q[:, None], k, v, visible, scale, None)[0][:, 0]
