"""Linear and exact GELU, by the error rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.gelu_mlp import gelu_mlp, op
from miss.kernels.linear import prepare
from tests.helpers import CPU_ROUTES, assert_as_good_as, check_error_rule, route

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((2, 197), 64, 96), ((1, 577), 31, 17), ((13,), 48, 101), ((0, 3), 8, 5), ((), 32, 16), ((1, 1), 1, 7)]
ROUTES = ["torch", "reference", "custom"]
CPU_DTYPES = (torch.float32, torch.bfloat16)


def tensors(rows, width, inner) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*rows, width) * 2, torch.randn(inner, width) * width**-0.5, torch.randn(inner) * 0.2]


def prepared(x, w, b):
    return gelu_mlp(x, w, b, prepare(w))


def plain(x, w, b=None):
    return F.gelu(F.linear(x, w, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CPU_ROUTES, *ROUTES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, name, dtype):
    if name == "cpu" and dtype not in CPU_DTYPES:
        pytest.skip("float32 and bfloat16 alone")
    with route(name, op.FORWARD):
        check_error_rule(prepared, plain, tensors(*shape), dtype, floor=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", ROUTES)
def test_without_bias_and_with_any_strides(name):
    x, w, _ = tensors((14, 6), 10, 12)
    x, w = x.transpose(0, 1)[:, ::2], w.T.contiguous().T
    assert not x.is_contiguous() and not w.is_contiguous()
    with route(name, op.FORWARD):
        check_error_rule(lambda x, w: gelu_mlp(x, w, None), plain, [x, w], torch.float32)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 9), width=st.integers(1, 33), inner=st.integers(1, 33))
def test_any_size(rows, width, inner):
    x, w, b = tensors((rows,), width, inner)
    for name in ("torch", "reference"):
        with route(name, op.FORWARD), torch.no_grad():
            assert_as_good_as(gelu_mlp(x, w, b), plain(x, w, b), plain(x.double(), w.double(), b.double()), slack=3)


def test_the_exact_form_not_the_approximation():
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    truth = x * torch.special.ndtr(x)
    for name in ("torch", "reference"):
        with route(name, op.FORWARD):
            assert (gelu_mlp(x, one, zero) - truth).abs().max() < 1e-14
    assert (F.gelu(x, approximate="tanh") - truth).abs().max() > 1e-4


@pytest.mark.parametrize("name", ROUTES)
def test_what_is_kept_for_backward(name):
    """The pre-activation in x's dtype where a gradient is needed, nothing where none is."""
    x, w, b = tensors((5,), 8, 6)
    with route(name, op.FORWARD):
        assert op.FORWARD(x, w, b, True, None)[1].shape == (5, 6)
        assert op.FORWARD(x, w, b, False, None)[1].numel() == 0
        with torch.no_grad():
            assert not gelu_mlp(x.requires_grad_(), w, b).requires_grad


def test_autocast():
    x, w, b = tensors((5,), 8, 6)
    w.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ROUTES:
            with route(name, op.FORWARD):
                y = gelu_mlp(x, w, b)
            assert y.dtype == torch.bfloat16
            assert torch.autograd.grad(y.float().sum(), w)[0].dtype == torch.float32


def test_bad_arguments():
    x, w, b = tensors((5,), 8, 6)
    for bad in ((x, w[:, :7], b), (x, w, b[:5]), (x, w[0], b)):
        with pytest.raises(ValueError, match="wanted"):
            gelu_mlp(*bad)


def test_opcheck():
    x, w, b = (t.requires_grad_() for t in tensors((4, 3), 8, 6))
    torch.library.opcheck(op._forward, (x, w, b, True, None))
    checks = ("test_schema", "test_faketensor")
    for dtype in DTYPES:
        x, w, b = (t.to(dtype) for t in tensors((4, 3), 8, 6))
        for name in ROUTES[:2]:
            with route(name, op.FORWARD):
                torch.library.opcheck(op._forward, (x, w, None, False, None), test_utils=checks)
                pre = F.linear(x, w, b)
                torch.library.opcheck(op._backward, (pre + 1, x, w, pre), test_utils=checks)


def test_compiles_without_a_break():
    x, w, b = (t.requires_grad_() for t in tensors((4, 9), 8, 6))
    compiled = torch.compile(lambda x: gelu_mlp(x, w, b).square().sum(), fullgraph=True, backend="aot_eager")
    got, wanted = compiled(x), gelu_mlp(x, w, b).square().sum()
    torch.testing.assert_close(got, wanted)
    for g, e in zip(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(wanted, (x, w, b)), strict=True):
        torch.testing.assert_close(g, e)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(lambda x: gelu_mlp(x, w, b), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), gelu_mlp(x, w, b))
