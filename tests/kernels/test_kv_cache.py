"""The slot cache's writes: where rows go, and reorders whose sources are targets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miss.kernels.kv_cache import kv_append, kv_reorder, op
from miss.kernels.registry import use
from tests.helpers import route, threads

WAYS = ["torch", "reference", "cpu"]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_append(way: str, dtype: torch.dtype) -> None:
    layers = torch.randn(2, 3, 5, 7, 2, 32).to(dtype)  # (k or v, layer, S, L, H, D): a layer's cache is a view
    before, new = layers.clone(), torch.randn(3, 3, 2, 32)
    slots, positions = [4, 0, 2], [6, 0, 3]
    if way == "cpu" and dtype not in op.CPU_DTYPES:
        pytest.skip("float32 and bfloat16 alone")
    with route(way, op.APPEND):
        kv_append(layers[0, 1], layers[1, 1], new[:, 1], new[:, 2], int32(slots), int32(positions))
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        for side in (0, 1):
            assert torch.equal(layers[side, 1, slot, position], new[row, side + 1].to(dtype))
            before[side, 1, slot, position] = new[row, side + 1].to(dtype)
    assert torch.equal(layers, before)  # and nothing else was touched


@pytest.mark.parametrize("way", WAYS)
def test_append_without_rows_and_with_gradients_about(way: str) -> None:
    k_cache, v_cache = torch.zeros(2, 2, 3, 2, 32)
    with route(way, op.APPEND):
        kv_append(k_cache, v_cache, torch.zeros(0, 2, 32), torch.zeros(0, 2, 32), int32([]), int32([]))
        assert not k_cache.any()
        new = torch.randn(1, 2, 32, requires_grad=True)
        kv_append(k_cache, v_cache, new, new, int32([1]), int32([2]))
    assert torch.equal(k_cache[1, 2], new[0]) and torch.equal(v_cache[1, 2], new[0]) and not k_cache.requires_grad


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reorder_reads_before_it_writes(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 7))
    slot = st.integers(0, num_slots - 1)
    target = data.draw(st.lists(slot, unique=True, max_size=num_slots), label="target")
    source = data.draw(st.lists(slot, min_size=len(target), max_size=len(target)), label="source")
    caches = torch.randn(2, num_slots, 3, 1, 4)
    before = caches.clone()
    with route(data.draw(st.sampled_from(WAYS)), op.REORDER):
        kv_reorder(caches[0], caches[1], int32(source), int32(target))
    for s in range(num_slots):
        origin = source[target.index(s)] if s in target else s
        assert torch.equal(caches[:, s], before[:, origin])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("source", "target"), [([1, 2, 0], [0, 1, 2]), ([1, 0], [0, 1]), ([0, 0, 1], [0, 1, 2]), ([], [])], ids=str
)
def test_permutations(way: str, source: list[int], target: list[int]) -> None:
    layers = torch.randn(2, 2, 3, 5, 2, 32, dtype=torch.bfloat16)
    before = layers.clone()
    with route(way, op.REORDER):
        kv_reorder(layers[0, 1], layers[1, 1], int32(source), int32(target))
    before[:, 1, target] = before[:, 1, source]
    assert torch.equal(layers, before)


def test_opcheck_and_compile() -> None:
    k_cache, v_cache = torch.randn(2, 3, 5, 2, 32)
    new, two, other = torch.randn(2, 2, 32), int32([2, 0]), int32([1, 4])
    torch.library.opcheck(op._append, (k_cache, v_cache, new, new, two, other))
    torch.library.opcheck(op._reorder, (k_cache, v_cache, two, int32([0, 2])))

    def step(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        kv_append(k_cache, v_cache, new, new, two, other)
        kv_reorder(k_cache, v_cache, two, int32([0, 2]))
        return k_cache * 2

    plain, compiled = [k_cache.clone(), v_cache.clone()], [k_cache.clone(), v_cache.clone()]
    expected, got = step(*plain), torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(got, expected) and torch.equal(compiled[0], plain[0]) and torch.equal(compiled[1], plain[1])
    assert not torch.equal(compiled[0], k_cache)


def test_errors_say_what_was_wanted() -> None:
    cache, new, two = torch.randn(3, 5, 2, 32), torch.randn(2, 2, 32), int32([0, 1])
    with pytest.raises(ValueError, match=r"wanted \(S, L, H, D\) twice, \(R, H, D\) twice"):
        kv_append(cache, cache, new[..., :8], new[..., :8], two, two)
    with pytest.raises(ValueError, match=r"wanted \(2,\)"):
        kv_append(cache, cache, new, new, two, two[:1])
    with pytest.raises(ValueError, match=r"wanted \(R,\) twice"):
        kv_reorder(cache, cache, two, two[:1])
    with pytest.raises(ValueError, match=r"wanted \(S, L, H, D\) twice"):
        kv_reorder(cache, cache[:1], two, two)
    for way in WAYS:
        with route(way, op.APPEND), pytest.raises(IndexError):
            kv_append(cache, cache, new, new, two, int32([0, 5]))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cpu_moves_large_slots_in_every_order(count: int, dtype: torch.dtype) -> None:
    """Chains, cycles, a slot read twice, one that stays: with enough bytes for several threads."""
    caches = torch.randn(2, 9, 40, 12, 64).to(dtype)
    before = caches.clone()
    source, target = [1, 2, 0, 4, 5, 5, 7, 8], [0, 1, 2, 3, 4, 6, 8, 7]
    with threads(count), route("cpu", op.REORDER):
        kv_reorder(caches[0], caches[1], int32(source), torch.tensor(target))
    before[:, target] = before[:, source]
    assert torch.equal(caches, before)


def test_cpu_refuses_before_it_writes() -> None:
    cache, new = torch.randn(3, 5, 2, 32), torch.randn(2, 2, 32)
    before = cache.clone()
    with route("cpu", op.APPEND), route("cpu", op.REORDER):
        for slots, positions, says in (
            ([0, 3], [0, 0], r"slots\[1\] is 3; wanted 0 … 2"),
            ([0, -1], [0, 0], r"slots\[1\] is -1"),
            ([0, 1], [5, 0], r"positions\[0\] is 5; wanted 0 … 4"),
        ):
            with pytest.raises(IndexError, match=says):
                kv_append(cache, cache, new, new, int32(slots), int32(positions))
        for source, target, says in (([0, 3], [0, 1], r"source\[1\] is 3"), ([0, 1], [-1, 1], r"target\[0\] is -1")):
            with pytest.raises(IndexError, match=says):
                kv_reorder(cache, cache, int32(source), int32(target))
        with pytest.raises(ValueError, match="distinct targets"):
            kv_reorder(cache, cache, int32([0, 1]), int32([2, 2]))
    assert torch.equal(cache, before)


def test_cpu_says_which_strides_it_does_not_take() -> None:
    cache, new = torch.randn(3, 5, 32, 2).transpose(2, 3), torch.randn(2, 2, 32)
    with use(kv_append="cpu"), pytest.raises(NotImplementedError, match="one behind another|not built"):
        kv_append(cache, cache, new, new, int32([0, 1]), int32([0, 1]))
    kv_append(cache, cache, new, new, int32([0, 1]), int32([0, 1]))
    assert torch.equal(cache[0, 0], new[0])
