"""Memory in huge pages: zeros that may be written, of any shape and dtype, for as long as somebody holds them."""

import gc

import pytest
import torch

from miss.kernels.memory import huge_zeros


@pytest.mark.parametrize("shape", [(3, 5), (1,), (2, 1 << 20), (0, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_zeros_of_any_shape(shape, dtype):
    room = huge_zeros(shape, dtype)
    assert (tuple(room.shape), room.dtype) == (shape, dtype)
    assert not room.any()
    room.fill_(1)
    assert room.float().sum() == room.numel()


def test_a_view_keeps_the_memory():
    part = huge_zeros((4, 1 << 18))[2:].fill_(7)
    gc.collect()
    others = [huge_zeros((1 << 18,)).fill_(1) for _ in range(8)]
    assert (part == 7).all() and len(others) == 8
