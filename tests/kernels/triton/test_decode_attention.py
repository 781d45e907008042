"""Decode attention in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show how a GPU rounds to bfloat16 (here it truncates), alignment, or races.
"""

import pytest
import torch
import triton
import triton.language as tl

from miss.kernels.decode_attention import append, op, reference, torch_impl, triton_impl
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

INF = float("inf")
# (slots, lengths, (slots, positions, heads, head width))
SIZES = [
    ([1, 2, 3], [7, 1, 3], (9, 7, 2, 32)),
    ([4, 0, 4, 2, 1], [3, 40, 17, 16, 0], (5, 40, 3, 64)),  # any order, one slot twice, a row that sees nothing
    ([4, 0, 2], [101, 64, 65], (5, 101, 1, 32)),
    ([1], [197], (2, 197, 1, 64)),
    ([], [], (2, 5, 2, 32)),
]


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(slots, lengths, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    num_slots, length, heads, width = shape
    q = torch.randn(len(slots), 3, heads, width, generator=generator)[:, 1]  # a view of the packed projection
    cache = torch.randn(num_slots, length, 2, heads, width, generator=generator)
    q, cache = q.to(DEVICE, dtype), cache.to(DEVICE, dtype)
    return q, cache[:, :, 0], cache[:, :, 1], int32(slots), int32(lengths), width**-0.5


def check(size, dtype, forward=triton_impl.forward):
    q, k, v, *rest = inputs(*size, dtype)
    low = torch_impl.forward(q, k, v, *rest)
    exact = reference.forward(q.double(), k.double(), v.double(), *rest)
    floor = 1e-6 if dtype == torch.float32 else 4e-3  # a place of bfloat16: the interpreter truncates
    assert_as_good_as(forward(q, k, v, *rest), low, exact, slack=3.0, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[2]))
