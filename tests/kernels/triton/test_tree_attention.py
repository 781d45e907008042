"""Tree attention in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show how a GPU rounds to bfloat16 (here it truncates), alignment, or races.
"""

import pytest
import torch

from miss.kernels.launches import Launch
from miss.kernels.tree_attention import op, reference, torch_impl, triton_impl
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

INF = float("inf")
# nodes, longest list, heads, head width
SIZES = [(1, 1, 2, 32), (17, 5, 3, 64), (13, 17, 1, 32), (5, 65, 2, 32), (3, 197, 1, 64), (0, 4, 2, 32), (4, 0, 2, 64)]


def ancestors_of(nodes, longest, dtype=torch.int32):
    """Rows in any order, some places -1 wherever they are, the last node with nothing to see."""
    generator = torch.Generator().manual_seed(1)
    lists = torch.full((nodes, longest), -1, dtype=dtype)
    for node in range(nodes - 1 if nodes > 1 else nodes):
        rows = torch.randperm(nodes, generator=generator)[:longest]
        lists[node, torch.randperm(longest, generator=generator)[: len(rows)]] = rows.to(dtype)
        lists[node][torch.rand(longest, generator=generator) < 0.2] = -1
    return lists.to(DEVICE)


def inputs(nodes, longest, heads, width, dtype):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(nodes, 3, heads, width, generator=generator).to(DEVICE, dtype)
    return *packed.unbind(1), ancestors_of(nodes, longest), width**-0.5


def check(size, dtype, forward=triton_impl.forward):
    q, k, v, *rest = inputs(*size, dtype)
    low = torch_impl.forward(q, k, v, *rest)
    exact = reference.forward(q.double(), k.double(), v.double(), *rest)
    floor = 1e-6 if dtype == torch.float32 else 4e-3  # a place of bfloat16: the interpreter truncates
    assert_as_good_as(forward(q, k, v, *rest), low, exact, slack=3.0, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_rule(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("block", [2, 8])
def test_other_blocks(block, monkeypatch):
    monkeypatch.setitem(triton_impl.LAUNCHES, "tree", (Launch({"BL": block}, 1, 1),))
    check(SIZES[2], torch.float32)


def test_int64_and_strided_lists():
    q, k, v, ancestors, scale = inputs(*SIZES[1], torch.float32)
    wanted = triton_impl.forward(q, k, v, ancestors, scale)
    assert torch.equal(triton_impl.forward(q, k, v, ancestors.long(), scale), wanted)
    assert torch.equal(triton_impl.forward(q, k, v, ancestors.T.contiguous().T, scale), wanted)
    assert torch.equal(triton_impl.forward(q.contiguous(), k.contiguous(), v.contiguous(), ancestors, scale), wanted)


def test_bitwise_the_same_whatever_else_is_packed_and_stands_unseen():
    q, k, v, ancestors, scale = inputs(*SIZES[1], torch.float32)
    together = triton_impl.forward(q, k, v, ancestors, scale)
    longer = torch.cat([ancestors, torch.full((17, 40), -1, dtype=torch.int32, device=DEVICE)], 1)
    assert torch.equal(triton_impl.forward(q, k, v, longer, scale), together)
    front = [torch.full((5, 3, 64), float("nan"), device=DEVICE), torch.full((5, 3, 64), INF, device=DEVICE)]
    k, v = (torch.cat([a, b]) for a, b in zip(front, (k, v), strict=True))
    moved = torch.cat([ancestors[:5] * 0 - 1, torch.where(ancestors < 0, -1, ancestors + 5)])
    assert torch.equal(triton_impl.forward(torch.cat([q[:5], q]), k, v, moved, scale)[5:], together)


def test_nan_and_infinity_among_the_seen():
    q, k, v = torch.randn(3, 4, 1, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q = q.abs()
    k[0], k[1], k[2] = float("nan"), INF, -INF
    lists = torch.tensor([[3, 0], [3, 1], [2, -1], [2, 3]], dtype=torch.int32, device=DEVICE)
    out = triton_impl.forward(q, k, v, lists, 0.2)
    assert out[:3].isnan().all()
    torch.testing.assert_close(out[3], v[3])


@pytest.mark.parametrize("bug", ["mask", "tail", "scale", "list", "stride"])
def test_planted_bugs_are_seen(bug):
    def wrong(q, k, v, ancestors, scale):
        if bug == "mask":
            ancestors = ancestors.clamp(min=0)
        if bug == "tail":
            ancestors = ancestors[:, :-1]
        if bug == "scale":
            scale = 1.0
        if bug == "list":
            ancestors = ancestors.flip(0)
        if bug == "stride":
            k = k.contiguous().transpose(0, 1).reshape(k.shape)
        return triton_impl.forward(q, k, v, ancestors, scale)

    with pytest.raises(AssertionError, match="error"):
        check(SIZES[1], torch.float32, wrong)


def test_the_table_says_what_is_not_taken():
    limits = next(i.limits for i in op.FORWARD.impls if i.name == "triton")
    q, k, v, *rest = inputs(*SIZES[1], torch.float32)
    assert limits(q, k, v, *rest) is None
    assert "32 or 64 wide" in limits(q[..., :16], k[..., :16], v[..., :16], *rest)
    assert "one dtype" in limits(q.bfloat16(), k, v, *rest)
    assert "side by side" in limits(q, k.transpose(0, 2), v, *rest)
