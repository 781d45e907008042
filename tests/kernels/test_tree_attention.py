"""Tree attention: the error rule, any ancestors, what is not named is not seen, and a chain is causal attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from miss.kernels.attention import attention
from miss.kernels.tree_attention import op, tree_attention
from tests.helpers import assert_as_good_as, route

ROUTES = ["torch", "reference", "custom"]


def plain(q: Tensor, k: Tensor, v: Tensor, ancestors: list[list[int]]) -> Tensor:
    """Node by node over exactly its ancestors, in the dtype of its inputs."""
    out = torch.zeros_like(q)
    for node, seen in enumerate(ancestors):
        if seen:
            scores = torch.einsum("hd,nhd->hn", q[node], k[seen]) / q.shape[-1] ** 0.5
            out[node] = torch.einsum("hn,nhd->hd", torch.softmax(scores, -1), v[seen])
    return out


def padded(ancestors: list[list[int]], dtype: torch.dtype = torch.int32) -> Tensor:
    longest = max(map(len, ancestors), default=0)
    return torch.tensor([[*a, *[-1] * (longest - len(a))] for a in ancestors], dtype=dtype).view(
        len(ancestors), longest
    )


def tree(num_nodes: int, seed: int = 0) -> list[list[int]]:
    """Every node a child of one before it, or a root."""
    random = torch.Generator().manual_seed(seed)
    seen: list[list[int]] = []
    for node in range(num_nodes):
        parent = int(torch.randint(-1, node, (), generator=random)) if node else -1
        seen.append([*(seen[parent] if parent >= 0 else []), node])
    return seen


def check(way: str, dtype: torch.dtype, ancestors: list[list[int]], heads: int, width: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(len(ancestors), 3, heads, width).to(dtype).unbind(1)  # views of the packed projection
    with route(way, op.FORWARD):
        got = tree_attention(q, k, v, padded(ancestors))
    assert got.dtype == dtype
    low, exact = (plain(q.to(t), k.to(t), v.to(t), ancestors) for t in (dtype, torch.float64))
    assert_as_good_as(got, low, exact, slack=3.0)


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("num_nodes", "heads", "width"), [(1, 2, 32), (67, 3, 64), (131, 2, 32)])
def test_error_rule(num_nodes: int, heads: int, width: int, way: str, dtype: torch.dtype) -> None:
    check(way, dtype, tree(num_nodes), heads, width)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_rows_in_any_order_or_none(data: st.DataObject) -> None:
    num_nodes = data.draw(st.integers(0, 90))
    rows = st.lists(st.integers(0, max(0, num_nodes - 1)), max_size=5, unique=True)
    ancestors = data.draw(st.lists(rows, min_size=num_nodes, max_size=num_nodes))
    check(data.draw(st.sampled_from(ROUTES)), torch.float32, ancestors, 2, 8)


@pytest.mark.parametrize("way", ROUTES)
def test_what_is_not_named_is_not_seen(way: str) -> None:
    q, k, v = torch.randn(3, 70, 2, 32)
    ancestors = padded([*tree(69), []])
    with route(way, op.FORWARD):
        before = tree_attention(q, k, v, ancestors)
        assert not before[69].any()
        k[68], v[68] = 1e4, -1e4  # the last of the tree, nobody's ancestor
        after = tree_attention(q, k, v, ancestors)
    assert torch.equal(before[:68], after[:68]) and not torch.equal(before[68], after[68])


@pytest.mark.parametrize("way", ROUTES)
def test_nan_and_infinity(way: str) -> None:
    q, k, v = torch.rand(4, 1, 8), torch.ones(4, 1, 8), torch.randn(4, 1, 8)
    k[1], k[2], k[3] = float("nan"), torch.inf, -torch.inf
    with route(way, op.FORWARD):
        out = tree_attention(q, k, v, padded([[0, 1], [0, 2], [3], [3, 0]]))
    assert out[:3].isnan().all()  # nothing above -inf: NaN, as torch.softmax gives; beside others weight 0
    assert_close(out[3], v[0])


def test_bitwise_the_same_whatever_else_is_packed() -> None:
    q, k, v = torch.randn(3, 200, 2, 32)
    one, two = tree(80, 1), tree(120, 2)
    together = tree_attention(q, k, v, padded([*one, *[[n + 80 for n in a] for a in two]]))
    assert torch.equal(together[80:], tree_attention(q[80:], k[80:], v[80:], padded(two)))


@pytest.mark.parametrize("way", ROUTES)
def test_a_chain_is_causal_attention(way: str) -> None:
    q, k, v = torch.randn(3, 9, 2, 32)
    with route(way, op.FORWARD):
        got = tree_attention(q, k, v, padded([list(range(n + 1)) for n in range(9)], torch.int64))
    assert_close(got, attention(q[None], k[None], v[None], causal=True)[0], atol=1e-6, rtol=1e-5)


def test_opcheck_and_compile() -> None:
    args = (*torch.randn(3, 7, 2, 32), padded(tree(7)))
    torch.library.opcheck(op._forward, (*args, 0.2))
    assert_close(torch.compile(tree_attention, fullgraph=True, backend="aot_eager")(*args), tree_attention(*args))


def test_autocast_takes_its_dtype() -> None:
    args = (*torch.randn(3, 7, 2, 32), padded(tree(7)))
    with torch.autocast("cpu", torch.bfloat16):
        got = tree_attention(*args)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), tree_attention(*args), atol=5e-2, rtol=5e-2)


def test_errors_say_what_was_wanted() -> None:
    q = torch.randn(4, 2, 32)
    with pytest.raises(ValueError, match=r"wanted \(N, H, D\)"):
        tree_attention(q, q[:3], q, padded(tree(4)))
    for wrong in (padded(tree(3)), padded(tree(4))[0], padded(tree(4)).float()):
        with pytest.raises(ValueError, match=r"wanted int32 or int64 \(4, L\)"):
            tree_attention(q, q, q, wrong)
