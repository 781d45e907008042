"""Layer norm, plain and after residual and dropout, by the error rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.dropout import as_seed, keep_mask
from miss.kernels.layer_norm import add_layer_norm, layer_norm, op
from tests.helpers import assert_as_good_as, check_error_rule, route

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 197, 96), (1, 577, 64), (3, 257, 13), (1, 1, 1023), (7,), (0, 5, 8), (5, 17)]
ROUTES = ["torch", "reference", "custom"]


def parameters(width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(width) * 0.3 + 1, torch.randn(width) * 0.1


def plain(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, name, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(shape) * 2 + 0.5, *parameters(shape[-1])]
    with route(name, op.FORWARD):
        check_error_rule(layer_norm, plain, inputs, dtype, floor=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_add_error_rule(dropout_p, dtype, name):
    torch.manual_seed(0)
    shape = (3, 37, 31)
    inputs = [torch.randn(shape), torch.randn(shape), *parameters(31)]
    mask = torch.ones(shape) if not dropout_p else keep_mask(as_seed(7, 0.3), shape, 0.3, torch.device("cpu"))

    def plain_add(x, residual, w, b):
        summed = residual + x * mask.to(x.dtype) / (1 - dropout_p)
        return plain(summed, w, b), summed

    def ours(x, residual, w, b):
        return add_layer_norm(x, residual, w, b, dropout_p=dropout_p, seed=7)

    with route(name, op.ADD_FORWARD):
        check_error_rule(ours, plain_add, inputs, dtype)


@pytest.mark.parametrize("name", ROUTES)
def test_strides_do_not_matter(name):
    torch.manual_seed(0)
    x, (w, b) = torch.randn(13, 5, 8).transpose(0, 1)[:, ::2], parameters(8)
    assert not x.is_contiguous()
    with route(name, op.FORWARD):
        check_error_rule(layer_norm, plain, [x, w, b], torch.float32)
        x.requires_grad_()
        one = torch.autograd.grad(layer_norm(x, w, b).sum(), x)[0]  # an incoming gradient of stride 0
        other = torch.autograd.grad(layer_norm(x, w, b), x, torch.ones(x.shape))[0]
    torch.testing.assert_close(one, other)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 9), width=st.integers(1, 67), scale=st.sampled_from([1e-3, 1.0, 1e3]), shift=st.floats(-9, 9)
)
def test_any_size(rows, width, scale, shift):
    x, (w, b) = torch.randn(rows, width) * scale + shift, parameters(width)
    for name in ("torch", "reference"):
        with route(name, op.FORWARD):
            got = layer_norm(x, w, b)
        # Deviations of 1e-3 around 9 lose four digits to cancellation, in a few random places the more.
        assert_as_good_as(got, plain(x, w, b), plain(x.double(), w.double(), b.double()), slack=10, floor=1e-5)


def test_a_row_of_one_number_is_the_bias():
    x, (w, b) = torch.randn(5, 1), parameters(1)
    for name in ROUTES:
        with route(name, op.FORWARD):
            assert torch.equal(layer_norm(x, w, b), b.expand(5, 1))


def test_statistics_are_float32_under_half_inputs():
    """A large mean: statistics in bfloat16 would lose the deviations altogether."""
    x, w, b = (torch.randn(4, 256) + 64).bfloat16(), torch.ones(256).bfloat16(), torch.zeros(256).bfloat16()
    exact = x.double()
    for name in ("torch", "reference"):
        with route(name, op.FORWARD):
            _, mean, rstd = op.FORWARD(x, w, b, 1e-5)
        assert mean.dtype == rstd.dtype == torch.float32
        assert (mean - exact.mean(-1)).abs().max() < 1e-4
        assert (rstd * exact.var(-1, unbiased=False).sqrt() - 1).abs().max() < 1e-3


def test_parameters_may_be_wider_than_the_input():
    x, (w, b) = torch.randn(3, 16).bfloat16().requires_grad_(), parameters(16)
    w.requires_grad_()
    for name in ROUTES:
        with route(name, op.FORWARD):
            y = layer_norm(x, w, b)
            dx, dw = torch.autograd.grad(y.float().sum(), (x, w))
        assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_dropout_depends_on_the_seed_alone():
    x, residual, (w, b) = torch.ones(50, 64), torch.zeros(50, 64), parameters(64)

    def dropped(seed):
        return add_layer_norm(x, residual, w, b, dropout_p=0.25, seed=seed)[1]

    first = dropped(3)
    assert torch.equal(first, dropped(3)) and torch.equal(first, dropped(torch.tensor(3)))
    assert not torch.equal(first, dropped(4))
    assert abs((first == 0).float().mean() - 0.25) < 0.03
    assert torch.allclose(first[first != 0], torch.tensor(4 / 3))
    for name in ROUTES:
        with route(name, op.ADD_FORWARD):
            assert torch.equal(dropped(3), first)


def test_dropout_without_a_seed_follows_the_default_generator():
    x, (w, b) = torch.randn(9, 33), parameters(33)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(add_layer_norm(x, x, w, b, dropout_p=0.5)[1])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_autocast_keeps_norms_in_float32():
    x, (w, b) = torch.randn(3, 16).bfloat16(), parameters(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_norm(x, w, b).dtype == torch.float32
        y, summed = add_layer_norm(x, x.float(), w.bfloat16(), b)
    assert y.dtype == summed.dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: layer_norm(x, w[:-1], b),
        lambda x, w, b: layer_norm(x, w, b[:, None]),
        lambda x, w, b: add_layer_norm(x, x[:1], w, b),
        lambda x, w, b: add_layer_norm(x, x, w, b, dropout_p=1.0),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError, match="wanted"):
        call(torch.randn(3, 16), *parameters(16))


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.to(dtype).requires_grad_() for t in tensors]


def test_opcheck():
    x, w, b = leaves(torch.randn(4, 3, 8), *parameters(8))
    torch.library.opcheck(op._forward, (x, w, b, 1e-5))
    torch.library.opcheck(op._add_forward, (x, x.detach() + 1, w, b, 1e-5, 0.1, torch.tensor(5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_without_tracing(dtype):
    checks = ("test_schema", "test_faketensor")
    x, w, b = (t.to(dtype) for t in (torch.randn(4, 3, 8), *parameters(8)))
    _, mean, rstd = op.FORWARD(x, w, w, 1e-5)
    for name in ROUTES[:2]:
        with route(name, op.FORWARD), route(name, op.ADD_FORWARD):
            torch.library.opcheck(op._forward, (x, w, b, 1e-5), test_utils=checks)
            torch.library.opcheck(op._backward, (x + 1, x, w, mean, rstd), test_utils=checks)
            for p, seed in ((0.0, None), (0.1, torch.tensor(5))):
                torch.library.opcheck(op._add_forward, (x, x + 1, w, b, 1e-5, p, seed), test_utils=checks)
                args = (x + 1, x + 2, x, w, mean, rstd, p, seed)
                torch.library.opcheck(op._add_backward, args, test_utils=checks)


def test_compiles_without_a_break():
    x, w, b = leaves(torch.randn(4, 9, 8), *parameters(8))

    def function(x, w, b, seed):
        y, summed = add_layer_norm(layer_norm(x, w, b), x, w, b, 1e-5, 0.2, seed)
        return (y * summed).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed in (1, 2, torch.tensor(3)):
        for inputs in ((x, w, b), (x[:2], w, b)):
            got, wanted = compiled(*inputs, seed), function(*inputs, seed)
            torch.testing.assert_close(got, wanted)
            for g, e in zip(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(wanted, (x, w, b)), strict=True):
                torch.testing.assert_close(g, e)
