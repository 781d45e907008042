"""Products of int8 rows: exact sums, the error rule behind GELU, codes for the next product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from miss.kernels.quant_linear import (
    QuantRows,
    pack_int4,
    pack_int8,
    packing,
    prepare,
    quant_linear_rows,
    quant_linear_rows_quantised,
    quantise_rows,
    rows,
)
from tests.helpers import CPU_ROUTES, assert_as_good_as, route, threads

ROUTES = [*CPU_ROUTES, "torch", "reference", "custom"]


def tensors(shape, columns, outputs):
    weight, bias = torch.randn(outputs, columns) * columns**-0.5, torch.randn(outputs) * 0.1
    return torch.randn(*shape, columns), prepare(pack_int8(weight, dynamic=True)), bias


def exact(q: QuantRows, packed, bias, gelu=False, residual=None):
    """float64 throughout."""
    y = ((q.codes.double() - 128) @ packed.data.double().T) * q.scale.double()[..., None] * packed.scale.double()
    y = y + bias.double()
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", [((2, 37), 70, 31), ((197,), 64, 96), ((), 13, 5), ((0, 3), 33, 8), ((19,), 1, 1)])
def test_error_rule(shape, name, gelu, dtype):
    x, packed, bias = tensors(*shape)
    q, residual = packing.quantise_rows(x), torch.randn(*shape[0], shape[2]).to(dtype)
    with route("reference", rows.ROWS):
        plain = quant_linear_rows(q, packed, bias, gelu, residual, dtype)
    with route(name, rows.ROWS):
        got = quant_linear_rows(q, packed, bias, gelu, residual, dtype)
    assert got.dtype == dtype
    assert_as_good_as(got, plain, exact(q, packed, bias, gelu, residual))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 60), columns=st.integers(1, 140), outputs=st.integers(1, 140), full=st.booleans())
def test_sums_are_exact(count, columns, outputs, full):
    """Whatever the codes: all 127 times all -127 too."""
    data = torch.full((outputs, columns), -127) if full else torch.randint(-128, 128, (outputs, columns))
    codes = torch.full((count, columns), 255) if full else torch.randint(0, 256, (count, columns))
    packed = prepare(pack_int8(torch.ones(outputs, columns))._replace(data=data.to(torch.int8)))
    packed = packed._replace(scale=torch.ones(outputs))
    q = QuantRows(codes.to(torch.uint8), torch.ones(count))
    want = ((codes.double() - 128) @ data.double().T).float()
    for name in (*CPU_ROUTES, "torch", "reference"):
        with route(name, rows.ROWS):
            assert torch.equal(quant_linear_rows(q, packed), want), name


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", [((3, 7), 70, 131), ((120,), 64, 70)])
def test_codes_for_the_next_product(name, shape):
    """What is written as codes is what quantising the float result gives, to a code: its gelu is good for 8 bits."""
    x, packed, bias = tensors(*shape)
    q = packing.quantise_rows(x)
    with route(name, rows.ROWS), route(name, rows.QUANTISED):
        got = quant_linear_rows_quantised(q, packed, bias, gelu=True)
        want = packing.quantise_rows(quant_linear_rows(q, packed, bias, gelu=True))
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-4, atol=0)
    changed = (got.codes.int() - want.codes.int()).abs()
    assert changed.max() <= 1
    assert changed.sum() <= max(2, 0.003 * changed.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTES)
def test_quantise_rows(name, dtype):
    x = (torch.randn(6, 5, 37) * 3).to(dtype).transpose(0, 1)
    x[0, 0], x[1, 1, 3], x[2, 2, 0] = 0, torch.nan, -torch.inf
    want = packing.quantise_rows(x)
    with route(name, rows.QUANTISE):
        got = quantise_rows(x)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scale.nan_to_num(-1), want.scale.nan_to_num(-1))


@pytest.mark.skipif(not CPU_ROUTES, reason="the CPU kernels do not run here")
def test_bitwise_for_any_threads_and_batch():
    x, packed, bias = tensors((203,), 583, 301)
    q = packing.quantise_rows(x)
    some = QuantRows(q.codes[100:103], q.scale[100:103])
    with threads(1):
        want, codes = quant_linear_rows(q, packed, bias, True), quant_linear_rows_quantised(q, packed, bias, True)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(quant_linear_rows(q, packed, bias, True), want)
            assert torch.equal(quant_linear_rows(some, packed, bias, True), want[100:103])
            again = quant_linear_rows_quantised(q, packed, bias, True)
            assert torch.equal(again.codes, codes.codes) and torch.equal(again.scale, codes.scale)
            again = quant_linear_rows_quantised(some, packed, bias, True)
            assert torch.equal(again.codes, codes.codes[100:103]) and torch.equal(again.scale, codes.scale[100:103])


def test_bad_arguments():
    x, packed, bias = tensors((4,), 8, 6)
    q = packing.quantise_rows(x)
    for bad in (
        lambda: quant_linear_rows(QuantRows(q.codes[:, :7], q.scale), packed),
        lambda: quant_linear_rows(QuantRows(q.codes, q.scale[:3]), packed),
        lambda: quant_linear_rows(q, packed, bias[:5]),
        lambda: quant_linear_rows(q, packed, residual=torch.zeros(4, 5)),
        lambda: quant_linear_rows_quantised(q, pack_int4(torch.randn(6, 8), 32)),
    ):
        with pytest.raises(ValueError, match="wanted"):
            bad()


def test_opcheck():
    x, packed, bias = tensors((3, 4), 33, 6)
    q = packing.quantise_rows(x)
    checks = ("test_schema", "test_faketensor")
    for panels in ((None, None), packed.prepared or (None, None)):
        parts = (q.scale, q.codes, packed.data, packed.scale, bias)
        torch.library.opcheck(rows._rows, (*parts, None, True, torch.bfloat16, *panels), test_utils=checks)
        torch.library.opcheck(rows._quantised, (*parts, False, *panels), test_utils=checks)
    torch.library.opcheck(rows._quantise, (x,), test_utils=checks)
