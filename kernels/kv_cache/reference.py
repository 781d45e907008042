"""The cache's two writes, a row at a time: the definition that the fast ones must match.

Knows which row goes where; does not know speed.
"""

from torch import Tensor


def append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        k_cache[slot, position] = k[row]
        v_cache[slot, position] = v[row]


def reorder(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    for cache in (k_cache, v_cache):
        before = cache.clone()
        for a, b in zip(source.tolist(), target.tolist(), strict=True):
            cache[b] = before[a]
