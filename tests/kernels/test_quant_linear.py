"""Products with packed weights: against the unpacked matrix, and W8A8 against NumPy to the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from miss.kernels.quant_linear import op, pack_int4, prepare, quant_embedding, quant_linear, unpack
from miss.kernels.quant_linear import pack_int8 as pack_only
from miss.kernels.registry import use
from tests.helpers import CPU_ROUTES, assert_as_good_as, check_error_rule, route, threads

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUTES = ["torch", "reference", "custom"]
CPU_DTYPES = (torch.float32, torch.bfloat16)


def pack_int8(w, dynamic=False):
    return prepare(pack_only(w, dynamic))


PACKS = {
    "int8": pack_int8,
    "int4": lambda w: prepare(pack_int4(w, 32, search=False)),
    "int4-wide": lambda w: prepare(pack_int4(w, 128, search=False)),
    "int4-zero": lambda w: prepare(pack_int4(w, 64, symmetric=False, search=False)),
}
SHAPES = [((2, 37), 70, 31), ((1,), 64, 96), ((), 13, 5), ((0, 3), 33, 8), ((19,), 1, 1)]


def tensors(rows, columns, outputs):
    torch.manual_seed(0)
    w = torch.randn(outputs, columns) * columns**-0.5
    return torch.randn(*rows, columns), w, torch.randn(outputs) * 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CPU_ROUTES, *ROUTES])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, pack, name, dtype):
    """Plain PyTorch is a linear over the unpacked matrix; the gradients are those of x and bias."""
    if name == "cpu" and dtype not in CPU_DTYPES:
        pytest.skip("float32 and bfloat16 alone")
    x, w, b = tensors(*shape)
    packed = PACKS[pack](w)
    with route(name, op.FORWARD):
        check_error_rule(
            lambda x, b: quant_linear(x, packed, b),
            lambda x, b: F.linear(x, unpack(packed, x.dtype), b),
            [x, b],
            dtype,
            floor=1e-12 if dtype == torch.float64 else 1e-6,
        )


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 7), columns=st.integers(1, 140), outputs=st.integers(1, 20), pack=st.sampled_from([*PACKS]))
def test_any_size(rows, columns, outputs, pack):
    x, w, _ = tensors((rows,), columns, outputs)
    packed = PACKS[pack](w)
    plain, exact = (F.linear(x.to(d), unpack(packed, d)) for d in (torch.float32, torch.float64))
    for name in (*CPU_ROUTES, "torch", "reference"):
        with route(name, op.FORWARD):
            assert_as_good_as(quant_linear(x, packed), plain, exact, slack=3)


def numpy_w8a8(x, packed, bias):
    """The definition in NumPy: int32 sums, then float32 from left to right."""
    x, data, scale = x.numpy(), packed.data.numpy(), packed.scale.numpy()
    largest = np.abs(x).max(-1, keepdims=True)
    step = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    codes = np.clip(np.rint(x / step), -127, 127).astype(np.int32)
    total = codes @ data.astype(np.int32).T
    y = (total.astype(np.float32) * step) * scale
    return torch.from_numpy(y if bias is None else y + bias.numpy())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20), columns=st.integers(1, 140), outputs=st.integers(1, 20), scale=st.sampled_from([1e-3, 9.0])
)
def test_w8a8_equals_numpy(rows, columns, outputs, scale):
    x, w, b = tensors((rows,), columns, outputs)
    x, packed = x * scale, pack_int8(w, dynamic=True)
    x[0] = 0
    for name in ROUTES if columns > 1 else ["reference"]:  # one column is beyond the torch row on CPU
        with route(name, op.DYNAMIC):
            assert torch.equal(quant_linear(x, packed, b), numpy_w8a8(x, packed, b))
            assert torch.equal(quant_linear(x, packed), numpy_w8a8(x, packed, None))


def test_w8a8_over_one_column_is_left_to_the_reference():
    packed = pack_int8(torch.ones(2, 1), dynamic=True)
    args = (torch.zeros(1, 1), packed.data, packed.scale, None, None, None)
    assert op.DYNAMIC.select(*args).name == "reference" and "one column" in op.DYNAMIC.explain(*args)


def test_w8a8_sums_are_exact_where_float32_ones_are_not():
    """All codes 127: each sum is 127 * 127 * 4096 - … , past float32's 24 bits."""
    x, w = torch.ones(3, 4096), torch.ones(2, 4096)
    w[1, 0] = -1 / 127
    packed = pack_int8(w, dynamic=True)
    for name in (*CPU_ROUTES, "torch", "reference"):
        with route(name, op.DYNAMIC):
            got = quant_linear(x, packed)
        assert torch.equal(got, numpy_w8a8(x, packed, None))


@pytest.mark.parametrize("pack", [*PACKS, "w8a8"])
def test_a_row_does_not_depend_on_its_batch(pack):
    """W8A8 to the last bit; weight-only products go through a GEMM whose order of sums may change with its rows."""
    x, w, b = tensors((9,), 70, 31)
    packed = pack_int8(w, dynamic=True) if pack == "w8a8" else PACKS[pack](w)
    x[3] *= 100
    with use(quant_linear="torch"):
        together, alone = quant_linear(x, packed, b), torch.cat([quant_linear(row[None], packed, b) for row in x])
    if pack == "w8a8":
        assert torch.equal(together, alone)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_w8a8_is_close_to_the_full_product():
    x, w, b = tensors((64,), 384, 96)
    error = quant_linear(x, pack_int8(w, dynamic=True), b) - F.linear(x, w, b)
    assert error.square().mean().sqrt() < 0.015 * F.linear(x, w, b).std()


