"""The head in Triton against float64: the best logits and the log-sum-exp by the error rule, ties, NaN and infinity.

Interpreted, this does not show what a GPU's bfloat16 products round, how its maxima treat NaN, races between programs,
or alignment.
"""

import pytest
import torch
from torch.nn import functional as F

from miss.kernels.launches import Launch
from miss.kernels.linear_top_k import op, reference, triton_impl
from miss.kernels.quant_linear import pack_int8
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

INF = float("inf")
# rows, vocabulary, width, k
SHAPES = [(1, 197, 64, 1), (8, 65, 24, 5), (17, 63, 13, 16), (3, 5, 7, 5), (0, 70, 8, 2), (2, 1, 1, 1), (5, 33, 1, 3)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for kind in triton_impl.LAUNCHES:
        monkeypatch.setitem(triton_impl.LAUNCHES, kind, (Launch({"BM": 16, "BN": 16, "BK": 32}, 1, 1),))


def tensors(rows, vocabulary, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    hidden, bias = torch.randn(rows, width, generator=generator), torch.randn(vocabulary, generator=generator)
    return [t.to(DEVICE, dtype) for t in (hidden, weight, bias * 0.3)]


def check(got, z, plain, k, floor=1e-6):
    """`z`: the exact logits; `plain`: PyTorch's. What is chosen must be worth what the best are, and as reported."""
    values, indices, lse = got
    assert [t.dtype for t in got] == [torch.float32, torch.int64, torch.float32]
    assert values.shape == indices.shape == (len(z), k)
    best = z.topk(k, -1).values
    assert_as_good_as(values, plain.topk(k, -1).values, best, floor=floor, what="values")
    assert_as_good_as(z.gather(-1, indices), plain.topk(k, -1).values, best, floor=floor, what="the words' error")
    assert_as_good_as(lse, plain.double().logsumexp(-1), z.logsumexp(-1), floor=floor, what="lse")
    assert (values[:, 1:] <= values[:, :-1]).all()
    assert all(len(set(row)) == k for row in indices.tolist())


def check_shape(shape, dtype, bias=True, forward=triton_impl.forward):
    *sizes, k = shape
    hidden, weight, b = tensors(*sizes, dtype)
    b = b if bias else None
    z = F.linear(hidden.double(), weight.double(), None if b is None else b.double())
    check(forward(hidden, weight, b, k, None), z, F.linear(hidden, weight, b), k)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype, bias):
    check_shape(shape, dtype, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape, dtype):
    """Sums are exact: only the last multiplications and the addition round."""
    *sizes, k = shape
    hidden, weight, bias = tensors(*sizes)
    hidden, packed = hidden.to(dtype), pack_int8(weight.cpu(), dynamic=True).to(DEVICE)
    z, plain = (
        reference.quant(h, packed.data, packed.scale, bias.to(h.dtype), sizes[1], None, None)
        for h in (hidden.double(), hidden.float())
    )
    logits = torch.empty_like(z[0]).scatter_(1, z[1], z[0])
    low = torch.empty_like(plain[0]).scatter_(1, plain[1], plain[0])
    check(triton_impl.quant(hidden, packed.data, packed.scale, bias, k, None, None), logits, low, k, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_launches_of_the_table(dtype, monkeypatch):
    monkeypatch.undo()
    check_shape((3, 300, 70, 4), dtype)


def test_ties_go_to_the_lower_index():
    """Whole numbers in one column: many equal values, over the tiles' borders; 0 and -0 are equal."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-2, 3, (101, 1), generator=generator).float().to(DEVICE)
    hidden = torch.tensor([-1.0, 0.0, 1.0], device=DEVICE)[:, None]
    values, indices, _ = triton_impl.forward(hidden, weight, None, 16, None)
    wanted = torch.sort(hidden @ weight.T, dim=-1, descending=True, stable=True)
    assert torch.equal(values, wanted.values[:, :16]) and torch.equal(indices, wanted.indices[:, :16])


def test_nan_and_infinity():
    hidden, weight, _ = tensors(4, 100, 8)
    bias = torch.zeros(100, device=DEVICE)
    hidden[1, 3] = float("nan")
    bias[70], bias[16:48] = INF, -INF
    values, indices, lse = triton_impl.forward(hidden, weight, bias, 3, None)
    assert values[1].isnan().all() and lse[1].isnan() and indices[1].tolist() == [0, 1, 2]
    rest = [0, 2, 3]
    assert (indices[rest, 0] == 70).all() and (values[rest, 0] == INF).all() and (lse[rest] == INF).all()
    assert values[rest, 1:].isfinite().all()
    bias[:] = torch.where(torch.arange(100, device=DEVICE) < 2, 0.0, -INF)  # two are finite, and three are wanted
    values, indices, lse = triton_impl.forward(hidden, weight, bias, 3, None)
    assert (values[rest, 2] == -INF).all() and (indices[rest, 2] == 2).all()
    torch.testing.assert_close(lse[rest], (hidden @ weight[:2].T).logsumexp(-1)[rest])
    bias[:] = -INF
    values, indices, lse = triton_impl.forward(hidden[:1], weight, bias, 2, None)
    assert (lse == -INF).all() and (values == -INF).all() and indices.tolist() == [[0, 1]]


def test_large_logits_do_not_overflow():
    hidden, weight, bias = tensors(3, 50, 16)
    for shift in (-3e4, 3e4):
        z = F.linear(hidden.double(), weight.double(), bias.double() + shift)
        lse = triton_impl.forward(hidden, weight, bias + shift, 1, None)[2]
        assert (lse - z.logsumexp(-1)).abs().max() < 1e-2


@pytest.mark.parametrize("form", ["float", "int8"])
def test_bitwise_the_same_in_any_batch_and_strides(form):
    hidden, weight, bias = tensors(19, 70, 40)
    packed = pack_int8(weight.cpu(), dynamic=True).to(DEVICE)

    def run(rows, strided=False):
        if form == "int8":
            return triton_impl.quant(rows, packed.data, packed.scale, bias, 4, None, None)
        head = torch.cat([weight, weight], 1)[:, :40] if strided else weight
        return triton_impl.forward(rows, head, bias, 4, None)

    whole = run(hidden)
    for at in (slice(0, 1), slice(15, 19)):
        assert all(torch.equal(a, t[at]) for a, t in zip(run(hidden[at]), whole, strict=True))
    strided = hidden.T.contiguous().T
    assert all(map(torch.equal, run(strided, True), whole))
    assert all(map(torch.equal, run(torch.cat([hidden, hidden], 1)[:, 40:], True), whole))


@pytest.mark.parametrize("bug", ["width", "words", "tiles", "order", "bias"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    kernel = triton_impl._merge if bug == "tiles" else triton_impl._tiles
    at, wrong = {  # the argument that is changed
        "width": (10, lambda a: a - 1),
        "words": (9, lambda a: a - 1),
        "tiles": (7, lambda a: a - 1),
        "order": (6, lambda a: a.clone()),
        "bias": (4, lambda a: a * 0.9),
    }[bug]

    class Patched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                return kernel[grid](*args[:at], wrong(args[at]), *args[at + 1 :], **options)

            return launch

    monkeypatch.setattr(triton_impl, "_merge" if bug == "tiles" else "_tiles", Patched())
    if bug == "order":  # words that are never written: the merge must not find others
        monkeypatch.setattr(torch, "empty_like", lambda t, **options: torch.zeros(t.shape, **options))
    with pytest.raises(AssertionError):
        check_shape((8, 65, 24, 5), torch.float32)


def test_limits():
    hidden, weight, bias = tensors(4, 70, 8)
    limits = {table.name: next(i for i in table.impls if i.name == "triton").limits for table in (op.FORWARD, op.QUANT)}
    plain, quant = limits["linear_top_k"], limits["linear_top_k_w8a8"]
    assert plain(hidden, weight, bias, 3, None) is None
    assert "one dtype" in plain(hidden, weight.half(), bias, 3, None)
    assert "up to 16" in plain(hidden, weight, bias, 17, None)
    assert "bias" in plain(hidden, weight, bias.double(), 3, None)
    assert "column" in plain(hidden[:, :0], weight[:, :0], bias, 3, None)
    packed = pack_int8(weight.cpu(), dynamic=True)
    assert quant(hidden, packed.data, packed.scale, bias, 3, None, None) is None
    assert "int8" in quant(hidden, packed.data.float(), packed.scale, bias, 3, None, None)
    assert "up to 16" in quant(hidden, packed.data, packed.scale, bias, 17, None, None)
