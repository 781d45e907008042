"""The parts that every CPU kernel is made of, as `miss_cpu::probe` shows them: elementary functions, conversions, the
tails of vectors, the product's inner kernel. The accuracies are those that csrc/cpu/functions.h states.

test_isa.py runs this file under each instruction set.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miss.kernels import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
NAN, INF = math.nan, math.inf
ODD = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 197]


def probe(function: str, x: Tensor) -> Tensor:
    return extension.ops().probe(function, x)


def ulps(got: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of the float32 beside the truth, subnormal numbers included."""
    exponent = torch.frexp(exact).exponent.clamp_min(-125)
    return ((got.double() - exact).abs() * torch.exp2(24.0 - exponent.double())).max().item()


def same(got: Tensor, wanted: Tensor) -> bool:
    """Equal, NaN where NaN is wanted."""
    return bool(((got == wanted) | (got.isnan() & wanted.isnan())).all())


def every(low: float, high: float, count: int = 400_001) -> Tensor:
    return torch.cat([torch.linspace(low, high, count), torch.empty(count).uniform_(low, high)])


def phi(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-x / math.sqrt(2))


def test_exp_is_within_a_unit_and_a_half():
    x = every(-103.9, 88.72)
    assert ulps(probe("exp", x), x.double().exp()) <= 1.5
    x = every(-1, 1)
    assert ulps(probe("exp", x), x.double().exp()) <= 1.5


def test_exp_at_the_ends():
    x = torch.tensor([NAN, -INF, -3e38, -104.1, -0.0, 0.0, 1e-45, 88.72, 88.73, 100.0, 3e38, INF])
    got = probe("exp", x)
    assert same(got[[0, 1, 2, 3, 8, 9, 10, 11]], torch.tensor([NAN, 0, 0, 0, INF, INF, INF, INF]))
    assert got[4:7].tolist() == [1, 1, 1] and got[7].isfinite()


def test_the_normal_distribution():
    x = every(-12, 12)
    exact = phi(x.double())
    assert (probe("normal_cdf", x) - exact).abs().max() <= 1.1e-7
    within = x[x <= 5.5].double()
    assert (probe("gelu", x[x <= 5.5]) - within * phi(within)).abs().max() <= 6.1e-7
    above = x[x > 5.5].double()
    assert ulps(probe("gelu", x[x > 5.5]), above * phi(above)) <= 1
    density = torch.exp(-(x.double() ** 2) / 2) / math.sqrt(2 * math.pi)
    assert (probe("gelu_slope", x) - (exact + x.double() * density)).abs().max() <= 2e-7


def test_gelu_far_out():
    x = torch.tensor([NAN, -3e38, -1e4, -7.0, -0.0, 0.0, 7.0, 1e4, 3e38, INF])
    assert same(probe("gelu", x)[[0, 4, 5, 6, 7, 8, 9]], x[[0, 4, 5, 6, 7, 8, 9]])
    assert probe("gelu", torch.tensor([-INF, -3e38, -1e4, -7.0])).abs().max() <= 6.1e-7
    slope = probe("gelu_slope", x)
    assert slope[0].isnan() and slope[-1].isnan()
    assert (slope[1:-1] - torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1])).abs().max() <= 2e-7
    assert probe("gelu_slope", torch.tensor([-INF])).isnan()
    assert same(probe("normal_cdf", torch.tensor([NAN, INF])), torch.tensor([NAN, 1.0]))


def test_powers_of_two():
    n = torch.arange(-160.0, 140.0)
    assert torch.equal(probe("power_of_two", n), torch.exp2(n.double()).float())


def test_rounding_is_to_the_nearest_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, NAN, -INF])
    assert same(probe("round", x), torch.round(x))
    whole = torch.arange(256.0)
    assert torch.equal(probe("to_bytes", whole), whole.byte())
    assert probe("to_bytes", torch.tensor([0.5, 1.5, 2.5, 254.5, 253.5])).tolist() == [0, 2, 2, 254, 254]


def flushed(x: Tensor) -> Tensor:
    """torch's rounding, with subnormal inputs as zeros of their sign."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(x.abs() < tiny, torch.copysign(torch.zeros_like(x), x), x).bfloat16()


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def test_to_bf16_rounds_as_torch_does():
    """Every upper half with lower halves around the tie: 2^16 numbers times 7."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF):
        x = (upper | low).view(torch.float32)
        got, wanted = probe("to_bf16", x), flushed(x)
        number = ~x.isnan()
        assert torch.equal(bits(got)[number], bits(wanted)[number])
        assert got[~number].isnan().all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_to_bf16_of_anything(numbers):
    x = torch.tensor(numbers, dtype=torch.float32)
    got, wanted = probe("to_bf16", x), flushed(x)
    assert torch.equal(bits(got)[~x.isnan()], bits(wanted)[~x.isnan()]) and got[x.isnan()].isnan().all()


