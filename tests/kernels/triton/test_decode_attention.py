"""Decode attention in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show how a GPU rounds to bfloat16 (here it truncates), alignment, or races.
"""

import pytest
import torch

from miss.kernels.decode_attention import op, reference, torch_impl, triton_impl
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