def test_error_rule(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("launches", [triton_impl.LAUNCHES[k] for k in ("short", "long")], ids=["short", "long"])
def test_every_block(launches, monkeypatch):
    for launch in launches:
        monkeypatch.setattr(triton_impl, "LAUNCHES", {"short": (launch,), "long": (launch,)})
        for size in SIZES[1:3]:
            check(size, torch.float32)


@pytest.mark.parametrize("size", SIZES[1:3], ids=lambda size: str(size[2]))
def test_bitwise_the_same_in_any_batch_and_whatever_stands_unseen(size):
    q, k, v, slots, lengths, scale = inputs(*size, torch.float32)
    together = triton_impl.forward(q, k, v, slots, lengths, scale)
    for row in range(len(q)):
        one = slice(row, row + 1)
        assert torch.equal(triton_impl.forward(q[one], k, v, slots[one], lengths[one], scale), together[one])
    longest = torch.zeros(len(k), dtype=torch.int32, device=DEVICE).scatter_reduce_(0, slots.long(), lengths, "amax")
    unseen = torch.arange(k.shape[1], device=DEVICE) >= longest[:, None]
    k[unseen], v[unseen] = float("nan"), INF
    assert torch.equal(triton_impl.forward(q, k, v, slots, lengths, scale), together)


def test_nan_and_infinity_among_the_visible():
    q, k, v, slots, lengths, scale = inputs([0, 1, 2, 3], [5, 5, 5, 5], (4, 9, 1, 32), torch.float32)
    q[:] = q.abs()
    k[0, 2], k[1, 3], k[2, :5], k[3, 1] = float("nan"), INF, -INF, -INF
    out = triton_impl.forward(q, k, v, slots, lengths, scale)
    assert out[:3].isnan().all()
    torch.testing.assert_close(out[3], reference.forward(q, k, v, slots, lengths, scale)[3])


@pytest.mark.parametrize("bug", ["mask", "tail", "scale", "slot", "stride"])
def test_planted_bugs_are_seen(bug):
    def wrong(q, k, v, slots, lengths, scale):
        if bug == "mask":
            lengths = torch.full_like(lengths, k.shape[1])
        if bug == "tail":
            lengths = (lengths - 1).clamp(min=0)
        if bug == "scale":
            scale = 1.0
        if bug == "slot":
            slots = slots.flip(0)
        if bug == "stride":
            k = k.contiguous().transpose(1, 2).reshape(k.shape)
        return triton_impl.forward(q, k, v, slots, lengths, scale)

    with pytest.raises(AssertionError, match="error"):
        check(SIZES[1], torch.float32, wrong)


def test_the_table_says_what_is_not_taken():
    limits = next(i.limits for i in op.FORWARD.impls if i.name == "triton")
    q, k, v, *rest = inputs(*SIZES[0], torch.float32)
    assert limits(q, k, v, *rest) is None
    assert "32 or 64 wide" in limits(q[..., :16], k[..., :16], v[..., :16], *rest)
    assert "one dtype" in limits(q.bfloat16(), k, v, *rest)
    assert "side by side" in limits(q, k.transpose(1, 3), v, *rest)


# (slots, positions, (slots, positions, heads, head width)): rows of one slot stand together at successive positions
APPENDS = [
    ([1, 2, 3], [6, 0, 3], (9, 7, 2, 32)),
    ([4, 4, 0, 2, 2, 2], [3, 4, 39, 14, 15, 16], (5, 40, 2, 64)),  # across the border of two blocks
    ([3, 3, 1], [0, 1, 100], (5, 101, 1, 32)),
    ([0] * 70 + [1], [*range(70), 5], (2, 70, 1, 32)),  # more than the rows that are looked at together
    ([], [], (2, 5, 2, 32)),
]


def append_inputs(slots, positions, shape, dtype, new_dtype=None):
    generator = torch.Generator().manual_seed(0)
    num_slots, length, heads, width = shape
    packed = torch.randn(len(slots), 3, heads, width, generator=generator).to(DEVICE, new_dtype or dtype)
    q, k, v = packed.unbind(1)
    cache = torch.randn(num_slots, length, 2, heads, width, generator=generator).to(DEVICE, dtype)
    return q.to(dtype), k, v, cache[:, :, 0], cache[:, :, 1], int32(slots), int32(positions), width**-0.5


@pytest.mark.parametrize(
    ("dtype", "new_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("size", APPENDS, ids=lambda size: str(size[2]))
def test_append_is_bitwise_an_append_and_then_attention(size, dtype, new_dtype):
    q, k, v, k_cache, v_cache, slots, positions, scale = append_inputs(*size, dtype, new_dtype)
    before, wanted = k_cache.clone(), (k_cache.clone(), v_cache.clone())
    for cache, new in zip(wanted, (k, v), strict=True):
        cache[slots.long(), positions.long()] = new.to(dtype)
    expected = triton_impl.forward(q, *wanted, slots, positions + 1, scale)
    k_cache[slots.long(), positions.long()] = float("nan")  # what is there before is not read
    out = triton_impl.append(q, k, v, k_cache, v_cache, slots, positions, scale)
    assert torch.equal(out, expected)
    assert torch.equal(k_cache, wanted[0]) and torch.equal(v_cache, wanted[1])
    assert len(slots) == 0 or not torch.equal(before, k_cache)


def test_appended_rows_against_float64():
    q, k, v, k_cache, v_cache, *rest = append_inputs(*APPENDS[1], torch.float32)
    doubled = [t.double() for t in (q, k, v, k_cache, v_cache)]
    exact = append.APPEND.impls[-1].run(*doubled, *rest)
    low = append.APPEND.impls[-2].run(q, k, v, k_cache.clone(), v_cache.clone(), *rest)
    assert_as_good_as(triton_impl.append(q, k, v, k_cache, v_cache, *rest), low, exact, slack=3.0)


@pytest.mark.parametrize("bug", ["position", "order", "values", "chain"])
def test_planted_bugs_of_the_append_are_seen(bug):
    q, k, v, k_cache, v_cache, slots, positions, scale = append_inputs(*APPENDS[1], torch.float32)
    wanted = k_cache.clone(), v_cache.clone()
    for cache, new in zip(wanted, (k, v), strict=True):
        cache[slots.long(), positions.long()] = new
    expected = triton_impl.forward(q, *wanted, slots, positions + 1, scale)
    if bug == "position":
        positions = (positions - 1).clamp(min=0)
    if bug == "order":
        q, k, v, slots, positions = (t.flip(0) for t in (q, k, v, slots, positions))
        expected = expected.flip(0)  # rows of a slot that fall: others' new rows are not seen
    if bug == "values":
        v = k
    if bug == "chain":
        slots = torch.arange(6, device=DEVICE, dtype=torch.int32) % 5
    out = triton_impl.append(q, k, v, k_cache, v_cache, slots, positions, scale)
    assert not torch.allclose(out, expected)


def test_the_appends_table_says_what_is_not_taken():
    limits = next(i.limits for i in append.APPEND.impls if i.name == "triton")
    q, k, v, *rest = append_inputs(*APPENDS[0], torch.float32)
    assert limits(q, k, v, *rest) is None and limits(q, k.half(), v.half(), *rest) is None
    assert "rows" in limits(q, k.double(), v, *rest)
    assert "side by side" in limits(q, k.transpose(1, 2), v, *rest)
    assert "one dtype" in limits(q.half(), k, v, *rest)


@triton.jit
def _first_of_all(slots, positions, out):
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row)
    tl.store(out + row, triton_impl._first_new(slots, positions, row, slot, position, 4))


def test_which_positions_are_not_read_from_the_cache():
    """Programs run in order here: only this shows that none reads what another one of the launch writes."""
    slots = int32([7, 7, 7, 7, 7, 7, 7, 7, 2, 3, 3, 3, 2, 3, 3])
    positions = int32([0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 9, 9, 10, 11])
    out = torch.full_like(slots, -1)
    _first_of_all[(len(slots),)](slots, positions, out)
    assert out.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 8, 5, 5, 9, 9, 10, 10]