@pytest.mark.parametrize("count", ODD)
def test_tails_of_every_type(count):
    """Each type at each length, at addresses that nothing is aligned to."""
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int8):
        for offset in (0, 1, 3):
            full = torch.randint(-128, 256, (count + offset,)).to(dtype)
            x = full[offset:]
            assert torch.equal(probe("to_float", x), x.float())
    x = torch.randn(count + 1)[1:]
    assert torch.equal(bits(probe("to_bf16", x)), bits(x.bfloat16()))
    assert torch.equal(probe("round", x), torch.round(x))
    codes = torch.randint(0, 256, (count,))
    assert torch.equal(probe("to_bytes", codes.float()), codes.byte())


def test_sums_and_extremes_of_a_vector():
    lanes = extension.ops().probe_lanes()
    assert lanes == (8 if extension.isa() == "avx2" else 16)
    x = torch.randn(9, lanes)
    for function, wanted in (("max_of", x.amax(1)), ("min_of", x.amin(1)), ("sum", x.double().sum(1))):
        got = probe(function, x.flatten()).view(9, lanes)
        assert (got == got[:, :1]).all()
        assert torch.allclose(got[:, 0].double(), wanted.double(), rtol=0, atol=1e-6 if function == "sum" else 0)


GROUPS = {torch.float32: 1, torch.bfloat16: 2, torch.uint8: 4}


def panel_of(b: Tensor, group: int) -> Tensor:
    """(K, 64) as the inner kernel wants it: (ceil(K / group), 64, group)."""
    padded = torch.nn.functional.pad(b, (0, 0, 0, -len(b) % group))
    return padded.view(-1, group, 64).transpose(1, 2).contiguous()


def operands(dtype: torch.dtype, rows: int, k: int) -> tuple[Tensor, Tensor]:
    if dtype == torch.uint8:
        return torch.randint(0, 256, (rows, k), dtype=dtype), torch.randint(-128, 128, (k, 64), dtype=torch.int8)
    return torch.randn(rows, k).to(dtype), torch.randn(k, 64).to(dtype)


def product(a: Tensor, b: Tensor, columns: int = 64, sums: Tensor | None = None) -> Tensor:
    whole = a.dtype == torch.uint8
    result = torch.full((len(a), 64), 7, dtype=torch.int32 if whole else torch.float32) if sums is None else sums
    extension.ops().probe_product(a, panel_of(b, GROUPS[a.dtype]), result, sums is None, columns)
    return result


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(list(GROUPS)), rows=st.integers(1, 6), k=st.integers(1, 71), offset=st.integers(0, 3))
def test_products(dtype, rows, k, offset):
    """Rows that end in the middle of a group, and lie `offset` elements apart and off alignment."""
    full, b = operands(dtype, rows, k + offset)
    a, b = full[:, offset:], b[offset:]
    got = product(a, b)
    if dtype == torch.uint8:
        assert torch.equal(got.long(), a.long() @ b.long())
        return
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((got - exact).abs() <= size * k * 2.0**-23).all()
    alone = torch.cat([product(a[r : r + 1], b) for r in range(rows)])
    assert torch.equal(alone, got), "a row's sums depend on the rows beside it"


def test_int8_products_at_full_range_are_exact():
    """255 x -128 four times over: pairs of such products saturate 16 bits."""
    a, b = torch.full((6, 1023), 255, dtype=torch.uint8), torch.full((1023, 64), -128, dtype=torch.int8)
    b[:, 1::2] = 127
    assert torch.equal(product(a, b).long(), a.long() @ b.long())


@pytest.mark.parametrize("dtype", list(GROUPS), ids=str)
def test_products_add_up_and_keep_to_their_columns(dtype):
    a, b = operands(dtype, 5, 40)
    whole = product(a, b)
    both = product(a[:, 20:], b[20:], sums=product(a[:, :20], b[:20]))
    assert torch.allclose(both.double(), whole.double(), rtol=0, atol=0 if dtype == torch.uint8 else 1e-4)
    lanes = extension.ops().probe_lanes()
    step = 64 if lanes == 16 else 16
    for columns in range(step, 65, step):
        part = product(a, b, columns)
        assert torch.equal(part[:, :columns], whole[:, :columns]) and (part[:, columns:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinity_stay_in_their_row(dtype, bad):
    a, b = operands(dtype, 6, 19)
    clean = product(a, b)
    a[2, 18] = bad
    got = product(a, b)
    assert not got[2].isfinite().any()
    assert torch.equal(got[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
