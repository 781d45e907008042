"""Decode attention as attention of one query over the cache's rows, in place or gathered.

Knows what CPU may read of the lengths; does not know other implementations.
"""

from torch import Tensor

from miss.kernels.attention.reference import without_autocast
from miss.kernels.attention.torch_impl import attend


@without_autocast
def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    if q.device.type == "cpu" and q.shape[0]:
        # Slots are of full length; what no row has written yet is not read. On CUDA that would wait for the device.
        longest = int(lengths.max())
        k_cache, v_cache = k_cache[:, :longest], v_cache[:, :longest]
        index = slots.tolist()
        if index == list(range(index[0], index[0] + len(index))):  # neighbours, as most batches are: read in place
            rows = slice(index[0], index[0] + len(index))
            return attend(q[:, None], k_cache[rows], v_cache[rows], lengths, False, scale, None)[:, 0]
    k, v = k_cache.index_select(0, slots), v_cache.index_select(0, slots)
    return attend(q[:, None], k, v, lengths, False, scale, None)[:, 0]
