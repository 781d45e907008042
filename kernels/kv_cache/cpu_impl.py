"""The cache's two writes by csrc/cpu/ops_kv_cache.cpp.

Knows how it says that an index is out of range; does not know how it copies.
"""

from typing import NoReturn

from torch import Tensor

from miss.kernels import extension

_ops = extension.ops()


def append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
    bad = _ops.kv_append(k_cache, v_cache, k, v, slots, positions)
    if bad:
        _raise("kv_append", bad, (("slots", slots, len(k_cache)), ("positions", positions, k_cache.shape[1])))


def reorder(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    bad = _ops.kv_reorder(k_cache, v_cache, source, target)
    if bad < 0:
        raise ValueError("kv_reorder: a slot is the target of two rows; wanted distinct targets (nothing was written)")
    if bad:
        _raise("kv_reorder", bad, (("source", source, len(k_cache)), ("target", target, len(k_cache))))


def _raise(op: str, bad: int, sides: tuple[tuple[str, Tensor, int], ...]) -> NoReturn:
    """`bad` - 1 counts rows, two indices each."""
    row, side = divmod(bad - 1, 2)
    name, tensor, limit = sides[side]
    raise IndexError(f"{op}: {name}[{row}] is {int(tensor[row])}; wanted 0 … {limit - 1} (nothing was written)")
