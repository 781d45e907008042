"""Layer norm, plain and after residual and dropout, by the error rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.dropout import as_seed, keep_mask
from miss.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_quantised,
    layer_norm,
    layer_norm_quantised,
    op,
    quantised,
)
from miss.kernels.layer_norm.quantised import ADD_QUANTISED, QUANTISED
from miss.kernels.quant_linear.packing import QuantRows, dequantise_rows, quantise_rows
from miss.kernels.registry import use
from tests.helpers import assert_as_good_as, check_error_rule, route, threads, unaligned

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 197, 96), (1, 577, 64), (3, 257, 13), (1, 1, 1023), (7,), (0, 5, 8), (5, 17)]
ROUTES = ["torch", "reference", "custom", "cpu"]
ROUTED = [(name, dtype) for name in ROUTES for dtype in DTYPES if name != "cpu" or dtype in op.CPU_DTYPES]


def parameters(width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(width) * 0.3 + 1, torch.randn(width) * 0.1


def plain(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b)


@pytest.mark.parametrize(("name", "dtype"), ROUTED, ids=str)
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
    for name in ("torch", "reference", "cpu"):
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
    for name in ("torch", "reference", "cpu"):
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


def everything(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    """Every output and gradient of the `cpu` rows, the codes too; no weight gradients, which sum over the rows."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    with route("cpu", op.ADD_FORWARD), route("cpu", op.FORWARD):
        y, summed = add_layer_norm(x, residual, w, b)
        plain_y = layer_norm(x, w, b)
        grads = torch.autograd.grad([y, summed, plain_y], [x, residual], [x.detach(), y.detach(), y.detach()])
    with use(add_layer_norm_quantised="cpu", layer_norm_quantised="cpu"), torch.no_grad():
        rows, kept, total = add_layer_norm_quantised(x, residual, w, b, keep_y=True)
        return [y, summed, plain_y, *grads, *rows, kept, total, *layer_norm_quantised(x, w, b)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [768, 67])
