"""Linear layers: the error rule, prepared weights, threads and batch mates, what a kernel does at its edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from miss.kernels import extension
from miss.kernels.gelu_mlp import gelu_mlp
from miss.kernels.gelu_mlp import op as gelu_op
from miss.kernels.linear import linear, op, prepare
from tests.helpers import CPU_ROUTES, assert_as_good_as, check_error_rule, route, threads

DTYPES = [torch.float32, torch.bfloat16]
OTHER_ROUTES = ["torch", "reference", "custom"]
SHAPES = [((2, 97), 64, 96), ((1, 257), 31, 17), ((13,), 48, 101), ((0, 3), 8, 5), ((), 32, 16), ((1, 1), 1, 7)]
built = pytest.mark.skipif(not CPU_ROUTES, reason=str(extension.missing()))


def tensors(rows, inputs, outputs) -> list[Tensor]:
    """x, weight, bias, residual."""
    shapes = [(*rows, inputs), (outputs, inputs), (outputs,), (*rows, outputs)]
    scales = (1, inputs**-0.5, 0.2, 1)
    return [torch.randn(s) * scale for s, scale in zip(shapes, scales, strict=True)]


def plain(x, w, b=None, residual=None):
    y = F.linear(x, w, b)
    return y if residual is None else y + residual


def prepared(x, w, b=None, residual=None):
    return linear(x, w, b, residual, prepare(w))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*CPU_ROUTES, *OTHER_ROUTES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, name, dtype):
    if name == "cpu" and dtype not in DTYPES:
        pytest.skip("float32 and bfloat16 alone")
    with route(name, op.FORWARD):
        floor = 1e-12 if dtype == torch.float64 else 1e-6
        check_error_rule(prepared, plain, tensors(*shape), dtype, floor=floor)
        check_error_rule(prepared, plain, tensors(*shape)[:2], dtype, floor=floor)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 6, 7, 48, 49, 101, 197])
def test_every_way_of_sharing_out(rows, dtype):
    """Few rows are shared out by columns, many by rows; K beyond the spans of a sum, N with a tail."""
    x, w, b, residual = (t.to(dtype) for t in tensors((rows,), 1101, 203))
    exact = plain(*(t.double() for t in (x, w, b, residual)))
    for count in (1, 2, 3):
        with threads(count), route("cpu", op.FORWARD):
            got = prepared(x, w, b, residual)
            assert_as_good_as(got, plain(x, w, b, residual), exact)
            if count == 1:
                first = got
            assert torch.equal(got, first), f"{count} threads"
            alone = torch.cat([prepared(x[i : i + 1], w, b, residual[i : i + 1]) for i in (0, rows // 2, rows - 1)])
            assert torch.equal(alone, got[[0, rows // 2, rows - 1]]), "a row depends on its batch"


@built
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    inputs=st.integers(1, 140),
    outputs=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 3),
)
def test_any_size_and_address(rows, inputs, outputs, dtype, offset):
    x, w, b, residual = (t.to(dtype) for t in tensors((rows,), inputs, outputs))
    moved = torch.empty(x.numel() + offset, dtype=dtype)[offset:].view_as(x).copy_(x)
    with torch.no_grad():
        for ours, want, op_ in (
            (lambda: linear(moved, w, b, residual, prepare(w)), lambda *t: plain(*t), op),
            (lambda: gelu_mlp(moved, w, b, prepare(w)), lambda x, w, b, _: F.gelu(F.linear(x, w, b)), gelu_op),
        ):
            with route("cpu", op_.FORWARD):
                exact = want(*(t.double() for t in (x, w, b, residual)))
                assert_as_good_as(ours(), want(x, w, b, residual), exact, slack=3)


@built
def test_any_strides():
    x, w, b, residual = tensors((14, 6), 10, 12)
    x, w, residual = x.transpose(0, 1)[:, ::2], w.T.contiguous().T, residual.transpose(0, 1)[:, ::2]
    b = torch.stack([b, b], 1)[:, 0]
    with route("cpu", op.FORWARD):
        check_error_rule(prepared, plain, [x, w, b, residual], torch.float32)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype):
    x, w, b, _ = (t.to(dtype) for t in tensors((5,), 70, 66))
    x[1, 3], x[2, 69], x[4, 0] = torch.nan, torch.inf, -torch.inf
    with route("cpu", op.FORWARD), torch.no_grad():
        got, want = prepared(x, w, b), plain(x, w, b)
    assert torch.equal(got.isfinite(), want.isfinite()) and torch.equal(got.isnan(), want.isnan())
    assert got[1].isnan().all() and got[0].isfinite().all() and got[3].isfinite().all()


@built
def test_what_is_not_prepared():
    """Many rows pay for laying out the weight, few do not; a weight of another dtype is ignored."""
    w = torch.randn(8, 8)
    row = next(i for i in op.FORWARD.impls if i.name == "cpu")
    assert op.FORWARD.why_not(row, torch.randn(64, 8), w, None, None, None) is None
    assert "not prepared" in str(op.FORWARD.why_not(row, torch.randn(63, 8), w, None, None, None))
    assert op.FORWARD.why_not(row, torch.randn(1, 8), w, None, None, prepare(w)) is None
    x = torch.randn(100, 8)
    with torch.no_grad(), route("cpu", op.FORWARD):
        assert torch.equal(linear(x, w), linear(x, w, None, None, prepare(w)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear(x, w, None, None, prepare(w)), linear(x.bfloat16(), w.bfloat16()))


@built
def test_only_the_gradients_that_are_wanted():
    x, w, b, residual = tensors((70,), 9, 5)
    for wanted in ([x], [w], [b], [residual], [x, residual]):
        leaves = [t.clone().requires_grad_(any(t is u for u in wanted)) for t in (x, w, b, residual)]
        grads = torch.autograd.grad(linear(*leaves).square().sum(), [t for t in leaves if t.requires_grad])
        exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        truth = torch.autograd.grad(plain(*exact).square().sum(), [t for t in exact if t.requires_grad])
        for g, e in zip(grads, truth, strict=True):
            torch.testing.assert_close(g.double(), e, atol=1e-4, rtol=1e-4)


def test_bad_arguments():
    x, w, b, residual = tensors((5,), 8, 6)
    for bad in ((x, w[:, :7], b), (x, w, b[:5]), (x, w[0], b), (x, w, b, residual[:4])):
        with pytest.raises(ValueError, match="wanted"):
            linear(*bad)


def test_dtypes_that_do_not_go_together():
    x, w, b, _ = tensors((70,), 8, 6)
    for call in (lambda x, w: linear(x, w), lambda x, w: gelu_mlp(x, w, None)):
        for wrong in ((x, w.bfloat16()), (x.bfloat16(), w.double()), (x.double(), w)):
            with pytest.raises(ValueError, match="wanted one dtype"):
                call(*wrong)


def test_opcheck():
    x, w, b, residual = (t.requires_grad_() for t in tensors((4, 3), 8, 6))
    torch.library.opcheck(op._forward, (x, w, b, residual, None))
    torch.library.opcheck(op._forward, (x, w, b, residual, prepare(w)))
    dy = torch.randn(4, 3, 6)
    torch.library.opcheck(
        op._backward, (dy, x.detach(), w.detach(), True, False, True), test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_without_a_break():
    x, w, b, residual = (t.requires_grad_() for t in tensors((4, 9), 8, 6))
    panels = prepare(w)
    for given_panels in (None, panels):

        def loss(x: Tensor, panels: Tensor | None = given_panels) -> Tensor:
            return linear(x, w, b, residual, panels).square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), plain(x, w, b, residual).square().sum())


@pytest.mark.parametrize("name", [*CPU_ROUTES, *OTHER_ROUTES])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_float32_weight_under_autocast(shape, name):
    """As good as with the weight rounded beforehand; its gradient is float32 and need not be rounded on the way."""
    x, w, b, residual = tensors(*shape)

    def gradients(dtype: torch.dtype, call) -> list[Tensor]:
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (x, w, b, residual)]
        y = call(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    exact, rounded = gradients(torch.float64, plain), gradients(torch.bfloat16, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), route(name, op.FORWARD):
        some = gradients(torch.float32, linear)
    assert some[0].dtype == torch.bfloat16 and some[2].dtype == torch.float32
    for what, g, p, e in zip(("y", "dx", "dweight", "dbias", "dresidual"), some, rounded, exact, strict=True):
        assert_as_good_as(g, p, e, what=what)
