"""The cache's two writes by indexed copies.

Knows PyTorch's indexing; does not know other implementations.
"""

from torch import Tensor


def append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
    k_cache.index_put_((slots, positions), k.to(k_cache.dtype))
    v_cache.index_put_((slots, positions), v.to(v_cache.dtype))


def reorder(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    # index_select copies, so that a slot which is both source and target is read before it is written.
    k_cache.index_copy_(0, target.long(), k_cache.index_select(0, source))
    v_cache.index_copy_(0, target.long(), v_cache.index_select(0, source))
