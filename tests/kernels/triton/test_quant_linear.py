"""Products with packed weights in Triton against float64, by the error rule; embedding rows bit for bit; planted bugs.

Interpreted, this does not show what a GPU's bfloat16 products round, races between programs, or alignment.
"""

import pytest
import torch

from miss.kernels.quant_linear import pack_int4, pack_int8, reference, torch_impl, triton_backward_impl, triton_impl
from miss.kernels.quant_linear.op import BACKWARD, EMBEDDING, FORWARD
from miss.kernels.quant_linear.triton_impl import FEW
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

PACKS = {
    "int8": pack_int8,
    "int4-32": lambda w: pack_int4(w, 32, search=False),
    "int4-64-zero": lambda w: pack_int4(w, 64, symmetric=False, search=False),
    "int4-128": lambda w: pack_int4(w, 128, search=False),
}
# rows, columns, outputs
SIZES = [((2, 3), 70, 37), ((1,), 300, 5), ((), 13, 1), ((0, 3), 33, 8), ((19,), 1, 17), ((70,), 197, 67)]
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # a place: the interpreter truncates


def inputs(rows, columns, outputs, pack, dtype):
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(outputs, columns, generator=generator), torch.randn(outputs, generator=generator)
    x = torch.randn(*rows, columns, generator=generator)
    packed = PACKS[pack](w * columns**-0.5).to(DEVICE)
    return x.to(DEVICE, dtype), packed, (b * 0.1).to(DEVICE, dtype)


def run(module, x, packed, bias, **changed):
    p = packed._replace(**changed)
    return module.forward(x, p.data, p.scale, p.zero, bias, p.shape[1], p.group, None, None)


def check(size, pack, dtype, **changed):
    x, packed, b = inputs(*size, pack, dtype)
    bias = b if size[2] != 37 else None
    exact = run(reference, x.double(), packed, None if bias is None else b.double())
    got = run(triton_impl, x, packed, bias, **changed)
    assert got.dtype == dtype
    assert_as_good_as(got, run(torch_impl, x, packed, bias), exact, floor=FLOOR[dtype])


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_rule(size, pack):
    check(size, pack, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[1], SIZES[5]], ids=str)
def test_halves(size, pack, dtype):
    """The forms for few rows and for many; float32 has one form."""
    check(size, pack, dtype)


