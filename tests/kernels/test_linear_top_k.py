"""The language-model head: the best logits and the log-sum-exp by the error rule, ties, what it must not depend on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from miss.kernels import extension
from miss.kernels.linear import prepare
from miss.kernels.linear_top_k import linear_top_k, op
from miss.kernels.quant_linear import PackedWeight, pack_int4, pack_int8, quant_linear
from miss.kernels.quant_linear import prepare as prepare_packed
from miss.kernels.registry import use
from tests.helpers import assert_as_good_as, route, threads, unaligned

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ROUTES = ["torch", "reference", "custom", "cpu"]
ROUTED = [(name, dtype) for name in ROUTES for dtype in DTYPES if name != "cpu" or dtype in op.CPU_DTYPES]
SHAPES = [
    (1, 197, 64, 1),
    (8, 1023, 96, 5),
    (7, 63, 13, 16),
    (50, 129, 33, 3),
    (3, 5, 7, 5),
    (0, 70, 8, 2),
    (2, 1, 1, 1),
]
Head = tuple[Tensor, Tensor, Tensor]


def tensors(rows: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32) -> Head:
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, width) * width**-0.5
    return torch.randn(rows, width).to(dtype), weight.to(dtype), (torch.randn(vocabulary) * 0.3).to(dtype)


def call(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, k: int) -> Head:
    """With the weight prepared where a kernel wants that."""
    if isinstance(weight, PackedWeight):
        return linear_top_k(hidden, prepare_packed(weight), bias, k)
    return linear_top_k(hidden, weight, bias, k, prepare(weight))


def check(got: Head, z: Tensor, plain: Tensor, k: int) -> None:
    """`z`: the exact logits. What is chosen must be worth, by them, what the best are, and be what is reported."""
    values, indices, lse = got
    best = z.topk(k, -1).values
    assert_as_good_as(values, plain.topk(k, -1).values, best, what="values")
    assert_as_good_as(z.gather(-1, indices), plain.topk(k, -1).values, best, what="what the indices stand for")
    assert_as_good_as(lse, plain.double().logsumexp(-1), z.logsumexp(-1), what="lse")
    assert (values[:, 1:] <= values[:, :-1]).all()
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize(("name", "dtype"), ROUTED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, name, dtype):
    *sizes, k = shape
    hidden, weight, bias = tensors(*sizes, dtype)
    for b in (bias, None):
        z = F.linear(hidden.double(), weight.double(), None if b is None else b.double())
        with route(name, op.FORWARD):
            got = call(hidden, weight, b, k)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        assert [t.dtype for t in got] == [acc, torch.int64, acc]
        check(got, z, F.linear(hidden, weight, b), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape, name, dtype):
    """W8A8's logits are quant_linear's; sums are exact, so that only the last rounding differs."""
    *sizes, k = shape
    if name == "torch" and sizes[2] == 1:
        pytest.skip("torch._int_mm is wrong for one column on CPU")
    hidden, weight, bias = tensors(*sizes)
    hidden, packed = hidden.to(dtype), pack_int8(weight, dynamic=True)
    with use(quant_linear_w8a8="reference"):
        z = quant_linear(hidden.double(), packed, bias.double())
        plain = quant_linear(hidden, packed, bias)
    with route(name, op.QUANT):
        check(call(hidden, packed, bias, k), z, plain, k)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_ties_go_to_the_lower_index(data):
    """Whole numbers in one column: many equal values, over the panels' borders."""
    vocabulary, rows = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, min(16, vocabulary)))
    weight = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=vocabulary, max_size=vocabulary))).float()
    hidden = torch.randint(-1, 2, (rows, 1)).float()
    z = hidden * weight
    wanted = torch.sort(z, dim=-1, descending=True, stable=True)
    for name in ("torch", "reference", "cpu"):
        with route(name, op.FORWARD):
            values, indices, _ = call(hidden, weight[:, None], None, k)
        assert torch.equal(values, wanted.values[:, :k]) and torch.equal(indices, wanted.indices[:, :k])


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_cpu_row_does_not_see_its_batch_or_the_threads(form):
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    hidden, weight, bias = tensors(61, 1111, 96, dtype)
    head = pack_int8(weight, dynamic=True) if form == "int8" else weight
    table = op.QUANT if form == "int8" else op.FORWARD
    with route("cpu", table):
        whole = call(hidden, head, bias, 7)
        for count in (2, 3, 5):
            with threads(count):
                assert all(map(torch.equal, call(hidden, head, bias, 7), whole))
        for at in (slice(0, 1), slice(47, 49), slice(60, 61)):
            alone = call(unaligned(hidden[at]), head, bias, 7)
            assert all(torch.equal(a, t[at]) for a, t in zip(alone, whole, strict=True))
        strided = hidden.t().contiguous().t()
        assert not strided.is_contiguous()
        assert all(map(torch.equal, call(strided, head, bias, 7), whole))


