"""Float8 weights and activations: what the bytes mean, the product by its definition, its gradients and files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from miss.kernels.quant_linear import (
    PackingError,
    fp8,
    from_flat,
    pack_fp8,
    prepare,
    quant_embedding,
    quant_linear,
    to_flat,
    unpack,
)
from miss.kernels.quant_linear.packing import FP8, quantise_rows_fp8
from tests.helpers import assert_as_good_as, route

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUTES = ["torch", "reference", "custom"]
SHAPES = [((2, 37), 70, 31), ((1,), 64, 96), ((), 13, 5), ((0, 3), 33, 8), ((19,), 1, 1)]


def tensors(rows, columns, outputs):
    torch.manual_seed(0)
    w = torch.randn(outputs, columns) * columns**-0.5
    return torch.randn(*rows, columns), w, torch.randn(outputs) * 0.1


def nearest(values):
    """Each number's nearest e4m3 number, ties to the even one, by search among all 127 magnitudes."""
    table = torch.arange(127, dtype=torch.uint8).view(FP8).double()
    apart = (values.abs().double()[..., None] - table).abs()
    least = apart.min(-1, keepdim=True).values
    even = torch.arange(127) % 2 == 0
    chosen = torch.where(apart == least, torch.where(even, 0, 1), 2).argmin(-1)
    return table[chosen] * values.sign()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 80), scale=st.sampled_from([1e-25, 1e-3, 9.0, 1e30]))
def test_codes_are_the_nearest(rows, columns, scale):
    x = torch.randn(rows, columns) * torch.logspace(-5, 0, columns) * scale
    x[0, 0] = 0
    codes, steps = quantise_rows_fp8(x)
    largest = x.abs().amax(1)
    assert torch.equal(steps, torch.where(largest > 0, largest / 448, 1.0))
    assert torch.equal(codes.double(), nearest((x / steps[:, None]).clamp(-448, 448)))


def test_rows_of_nan_infinity_zeros_and_the_smallest_numbers():
    x = torch.randn(5, 8)
    x[0, 1], x[1, 2], x[2], x[3] = torch.nan, -torch.inf, 0, 1e-44
    codes, steps = quantise_rows_fp8(x)
    assert steps.isnan().tolist() == [True, True, False, False, False] and steps[2] == 1
    assert codes[:3].float().eq(0).all() and codes.float().isfinite().all()
    y = quant_linear(x, pack_fp8(torch.randn(3, 8)))
    assert y[:2].isnan().all() and y[2:].isfinite().all()


def test_packing():
    _, w, _ = tensors((), 70, 31)
    packed = pack_fp8(w)
    assert packed.scheme == "fp8" and packed.dynamic and packed.nbytes == 31 * 70 + 31 * 4
    assert torch.equal(unpack(packed, torch.float64), packed.data.double() * packed.scale.double()[:, None])
    assert ((unpack(packed) - w).abs() <= w.abs() / 16 + packed.scale[:, None] * 2**-10).all()
    assert prepare(packed) is packed
    ids = torch.tensor([[3, 1]])
    assert torch.equal(quant_embedding(ids, packed), unpack(packed)[ids])
    with pytest.raises(PackingError, match="infinite"):
        pack_fp8(torch.full((2, 2), torch.inf))


def test_files_keep_it():
    packed = pack_fp8(tensors((), 70, 31)[1])
    flat = to_flat(packed, "a")
    read = from_flat(flat, "a")
    assert read[3:] == packed[3:] and torch.equal(unpack(read), unpack(packed))
    still = flat["a.layout"].clone()
    still[5] = 0
    for wrong in ({"a.layout": still}, {"a.data": flat["a.data"].view(torch.int8)}, {"a.scale": flat["a.scale"][1:]}):
        with pytest.raises(PackingError):
            from_flat(flat | wrong, "a")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape, name, dtype):
    """The definition in float64 over the codes; plain PyTorch is the same over unpacked rows and weights."""
    x, w, b = tensors(*shape)
    x, b, packed = x.to(dtype), b.to(dtype), pack_fp8(w)
    codes, steps = quantise_rows_fp8(x)
    seen = codes.double() * steps.double()[..., None]
    with route(name, fp8.FP8_OP):
        for bias in (b, None):
            exact = F.linear(seen, unpack(packed, torch.float64), None if bias is None else bias.double())
            plain = F.linear(seen.to(dtype), unpack(packed, dtype), bias)
            got = quant_linear(x, packed, bias)
            assert got.dtype == dtype
            assert_as_good_as(got, plain, exact, floor=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", ROUTES)
def test_gradient_goes_straight_through(name):
    x, w, b = tensors((5,), 16, 6)
    packed, leaves = pack_fp8(w), [x.requires_grad_(), b.requires_grad_()]
    with route(name, fp8.FP8_OP):
        dx, db = torch.autograd.grad(quant_linear(x, packed, b).sum(), leaves)
    torch.testing.assert_close(dx, unpack(packed).sum(0).expand(5, 16))
    torch.testing.assert_close(db, torch.full((6,), 5.0))


def test_the_gpu_path_of_the_torch_row():
    """PyTorch's float8 product also runs on CPU; on a GPU it is taken where sizes divide by 16."""
    x, w, _ = tensors((5,), 64, 32)
    codes, _ = quantise_rows_fp8(x)
    data = pack_fp8(w).data
    exact = codes.double() @ data.double().T
    assert_as_good_as(fp8.scaled_product(codes, data), codes.float() @ data.float().T, exact)


def test_a_row_does_not_depend_on_its_batch():
    x, w, b = tensors((9,), 70, 31)
    x[3] *= 100
    packed = pack_fp8(w)
    alone = torch.cat([quant_linear(row[None], packed, b) for row in x])
    torch.testing.assert_close(quant_linear(x, packed, b), alone, rtol=1e-5, atol=1e-5)


def test_it_is_close_to_the_full_product():
    x, w, b = tensors((64,), 384, 96)
    error = quant_linear(x, pack_fp8(w), b) - F.linear(x, w, b)
    assert error.square().mean().sqrt() < 0.04 * F.linear(x, w, b).std()


def test_autocast_opcheck_and_compile():
    x, w, b = tensors((3, 4), 33, 6)
    packed = pack_fp8(w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = quant_linear(x, packed, b)
    assert torch.equal(got, quant_linear(x.bfloat16(), packed, b.bfloat16()))
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (x.requires_grad_(), packed.data, packed.scale, b.requires_grad_())
    torch.library.opcheck(fp8._fp8, args, test_utils=checks)  # the schema's test multiplies float8, which CPUs cannot
    compiled = torch.compile(lambda x: quant_linear(x, packed, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), quant_linear(x, packed, b))