def check_gradient(size, pack, dtype, **changed):
    _, packed, _ = inputs(*size, pack, dtype)
    dy = torch.randn(*size[0], size[2], generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def gradient(module, dy, p):
        return module.backward(dy, p.data, p.scale, p.zero, p.shape[1], p.group)

    exact = gradient(reference, dy.double(), packed)
    got = gradient(triton_backward_impl, dy, packed._replace(**changed))
    assert got.dtype == dtype
    assert_as_good_as(got, gradient(torch_impl, dy, packed), exact, floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient(size, pack, dtype):
    """Of x; dbias is a sum that no kernel makes."""
    check_gradient(size, pack, dtype)


@pytest.mark.parametrize("pack", ["int8", "int4-64-zero"])
def test_a_row_does_not_depend_on_its_batch(pack):
    """Bit for bit up to FEW rows."""
    x, packed, b = inputs((33,), 300, 37, pack, torch.float16)
    together = run(triton_impl, x, packed, b)
    alone = torch.cat([run(triton_impl, row[None], packed, b) for row in x[::8]])
    assert torch.equal(together[::8], alone)


@pytest.mark.parametrize("pack", ["int8", "int4-64-zero"])
def test_beyond_few_rows_a_row_changes_by_rounding_alone(pack):
    """The one exception from batch invariance: past FEW rows K is summed in another order. What is chosen from a row
    (its largest output) stays, but where the two largest are nearer than what rounding may move: 1e-2."""
    x, packed, b = inputs((FEW + 8,), 300, 67, pack, torch.bfloat16)
    together = run(triton_impl, x, packed, b).float()
    alone = run(triton_impl, x[:8], packed, b).float()
    torch.testing.assert_close(together[:8], alone, atol=1e-2, rtol=1e-2)
    first, second = alone.topk(2).values.unbind(1)
    clear = first - second > 1e-2
    assert clear.sum() >= 6 and torch.equal(together[:8].argmax(1)[clear], alone.argmax(1)[clear])


def test_strides_and_float32_bias():
    x, packed, b = inputs((5,), 70, 37, "int8", torch.float16)
    wanted = run(triton_impl, x, packed, b)
    apart = torch.cat([x, x], 1)[:, :70]
    for strided in (apart, x.T.contiguous().T):
        assert torch.equal(run(triton_impl, strided, packed, torch.stack([b, b], 1)[:, 0]), wanted)
    assert torch.equal(run(triton_impl, x, packed, b.float()), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", PACKS)
def test_embedding(pack, dtype):
    _, packed, _ = inputs((1,), 70, 31, pack, torch.float32)
    args = (packed.scale, packed.data, packed.zero)
    for ids in (torch.tensor([[30, 0, -1], [7, 7, 2]]), torch.tensor(7, dtype=torch.int32), torch.empty(0, 4).long()):
        ids, end = ids.to(DEVICE), (70, packed.group, dtype)
        got, wanted = triton_impl.embedding(*args, ids, *end), torch_impl.embedding(*args, ids, *end)
        assert got.dtype == dtype and got.shape == wanted.shape
        if dtype == torch.bfloat16:  # truncated by the interpreter
            torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)
        else:
            assert torch.equal(got, wanted)
    unknown = triton_impl.embedding(*args, torch.tensor([31, -32], device=DEVICE), 70, packed.group, dtype)
    assert unknown.isnan().all()


def test_limits():
    x, packed, b = inputs((5,), 70, 37, "int8", torch.float32)
    row = next(i for i in FORWARD.impls if i.name == "triton")
    args = (packed.data, packed.scale, None, b, 70, 0, None, None)
    assert row.limits(x, *args) is None and torch.float64 not in row.dtypes
    assert "bias" in row.limits(x, *args[:3], b.double(), *args[4:])
    assert "element" in row.limits(x[:, :0], packed.data[:, :0], *args[1:])
    assert "contiguous" in row.limits(x, packed.data.T, *args[1:])
    gradient = next(i for i in BACKWARD.impls if i.name == "triton")
    assert gradient.limits(b, packed.data, packed.scale, None, 70, 0) is None
    table = next(i for i in EMBEDDING.impls if i.name == "triton")
    ids = torch.tensor([1])
    assert table.limits(packed.scale, packed.data, None, ids, 70, 0, torch.float16) is None
    assert "float32" in table.limits(packed.scale, packed.data, None, ids, 70, 0, torch.float64)
    assert "int64" in table.limits(packed.scale, packed.data, None, ids.short(), 70, 0, torch.float16)


@pytest.mark.parametrize("bug", ["scale", "zero", "nibble", "tail", "rows"])
@pytest.mark.parametrize("rows", [5, 70])
def test_planted_bugs_are_seen(bug, rows):
    size, pack = ((rows,), 197, 67), "int4-64-zero"
    _, packed, _ = inputs(*size, pack, torch.float16)
    swapped = (packed.data >> 4) | (packed.data << 4)
    changed = {
        "scale": {"scale": packed.scale.roll(1, 1)},
        "zero": {"zero": packed.zero + 1},
        "nibble": {"data": swapped},
        "tail": {"shape": (67, 196)},
        "rows": {"data": packed.data.roll(1, 0)},
    }[bug]
    with pytest.raises(AssertionError, match="error"):
        check(size, pack, torch.float16, **changed)
    if bug != "tail":  # there a number is not written at all
        with pytest.raises(AssertionError, match="error"):
            check_gradient(size, pack, torch.float16, **changed)
