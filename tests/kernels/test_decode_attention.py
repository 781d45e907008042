"""Decode attention against the slot cache: the error rule, slots in any order, what is not read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from miss.kernels.attention import attention
from miss.kernels.decode_attention import append, decode_attention, decode_attention_append, op
from miss.kernels.kv_cache import kv_append
from miss.kernels.registry import use
from tests.helpers import CPU_ROUTES, assert_as_good_as, route

OTHER_ROUTES = ["torch", "reference", "custom"]
ROUTES = [*CPU_ROUTES, *OTHER_ROUTES]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def plain(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: list[int], lengths: list[int]) -> Tensor:
    """Row by row over exactly its valid positions, in the dtype of its inputs."""
    out = torch.zeros_like(q)
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        if length:
            scores = torch.einsum("hd,nhd->hn", q[row], k_cache[slot, :length]) / q.shape[-1] ** 0.5
            out[row] = torch.einsum("hn,nhd->hd", torch.softmax(scores, -1), v_cache[slot, :length])
    return out


def check(
    way: str, dtype: torch.dtype, slots: list[int], lengths: list[int], shape: tuple[int, ...], slack: float = 2.0
) -> None:
    torch.manual_seed(0)
    num_slots, length, heads, width = shape
    q = torch.randn(len(slots), 3, heads, width)[:, 1].to(dtype)  # a view of the packed projection
    cache = torch.randn(2, num_slots, length, heads, width).to(dtype)
    with route(way, op.FORWARD):
        got = decode_attention(q, cache[0], cache[1], int32(slots), int32(lengths))
    assert got.dtype == dtype
    low, exact = (plain(q.to(t), *cache.to(t), slots, lengths) for t in (dtype, torch.float64))
    assert_as_good_as(got, low, exact, slack)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        (w, t)
        for w in ROUTES
        for t in (torch.float32, torch.bfloat16, torch.float16)
        if (w, t) != ("cpu", torch.float16)
    ],
)
@pytest.mark.parametrize("shape", [(9, 7, 2, 32), (5, 40, 3, 64), (5, 101, 2, 32)], ids=str)
def test_error_rule(shape: tuple[int, ...], way: str, dtype: torch.dtype) -> None:
    longest = shape[1]
    for slots, lengths in (
        ([1, 2, 3], [longest, 1, longest // 2]),  # neighbours
        ([4, 0, 4, 2], [3, longest, 5, 2]),  # any order, one slot twice
        ([3], [1]),
    ):
        check(way, dtype, slots, lengths, shape, slack=3.0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_slots_and_lengths(data: st.DataObject) -> None:
    num_slots, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 80))
    rows = data.draw(st.lists(st.tuples(st.integers(0, num_slots - 1), st.integers(0, length)), max_size=6))
    slots, lengths = [r[0] for r in rows], [r[1] for r in rows]
    check(data.draw(st.sampled_from(ROUTES)), torch.float32, slots, lengths, (num_slots, length, 2, 32), slack=3.0)


@pytest.mark.parametrize("way", ROUTES)
def test_what_is_not_valid_is_not_read(way: str) -> None:
    q, cache = torch.randn(2, 2, 32), torch.randn(2, 4, 9, 2, 32)
    slots, lengths = int32([2, 0]), int32([3, 5])
    with route(way, op.FORWARD):
        before = decode_attention(q, cache[0], cache[1], slots, lengths)
        cache[:, 2, 3:], cache[:, 0, 5:], cache[:, 1] = 1e4, -1e4, 7.0
        assert torch.equal(before, decode_attention(q, cache[0], cache[1], slots, lengths))
        assert not decode_attention(q, cache[0], cache[1], slots, int32([0, 0])).any()


@pytest.mark.parametrize("way", ROUTES)
def test_a_row_does_not_depend_on_its_batch(way: str) -> None:
    q, cache = torch.randn(5, 2, 32), torch.randn(2, 5, 70, 2, 32)
    slots, lengths = int32([4, 1, 0, 2, 3]), int32([70, 2, 9, 1, 33])
    with route(way, op.FORWARD):
        together = decode_attention(q, cache[0], cache[1], slots, lengths)
        for row in range(5):
            one = slice(row, row + 1)
            alone = decode_attention(q[one], cache[0], cache[1], slots[one], lengths[one])
            assert_close(together[one], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(not CPU_ROUTES, reason="the CPU kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(12, 32), (12, 64), (7, 64), (5, 32)])
def test_bitwise_the_same_in_any_batch_and_with_any_threads(heads: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, cache = torch.randn(5, heads, width).to(dtype), torch.randn(2, 5, 70, heads, width).to(dtype)
    slots, lengths = int32([4, 1, 4, 2, 3]), int32([70, 2, 9, 0, 33])
    before = torch.get_num_threads()
    with route("cpu", op.FORWARD):
        together = decode_attention(q, cache[0], cache[1], slots, lengths)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = decode_attention(q, cache[0], cache[1], slots, lengths)
            torch.set_num_threads(before)
            assert torch.equal(again, together)
        for row in range(5):
            one = slice(row, row + 1)
            assert torch.equal(decode_attention(q[one], cache[0], cache[1], slots[one], lengths[one]), together[one])
    check("cpu", dtype, [3, 1, 3], [70, 1, 64], (5, 70, heads, width), slack=3.0)


def test_steps_equal_causal_attention() -> None:
    q, k, v = torch.randn(2, 6, 3, 2, 32).unbind(2)
    expected = attention(q, k, v, causal=True)
    for step in range(6):
        got = decode_attention(q[:, step], k, v, int32([0, 1]), int32([step + 1] * 2))
        assert_close(got, expected[:, step], atol=1e-6, rtol=1e-5)


def test_opcheck_and_compile() -> None:
    q, cache = torch.randn(3, 2, 32), torch.randn(2, 5, 7, 2, 32)
    args = (q, cache[0], cache[1], int32([4, 0, 1]), int32([7, 0, 3]))
    torch.library.opcheck(op._forward, (*args, 0.2))
    assert_close(torch.compile(decode_attention, fullgraph=True, backend="aot_eager")(*args), decode_attention(*args))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ROUTES)
def test_autocast_leaves_the_cache_alone(way: str, cache_dtype: torch.dtype) -> None:
    q, cache = torch.randn(3, 2, 32), torch.randn(2, 5, 7, 2, 32)
    slots, lengths = [4, 0, 1], [7, 2, 3]
    with route(way, op.FORWARD), torch.autocast("cpu", torch.bfloat16):
        got = decode_attention(q, cache[0].to(cache_dtype), cache[1].to(cache_dtype), int32(slots), int32(lengths))
    assert got.dtype == cache_dtype
    assert_close(got.float(), plain(q, cache[0], cache[1], slots, lengths), atol=5e-2, rtol=5e-2)


def test_errors_say_what_was_wanted() -> None:
    q, cache, two = torch.randn(2, 2, 32), torch.randn(3, 5, 2, 32), int32([0, 1])
    for wrong in (cache[..., :8], cache[0]):
        with pytest.raises(ValueError, match=r"wanted \(R, H, D\)"):
            decode_attention(q, wrong, wrong, two, two)
    with pytest.raises(ValueError, match=r"wanted \(2,\)"):
        decode_attention(q, cache, cache, two[:1], two)


def append_inputs(slots: list[int], positions: list[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = torch.randn(len(slots), 3, 2, 32).unbind(1)
    cache = torch.randn(2, 6, 11, 2, 32).to(dtype)
    return q.to(dtype), k, v, cache[0], cache[1], int32(slots), int32(positions)


@pytest.mark.parametrize("way", ["composed", "reference", "custom", *CPU_ROUTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_append_is_an_append_and_then_attention(way: str, dtype: torch.dtype) -> None:
    if way == "cpu" and dtype == torch.float64:
        pytest.skip("the CPU kernels take no float64")
    q, k, v, k_cache, v_cache, slots, positions = append_inputs([4, 4, 0, 2, 2, 2], [3, 4, 10, 0, 1, 2], dtype)
    wanted = k_cache.clone(), v_cache.clone()
    for cache, new in zip(wanted, (k, v), strict=True):
        cache[slots.long(), positions.long()] = new.to(dtype)
    low, exact = (
        plain(q.to(t), *(c.to(t) for c in wanted), slots.tolist(), (positions + 1).tolist())
        for t in (dtype, torch.float64)
    )
    scale = 32**-0.5
    if way == "custom":
        got = append._append(q, k, v, k_cache, v_cache, slots, positions, scale)
    elif way == "cpu":  # both parts
        with route("composed", append.APPEND), use(decode_attention="cpu", kv_append="cpu"):
            got = decode_attention_append(q, k, v, k_cache, v_cache, slots, positions)
    else:
        with route(way, append.APPEND):
            got = decode_attention_append(q, k, v, k_cache, v_cache, slots, positions)
    assert got.dtype == dtype and torch.equal(k_cache, wanted[0]) and torch.equal(v_cache, wanted[1])
    assert_as_good_as(got, low, exact, slack=3.0)


def test_append_opcheck_and_compile() -> None:
    args = append_inputs([4, 0, 1], [7, 0, 3], torch.float32)
    torch.library.opcheck(append._append, (*args, 0.2))
    caches, others = [t.clone() for t in args[3:5]], [t.clone() for t in args[3:5]]
    compiled = torch.compile(decode_attention_append, fullgraph=True, backend="aot_eager")
    got = compiled(*args[:3], *caches, *args[5:])
    assert_close(got, decode_attention_append(*args[:3], *others, *args[5:]))
    kv_append(*args[3:5], *args[1:3], *args[5:])
    assert torch.equal(caches[0], args[3]) and torch.equal(caches[1], args[4])


def test_append_under_autocast_leaves_the_cache_alone() -> None:
    q, k, v, k_cache, v_cache, *rest = append_inputs([4, 0, 1], [7, 0, 3], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = decode_attention_append(q.bfloat16(), k, v, k_cache, v_cache, *rest)
    assert got.dtype == torch.float32 and torch.equal(k_cache[4, 7], k[0])


def test_append_errors_say_what_was_wanted() -> None:
    q, k, v, k_cache, v_cache, slots, positions = append_inputs([4, 0, 1], [7, 0, 3], torch.float32)
    for wrong in ((q, k[:2], v, k_cache, v_cache), (q, k, v, k_cache[..., :8], v_cache[..., :8])):
        with pytest.raises(ValueError, match=r"wanted \(R, H, D\) three times"):
            decode_attention_append(*wrong, slots, positions)
    with pytest.raises(ValueError, match=r"\(3,\) twice"):
        decode_attention_append(q, k, v, k_cache, v_cache, slots[:2], positions)
    with pytest.raises(ValueError, match=r"\(S, L, H, D\) twice"):
        decode_attention_append(q, k, v, k_cache, v_cache[:2], slots, positions)