def test_cpu_rows_do_not_see_their_batch_or_the_threads(width, dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 257, width).to(dtype)
    w, b = parameters(width)
    whole = everything(x, residual, w, b)
    for count in (2, 3):
        with threads(count):
            assert all(map(torch.equal, everything(x, residual, w, b), whole))
    for at in (slice(256, 257), slice(100, 103)):
        alone = everything(unaligned(x[at]), unaligned(residual[at]), w, b)
        assert all(torch.equal(a, t[at]) for a, t in zip(alone, whole, strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_cpu_weight_gradients_do_not_see_the_threads(count):
    torch.manual_seed(0)
    x, (w, b) = torch.randn(577, 96), leaves(*parameters(96))
    with route("cpu", op.FORWARD):
        one = torch.autograd.grad(layer_norm(x, w, b), (w, b), x)
        with threads(count):
            assert all(map(torch.equal, torch.autograd.grad(layer_norm(x, w, b), (w, b), x), one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_bits_are_the_same_in_a_kernel(dtype):
    """Rows that begin in the middle of a hashed word, and gradients through the mask."""
    for width in (1, 3, 31, 64, 67):
        x, residual, (w, b) = torch.ones(19, width, dtype=dtype), torch.zeros(19, width, dtype=dtype), parameters(width)
        x.requires_grad_()
        results = []
        for name in ("reference", "cpu"):
            with route(name, op.ADD_FORWARD):
                _, summed = add_layer_norm(x, residual, w, b, dropout_p=0.3, seed=-(2**60) + 11)
                results.append((summed, torch.autograd.grad(summed, x, x.detach())[0]))
        assert all(map(torch.equal, *results)) and 0 < (results[0][0] == 0).sum() < 19 * width


def test_cpu_nan_and_infinity_stay_in_their_rows():
    x, (w, b) = torch.randn(5, 67), parameters(67)
    bad = x.clone()
    bad[1, 3], bad[3, 66] = float("nan"), float("inf")
    good = [0, 2, 4]
    with route("cpu", op.FORWARD):
        got, wanted = layer_norm(bad, w, b), layer_norm(x, w, b)
    assert torch.equal(got[good], wanted[good]) and got[[1, 3]].isnan().all()


QUANTISED_WAYS = ["torch", "reference", "cpu"]


def check_rows(rows: QuantRows, exact: Tensor, slack: float) -> None:
    """Codes within half a step of the truth, and `slack` more: what the values before them may be off."""
    largest = exact.abs().amax(-1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    assert (rows.codes.dtype, rows.scale.dtype) == (torch.uint8, torch.float32)
    assert ((rows.scale - scale).abs() <= slack * largest / 127 + 1e-30).all()
    assert rows.codes.numel() == 0 or rows.codes.min() >= 1
    error = (dequantise_rows(rows, torch.float64) - exact).abs()
    assert (error <= (scale * (0.5 + 127 * slack) + slack)[..., None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", QUANTISED_WAYS)
@pytest.mark.parametrize("shape", [(2, 37, 96), (577, 67), (0, 5), (3,), (9, 768)], ids=str)
def test_quantised(shape, way, dtype):
    if way == "cpu" and dtype not in op.CPU_DTYPES:
        pytest.skip("float32 and bfloat16 alone")
    torch.manual_seed(0)
    x, residual, (w, b) = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), parameters(shape[-1])
    slack = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    with route(way, QUANTISED), route(way, ADD_QUANTISED):
        alone = layer_norm_quantised(x, w, b)
        rows, y, summed = add_layer_norm_quantised(x, residual, w, b, keep_y=True)
        same, none, _ = add_layer_norm_quantised(x, residual, w, b)
    check_rows(alone, plain(x.double(), w.double(), b.double()), slack)
    assert torch.equal(summed, residual + x) and none is None
    exact = plain(summed.double(), w.double(), b.double())
    check_rows(rows, exact, slack)
    assert torch.equal(rows.codes, same.codes) and torch.equal(rows.scale, same.scale)
    assert_as_good_as(y, plain(summed, w.to(dtype), b.to(dtype)), exact)


def test_quantised_codes_are_those_of_the_definition():
    """Bit for bit, the ends of the range included."""
    torch.manual_seed(0)
    x, (w, b) = torch.randn(300, 100), parameters(100)
    with route("cpu", QUANTISED), route("cpu", op.FORWARD):
        rows, y = layer_norm_quantised(x, w, b), layer_norm(x, w, b)
    wanted = quantise_rows(y)
    assert torch.equal(rows.codes, wanted.codes) and torch.equal(rows.scale, wanted.scale)
    assert rows.codes.min() == 1 and rows.codes.max() == 255


@pytest.mark.parametrize("way", QUANTISED_WAYS)
def test_quantised_rows_of_zeros_nan_and_infinity(way):
    x, w, b = torch.randn(4, 67), torch.ones(67), torch.zeros(67)
    x[0], x[2, 66], x[3, 0] = 3.0, float("nan"), float("-inf")
    with route(way, QUANTISED):
        codes, scale = layer_norm_quantised(x, w, b)
    assert (codes[[0, 2, 3]] == 128).all() and (codes[1] != 128).any()
    assert scale[0] == 1 and scale[[2, 3]].isnan().all()


def test_quantised_opcheck_and_compile():
    checks = ("test_schema", "test_faketensor")
    x, (w, b) = torch.randn(4, 3, 8), parameters(8)
    torch.library.opcheck(quantised._quantised, (x, w, b, 1e-5), test_utils=checks)
    for keep in (True, False):
        torch.library.opcheck(quantised._add_quantised, (x, x + 1, w, b, 1e-5, keep), test_utils=checks)
    compiled = torch.compile(
        lambda x: add_layer_norm_quantised(x, x, w, b)[0].codes.sum(), fullgraph=True, backend="aot_eager"
    )
    assert compiled(x) == add_layer_norm_quantised(x, x, w, b)[0].codes.sum()
    with pytest.raises(ValueError, match="wanted"):
        add_layer_norm_quantised(x, x[:1], w, b)
