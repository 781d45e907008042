"""Writing to the slot cache: the new token's keys and values, and the reorder of beams."""

from miss.kernels.kv_cache.op import kv_append, kv_reorder

__all__ = ["kv_append", "kv_reorder"]
