"""The cache's writes in Triton against indexing: where rows go, reorders whose sources are targets, planted bugs.

Interpreted, this does not show races between programs or alignment; conversions to bfloat16 truncate there, so that
rows that are cast hold numbers that bfloat16 has.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.kernels.kv_cache import op, reference, triton_impl
from tests.kernels.triton.device import DEVICE


def index(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def caches(*shape, dtype=torch.float32):
    """(k or v, layer, …): a layer's cache is a view."""
    return torch.randint(-99, 99, (2, 2, *shape), device=DEVICE).to(dtype)


def check_append(layers, new, slots, positions, module=triton_impl):
    got, wanted = layers.clone(), layers.clone()
    for target, run in ((got, module), (wanted, reference)):
        run.append(target[0, 1], target[1, 1], new[:, 1], new[:, 2], slots, positions)
    assert torch.equal(got, wanted)


def check_reorder(layers, source, target, module=triton_impl):
    got, wanted = layers.clone(), layers.clone()
    module.reorder(got[0, 1], got[1, 1], source, target)
    reference.reorder(wanted[0, 1], wanted[1, 1], source, target)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [(2, 32), (12, 64), (3, 5), (1, 1)], ids=str)
def test_append(heads, dtype, kind):
    new = torch.randint(-99, 99, (3, 3, *heads), device=DEVICE).float()  # a view of the packed projection
    check_append(caches(5, 7, *heads, dtype=dtype), new, index([4, 0, 2], kind), index([6, 0, 3], kind))


def test_append_to_any_strides_and_without_rows():
    new = torch.randint(-99, 99, (3, 4, 32, 4), device=DEVICE).float().transpose(2, 3)
    layers = caches(5, 32, 4, 7).permute(0, 1, 2, 5, 4, 3)
    check_append(layers[..., ::2], new[..., ::2], index([4, 0, 2]), index([6, 0, 3]))
    check_append(caches(2, 3, 1, 4), torch.zeros(0, 3, 1, 4, device=DEVICE), index([]), index([]))


def test_an_index_out_of_range_appends_nothing():
    layers, new = caches(3, 4, 2, 8), torch.ones(4, 2, 8, device=DEVICE)
    before = layers.clone()
    triton_impl.append(layers[0, 0], layers[1, 0], new, new, index([0, 3, -1, 1]), index([4, 0, 0, -1]))
    assert torch.equal(layers, before)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reorder_reads_before_it_writes(data):
    num_slots = data.draw(st.integers(1, 7))
    slot = st.integers(0, num_slots - 1)
    target = data.draw(st.lists(slot, unique=True, max_size=num_slots), label="target")
    source = data.draw(st.lists(slot, min_size=len(target), max_size=len(target)), label="source")
    check_reorder(caches(num_slots, 3, 1, 4), index(source), index(target, torch.int64))


CYCLE = ([1, 2, 0, 4, 5, 5, 7, 8, 3], [0, 1, 2, 3, 4, 6, 8, 7, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_chains_cycles_and_more_than_a_block(dtype):
    check_reorder(caches(9, 9, 12, 64, dtype=dtype), index(CYCLE[0]), index(CYCLE[1]))
    check_reorder(caches(9, 5, 3, 32, dtype=dtype)[:, :, :, :3], index(CYCLE[0]), index(CYCLE[1]))  # a part of length
    check_reorder(caches(9, 3, 32, 5, dtype=dtype).transpose(3, 5), index(CYCLE[0]), index(CYCLE[1]))


@pytest.mark.parametrize("bug", ["position", "tail", "in place", "swapped"])
def test_planted_bugs_are_seen(bug):
    class Wrong:
        @staticmethod
        def append(k_cache, v_cache, k, v, slots, positions):
            if bug == "position":
                positions = positions + 1
            if bug == "tail":
                k_cache, v_cache, k, v = (t[..., :-1] for t in (k_cache, v_cache, k, v))
            if bug == "swapped":
                k, v = v, k
            triton_impl.append(k_cache, v_cache, k, v, slots, positions)

        @staticmethod
        def reorder(k_cache, v_cache, source, target):
            for i in range(len(source)):  # row after row, without a buffer that holds what was there before
                triton_impl.reorder(k_cache, v_cache, source[i : i + 1], target[i : i + 1])

    with pytest.raises(AssertionError):
        if bug == "in place":
            check_reorder(caches(9, 5, 2, 8), index(CYCLE[0]), index(CYCLE[1]), Wrong)
        else:
            new = torch.randint(-99, 99, (2, 3, 2, 8), device=DEVICE).float()
            check_append(caches(3, 5, 2, 8), new, index([2, 0]), index([3, 1]), Wrong)


def test_the_tables_say_what_is_not_taken():
    cache, two = caches(3, 5, 2, 8)[0, 0], index([0, 1])
    impl = {i.name: i for table in (op.APPEND, op.REORDER) for i in table.impls}["triton"]
    assert impl.limits(cache, cache.bfloat16(), two, two) == "takes caches of one dtype"
    assert impl.limits(cache, cache, two, two) is None
    append = next(i for i in op.APPEND.impls if i.name == "triton")
    assert append.limits(cache, cache, two, two, two, two) == "takes floating-point caches and rows"