@pytest.mark.parametrize("name", ROUTES)
def test_w8a8_gradient_goes_straight_through(name):
    x, w, b = tensors((5,), 16, 6)
    packed, leaves = pack_int8(w, dynamic=True), [x.requires_grad_(), b.requires_grad_()]
    with route(name, op.DYNAMIC):
        dx, db = torch.autograd.grad(quant_linear(x, packed, b).sum(), leaves)
    torch.testing.assert_close(dx, unpack(packed).sum(0).expand(5, 16))
    torch.testing.assert_close(db, torch.full((6,), 5.0))


def test_no_dense_weight_is_kept_for_backward():
    x, w, b = tensors((2,), 128, 64)
    packed, saved = pack_int4(w, 64, search=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        quant_linear(x.requires_grad_(), packed, b)
    assert sum(saved) <= packed.nbytes


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_rows_of_the_unpacked_table(pack, dtype):
    _, table, _ = tensors((1,), 70, 31)
    packed = PACKS[pack](table)
    for ids in (torch.randint(0, 31, (3, 5)), torch.tensor(7), torch.empty(0, 4, dtype=torch.int64)):
        for name in ROUTES:
            with route(name, op.EMBEDDING):
                got = quant_embedding(ids, packed, dtype)
            assert got.dtype == dtype and torch.equal(got, unpack(packed, dtype)[ids])


@pytest.mark.parametrize("dynamic", [False, True])
def test_autocast(dynamic):
    x, w, b = tensors((5,), 16, 6)
    packed = pack_int8(w, dynamic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = quant_linear(x, packed, b)
    assert torch.equal(got, quant_linear(x.bfloat16(), packed, b.bfloat16()))


def test_bad_arguments():
    x, w, b = tensors((5,), 16, 6)
    for bad in ((x[:, 1:], pack_int8(w), b), (x, pack_int8(w), b[1:])):
        with pytest.raises(ValueError, match="wants x"):
            quant_linear(*bad)
    with pytest.raises(ValueError, match="int8 weight"):
        quant_linear(x, pack_int4(w)._replace(dynamic=True))


def test_opcheck():
    x, w, b = tensors((3, 4), 33, 6)
    checks = ("test_schema", "test_faketensor")
    packed = PACKS["int4-zero"](w)
    parts, prepared = (packed.data, packed.scale, packed.zero), packed.prepared or (None, None)
    torch.library.opcheck(op._forward, (x.requires_grad_(), *parts, b.requires_grad_(), 33, 64, *prepared))
    eight = pack_int8(w)
    torch.library.opcheck(op._dynamic, (x, eight.data, eight.scale, b, *(eight.prepared or (None, None))))
    ids = torch.tensor([[1, 2], [5, 0]])
    for name in ROUTES[:2]:
        with route(name, op.FORWARD), route(name, op.DYNAMIC), route(name, op.EMBEDDING):
            for dtype in DTYPES:
                x, b = x.detach().to(dtype), b.detach().to(dtype)
                torch.library.opcheck(op._forward, (x, *parts, None, 33, 64, None, None), test_utils=checks)
                torch.library.opcheck(op._dynamic, (x, eight.data, eight.scale, b, None, None), test_utils=checks)
                dy = torch.randn(3, 4, 6, dtype=dtype)
                torch.library.opcheck(op._backward, (dy, *parts, 33, 64), test_utils=checks)
                args = (packed.scale, packed.data, packed.zero, ids, 33, 64, dtype)
                torch.library.opcheck(op._embedding, args, test_utils=checks)


def test_compiles_without_a_break():
    x, w, b = tensors((5,), 33, 6)
    x.requires_grad_()
    table, four, eight = pack_int8(w), pack_int4(w, 32, search=False), pack_int8(w, dynamic=True)

    def function(x, ids):
        return (quant_linear(x, four, b) + quant_linear(x, eight)).sum() + quant_embedding(ids, table).sum()

    compiled, ids = torch.compile(function, fullgraph=True, backend="aot_eager"), torch.tensor([3, 1])
    got, wanted = compiled(x, ids), function(x, ids)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(wanted, x))


@pytest.mark.skipif(not CPU_ROUTES, reason="the CPU kernels do not run here")
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("pack", [*PACKS, "w8a8"])
def test_bitwise_for_any_threads_and_batch(pack, dtype):
    """Few rows are decoded in registers, more in scratch: a row's result is the same."""
    x, w, b = (t.to(dtype) for t in tensors((61,), 583, 203))
    packed = pack_int8(w.float(), dynamic=True) if pack == "w8a8" else PACKS[pack](w.float())
    with torch.no_grad(), route("cpu", op.FORWARD), route("cpu", op.DYNAMIC):
        with threads(1):
            alone = torch.cat([quant_linear(row[None], packed, b) for row in x])
        for count in (1, 2, 3):
            with threads(count):
                for rows in (1, 2, 3, 4, 5, 7, 61):
                    assert torch.equal(quant_linear(x[:rows], packed, b), alone[:rows]), (count, rows)


@pytest.mark.skipif(not CPU_ROUTES, reason="the CPU kernels do not run here")
def test_a_row_of_nan_is_nan():
    x, w, _ = tensors((4,), 70, 31)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    with torch.no_grad(), route("cpu", op.DYNAMIC):
        y = quant_linear(x, pack_int8(w, dynamic=True))
    assert y[1].isnan().all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()
