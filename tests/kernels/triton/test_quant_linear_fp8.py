"""Float8 rows times float8 weights in Triton: codes and scales to the reference's bit, products by the error rule.

Interpreted, this does not show what a GPU's float8 products lose within an instruction's sum, races or alignment. The
interpreter's own conversion to e4m3 is wrong, so that the kernels round first: the same code runs on a GPU.
"""

import pytest
import torch

from miss.kernels.quant_linear import fp8, pack_fp8, triton_w8a8_impl
from miss.kernels.quant_linear.packing import FP8, quantise_rows_fp8
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    ((2, 3), 70, 37),
    ((1,), 300, 5),
    ((), 13, 1),
    ((0, 3), 33, 8),
    ((19,), 1, 17),
    ((70,), 197, 67),
    ((65,), 9, 3),
]

if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("compute capability 9.0 alone", allow_module_level=True)


def inputs(count, columns, outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(outputs, columns, generator=generator), torch.randn(outputs, generator=generator)
    x = torch.randn(*count, columns, generator=generator)
    return x.to(DEVICE, dtype), pack_fp8(w).to(DEVICE), b.to(DEVICE, dtype)


def check(x, packed, b, floor=2e-6, **changed):
    got = triton_w8a8_impl.fp8(x, packed._replace(**changed).data, packed._replace(**changed).scale, b)
    args = (packed.data, packed.scale, b)
    codes, steps = quantise_rows_fp8(x)
    exact = codes.double() @ packed.data.double().T * steps.double()[..., None] * packed.scale.double()
    exact = exact if b is None else exact + b.double()
    assert got.dtype == x.dtype
    assert_as_good_as(got, fp8._torch(x, *args), exact, floor=floor)


def every_number():
    """Rows whose scale is 1, of every e4m3 number, of every tie between two, of all that lies beside those."""
    table = torch.arange(127, dtype=torch.uint8).view(FP8).double()
    ties = (table[1:] + table[:-1]) / 2
    around = torch.cat([ties * (1 + 2.0**-20), ties * (1 - 2.0**-20)])
    values = torch.cat([table, ties, around]).float()
    values = torch.cat([values, -values])
    return torch.cat([values, torch.tensor([448.0])])[None].to(DEVICE)


def test_every_number_and_tie_is_rounded_as_pytorch_does():
    x = every_number()
    codes, steps = triton_w8a8_impl._quantised(x, FP8)
    wanted, scale = quantise_rows_fp8(x)
    assert steps.item() == scale.item() == 1
    assert torch.equal(codes.float(), wanted.float())  # as numbers: a zero may have lost its sign


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_the_references(dtype):
    x = (inputs((9,), 300, 1)[0] * torch.logspace(-4, 2, 300, device=DEVICE)).to(dtype)
    x[1], x[2, 5], x[3, 6], x[4] = (
        0,
        torch.nan,
        -torch.inf,
        1e-7 if dtype == torch.float16 else 2e-38,
    )  # bfloat16's subnormals are misread by the interpreter
    codes, steps = triton_w8a8_impl._quantised(x, FP8)
    wanted, scale = quantise_rows_fp8(x)
    assert torch.equal(codes.float(), wanted.float()) and torch.equal(steps.nan_to_num(), scale.nan_to_num())
    assert steps.isnan().tolist() == scale.isnan().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_rule(size, dtype):
    x, packed, b = inputs(*size, dtype)
    floor = 2e-6 if dtype == torch.float32 else 8e-3
    check(x, packed, b, floor)
    check(x, packed, None, floor)


def test_a_row_of_nan_is_nan():
    x, packed, b = inputs((70,), 70, 37)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    for part in (x[:8], x):
        y = triton_w8a8_impl.fp8(part, packed.data, packed.scale, b)
        assert y[1:3].isnan().all() and y[[0, *range(3, len(part))]].isfinite().all()


def test_limits():
    x, packed, b = inputs((5,), 70, 37)
    row = fp8.FP8_OP.impls[0]
    assert row.name == "triton" and row.capability == (9, 0)
    assert row.limits(x, packed.data, packed.scale, b) is None
    assert "bias" in row.limits(x, packed.data, packed.scale, b.double())
    assert "contiguous" in row.limits(x, packed.data.T, packed.scale, b)


@pytest.mark.parametrize("bug", ["scale", "rows", "tail"])
@pytest.mark.parametrize("count", [5, 70])
def test_planted_bugs_are_seen(bug, count):
    x, packed, b = inputs((count,), 197, 67)
    data = packed.data.view(torch.uint8)
    tail = data.clone()
    tail[:, -1] = 0
    changed = {
        "scale": {"scale": packed.scale.roll(1)},
        "rows": {"data": data.roll(1, 0).view(FP8)},
        "tail": {"data": tail.view(FP8)},
    }[bug]
    with pytest.raises(AssertionError, match="error"):
        check(x, packed, b, **changed)
