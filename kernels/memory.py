"""Memory straight from the system for what is large and stays: a cache's pool or slots, a buffer to measure with.

Knows pages; does not know what lies in them.
"""

import contextlib
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def huge_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros on the CPU that take memory as they are written, 2 MB at a time where the system has such pages.

    Writing 21 MB for the first time is 5,200 faults with pages of 4 KB, and 11 with these; and with pages of 4 KB every
    4 KB end the processor's prefetching: on two Zen 4 cores one thread reads 16 GB/s of them, 30 of huge pages, and
    both 23, or 28 in four streams each, and 34.
    """
    return _zeros(shape, dtype, huge=True)


def sparse_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros on the CPU that take memory as they are written, 4 KB at a time: for what may never be written.

    `torch.zeros` writes all of them, and so does the C library (`calloc`, NumPy) where it has freed memory to hand out:
    after an int8 base model was packed, 366 MB of slots came from there and were all written.
    """
    return _zeros(shape, dtype, huge=False)


def _zeros(shape: Sequence[int], dtype: torch.dtype, huge: bool) -> Tensor:
    count = math.prod(shape)
    if count == 0 or not sys.platform.startswith("linux"):
        return torch.zeros(tuple(shape), dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory gets no huge pages
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
