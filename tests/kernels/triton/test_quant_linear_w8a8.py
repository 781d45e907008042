"""Int8 rows times int8 weights in Triton: codes, scales and sums to the reference's bit; products by the error rule.

Interpreted, this does not show races between programs, alignment, or whether a GPU's compiler fuses the epilogue's
multiplication and addition (one rounding fewer); of bfloat16 only results are rounded otherwise there (truncated).
"""

import pytest
import torch

from miss.kernels.quant_linear import pack_int8, packing, reference, rows, torch_impl, triton_w8a8_impl
from miss.kernels.quant_linear.op import DYNAMIC
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, columns, outputs: the form for few rows and the one for many
SIZES = [
    ((2, 3), 70, 37),
    ((1,), 300, 5),
    ((), 13, 1),
    ((0, 3), 33, 8),
    ((19,), 1, 17),
    ((70,), 197, 67),
    ((65,), 9, 3),
]


def inputs(count, columns, outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(outputs, columns, generator=generator), torch.randn(outputs, generator=generator)
    x = torch.randn(*count, columns, generator=generator)
    return x.to(DEVICE, dtype), pack_int8(w, dynamic=True).to(DEVICE), b.to(DEVICE, dtype)


def dynamic(module, x, packed, bias):
    return module.dynamic(x, packed.data, packed.scale, bias, None, None)


def awkward():
    """Rows with ties at every half, a zero row, tiny, huge and mixed ones."""
    halves = torch.arange(-127, 128) / 2
    x = torch.randn(8, 255, generator=torch.Generator().manual_seed(1))
    x[0], x[1] = torch.cat([halves[:254], torch.tensor([127.0])]), 0
    x[2], x[3], x[4, 0] = x[2] * 1e-30, x[3] * 1e30, -300
    return x.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_the_references(dtype):
    x = awkward() if dtype != torch.float16 else awkward().clamp(-1000, 1000)
    x = x.to(dtype)
    codes, steps = triton_w8a8_impl._quantised(x, torch.int8)
    wanted, scale = reference.quantise_rows(x)
    assert codes.dtype == torch.int8 and torch.equal(codes, wanted) and torch.equal(steps, scale[:, 0])
    got, wanted = triton_w8a8_impl.quantise(x.view(2, 4, -1)), packing.quantise_rows(x.view(2, 4, -1))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_rows_of_nan_infinity_and_the_smallest_numbers():
    x = awkward()
    x[1, 5], x[2, 6], x[3, 7], x[5], x[6] = torch.nan, torch.inf, -torch.inf, 1e-44, x[6] * 1e-37
    got, wanted = triton_w8a8_impl.quantise(x), packing.quantise_rows(x)
    assert torch.equal(got[0], wanted.codes) and torch.equal(got[1].isnan(), wanted.scale.isnan())
    assert torch.equal(got[1].nan_to_num(), wanted.scale.nan_to_num())
    packed = inputs((1,), 255, 5)[1]
    for part in (x, x.repeat(9, 1)):  # both forms
        y = dynamic(triton_w8a8_impl, part, packed, None)[:8]
        assert y[1:4].isnan().all() and y[[0, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float32_is_the_references_bit_for_bit(size):
    x, packed, b = inputs(*size)
    for bias in (b, None):
        wanted = dynamic(reference, x, packed, bias)
        got = dynamic(triton_w8a8_impl, x, packed, bias)
        if DEVICE == "cpu":
            assert torch.equal(got, wanted)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_sums_are_exact_where_float32_ones_are_not():
    """All codes 127 over 4096 columns: past float32's 24 bits; the scales are 1."""
    x = torch.full((66, 4096), 127.0)
    data = torch.full((3, 4096), 127, dtype=torch.int8)
    data[1, 0], data[2] = -1, -127
    x, data, scale = x.to(DEVICE), data.to(DEVICE), torch.ones(3, device=DEVICE)
    for part in (x[:2], x):
        got = triton_w8a8_impl.dynamic(part, data, scale, None, None, None)
        assert torch.equal(got, reference.dynamic(part, data, scale, None))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[5]], ids=str)
def test_halves(size, dtype):
    x, packed, b = inputs(*size, dtype)
    plain = dynamic(torch_impl, x, packed, b)
    assert_as_good_as(dynamic(triton_w8a8_impl, x, packed, b), plain, dynamic(reference, x, packed, b), floor=8e-3)


def test_a_row_does_not_depend_on_its_batch():
    x, packed, b = inputs((70,), 197, 67)
    x[3] *= 100
    together = dynamic(triton_w8a8_impl, x, packed, b)
    assert torch.equal(dynamic(triton_w8a8_impl, x[3:4], packed, b), together[3:4])
    assert torch.equal(dynamic(triton_w8a8_impl, x[:20], packed, b), together[:20])


def test_strides():
    x, packed, b = inputs((5,), 70, 37)
    wanted = dynamic(triton_w8a8_impl, x, packed, b)
    for strided in (torch.cat([x, x], 1)[:, :70], x.T.contiguous().T):
        assert torch.equal(dynamic(triton_w8a8_impl, strided, packed, torch.stack([b, b], 1)[:, 0]), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_rows(dtype, gelu, extra):
    x, packed, b = inputs((2, 9), 197, 67)
    codes, steps = packing.quantise_rows(x)
    residual = torch.randn(2, 9, 67, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    args = (packed.data, packed.scale, b if extra else None, residual if extra else None, gelu, dtype, None, None)
    got = triton_w8a8_impl.rows(steps, codes, *args)
    exact = (*args[:5], torch.float64, None, None)
    wanted = rows._reference_rows(steps.double(), codes, *exact)
    plain = rows._torch_rows(steps, codes, *args)
    assert got.dtype == dtype
    assert_as_good_as(got, plain, wanted, floor=2e-6 if dtype == torch.float32 else 8e-3)


def test_rows_quantised():
    """GELU's last place may move a number over a tie: codes are equal but for few that differ by one."""
    x, packed, b = inputs((2, 9), 197, 67)
    codes, steps = packing.quantise_rows(x)
    for gelu in (False, True):
        args = (steps, codes, packed.data, packed.scale, b, gelu, None, None)
        got, wanted = triton_w8a8_impl.rows_quantised(*args), rows._reference_quantised(*args)
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-6, atol=0)
        apart = (got[0].int() - wanted[0].int()).abs()
        assert got[0].dtype == torch.uint8 and apart.max() <= 1 and apart.sum() <= 3


def test_limits():
    x, packed, b = inputs((5,), 70, 37)
    row = next(i for i in DYNAMIC.impls if i.name == "triton")
    assert row.limits(x, packed.data, packed.scale, b, None, None) is None
    wide = torch.empty(1, device="meta", dtype=torch.int8).expand(1, 2**18)
    assert "int32" in row.limits(x, wide, packed.scale, b, None, None)
    product = next(i for i in rows.ROWS.impls if i.name == "triton")
    codes, steps = packing.quantise_rows(x)
    args = (packed.data, packed.scale, b, None, False)
    assert product.limits(steps, codes, *args, torch.float16, None, None) is None
    assert "makes" in product.limits(steps, codes, *args, torch.float64, None, None)


@pytest.mark.parametrize("bug", ["step", "scale", "tail", "sign"])
@pytest.mark.parametrize("count", [5, 70])
def test_planted_bugs_are_seen(bug, count):
    x, packed, b = inputs((count,), 197, 67)
    wanted = dynamic(reference, x, packed, b)
    wrong = {
        "step": (torch.cat([x[:, :-1], 3 * x.abs().amax(1, keepdim=True)], 1), packed),
        "scale": (x, packed._replace(scale=packed.scale.roll(1))),
        "tail": (x[:, :-1], packed._replace(data=packed.data[:, :-1].contiguous())),
        "sign": (x, packed._replace(data=packed.data ^ -128)),
    }[bug]
    with pytest.raises(AssertionError, match="error"):
        assert_as_good_as(dynamic(triton_w8a8_impl, *wrong, b), wanted, wanted)