def test_cpu_nan_and_infinity():
    hidden, weight, _ = tensors(4, 300, 8)
    bias = torch.zeros(300)
    hidden[1, 3] = float("nan")
    bias[200], bias[64:128] = float("inf"), float("-inf")
    with route("cpu", op.FORWARD):
        values, indices, lse = call(hidden, weight, bias, 3)
    assert values[1].isnan().all() and lse[1].isnan() and indices[1].tolist() == [0, 1, 2]
    rest = [0, 2, 3]
    assert (
        (indices[rest, 0] == 200).all()
        and (values[rest, 0] == float("inf")).all()
        and (lse[rest] == float("inf")).all()
    )
    assert values[rest, 1:].isfinite().all()
    bias[200] = 0
    bias[:] = torch.where(torch.arange(300) < 2, bias, float("-inf"))  # two logits are finite, and three are wanted
    with route("cpu", op.FORWARD):
        values, indices, lse = call(hidden, weight, bias, 3)
    assert (values[rest, 2] == float("-inf")).all() and (indices[rest, 2] == 2).all()
    torch.testing.assert_close(lse[rest], (hidden @ weight[:2].T).logsumexp(-1)[rest])
    with route("cpu", op.FORWARD):
        assert (call(hidden[:1], weight, torch.full((300,), float("-inf")), 1)[2] == float("-inf")).all()


def test_large_logits_do_not_overflow():
    hidden, weight, bias = tensors(3, 200, 16)
    for shift in (-3e4, 3e4):
        z = F.linear(hidden.double(), weight.double(), bias.double() + shift)
        for name in ("torch", "reference", "cpu"):
            with route(name, op.FORWARD):
                lse = call(hidden, weight, bias + shift, 1)[2]
            assert (lse - z.logsumexp(-1)).abs().max() < 1e-2


def test_what_the_cpu_row_refuses_and_packs():
    hidden, weight, bias = tensors(op.ROWS_WORTH_PACKING, 130, 8)
    if reason := extension.missing():
        pytest.skip(reason)
    for args, says in (((hidden[:2], weight, bias, 2), "not prepared"), ((hidden, weight, bias, 17), "up to 16")):
        with use(linear_top_k="cpu"), pytest.raises(NotImplementedError, match=says):
            linear_top_k(*args)
    with use(linear_top_k="cpu", linear_top_k_w8a8="cpu"):
        for head in (weight, pack_int8(weight, dynamic=True)):
            assert all(map(torch.equal, linear_top_k(hidden, head, bias, 2), call(hidden, head, bias, 2)))
    assert prepare(weight.double()) is None


def test_autocast():
    hidden, weight, bias = tensors(5, 130, 8)
    halves = call(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for panels in (None, prepare(weight), prepare(weight.bfloat16())):
            got = linear_top_k(hidden, weight, bias, 2, panels)
            assert got[0].dtype == torch.float32
            torch.testing.assert_close(got[2], halves[2], atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h, w, b: (h[:, 1:], w, b, 1), "wants hidden"),
        (lambda h, w, b: (h, w, b[1:], 1), "wants hidden"),
        (lambda h, w, b: (h, w, b, 0), "wanted 1 … 30"),
        (lambda h, w, b: (h, w, b, 31), "wanted 1 … 30"),
        (lambda h, w, b: (h, pack_int8(w), b, 1), "W8A8"),
        (lambda h, w, b: (h, pack_int4(w, 32, search=False), b, 1), "W8A8"),
    ],
)
def test_bad_arguments(change, says):
    with pytest.raises(ValueError, match=says):
        linear_top_k(*change(*tensors(2, 30, 8)))


def test_opcheck_and_compile():
    checks = ("test_schema", "test_faketensor")
    hidden, weight, bias = tensors(4, 70, 8)
    packed = prepare_packed(pack_int8(weight, dynamic=True))
    for head, table, custom in ((weight, op.FORWARD, op._forward), (packed, op.QUANT, op._quant)):
        args = (hidden, weight, bias, 3, prepare(weight))
        if head is packed:
            args = (hidden, packed.data, packed.scale, bias, 3, *(packed.prepared or (None, None)))
        for name in ("torch", "reference", "custom"):
            with route(name, table):
                torch.library.opcheck(custom, args, test_utils=checks)

        def step(hidden: Tensor, head: Tensor | PackedWeight = head) -> Tensor:
            values, indices, lse = linear_top_k(hidden, head, bias, 3)
            return (values - lse[:, None]).sum() + indices.sum()

        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(hidden), step(hidden))
