"""A linear layer into given places in Triton against float64, by the error rule; nothing beside them is written.

Interpreted, this does not show what a GPU's bfloat16 products round, races between programs, or alignment.
"""

import pytest
import torch

from miss.kernels.launches import Launch
from miss.kernels.linear import into, reference, torch_impl, triton_impl
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

FLOORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # a place of the dtype
# the order in memory of (images, tokens, layers, keys and values, heads, width)
ORDERS = {"by token": (0, 1, 2, 3, 4, 5), "by head": (0, 2, 3, 4, 1, 5), "by layer": (2, 0, 1, 3, 4, 5)}
# images, tokens, layers, 2, heads, width
SHAPES = [(2, 17, 3, 2, 3, 8), (1, 5, 2, 2, 1, 32), (3, 1, 1, 2, 5, 4), (1, 1, 1, 1, 1, 1), (0, 5, 2, 2, 1, 4)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for kind in triton_impl.LAUNCHES:
        monkeypatch.setitem(triton_impl.LAUNCHES, kind, (Launch({"BM": 16, "BN": 32, "BK": 16, "GROUP": 2}, 1, 1),))


def room(shape, order, dtype):
    """A tensor of `shape` whose memory is in another order, full of NaN."""
    dims = ORDERS[order]
    memory = torch.full([shape[d] for d in dims], float("nan"), dtype=dtype, device=DEVICE)
    return memory.permute([dims.index(d) for d in range(6)])


def inputs(shape, width, dtype):
    """x, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    images, tokens, *places = shape
    outputs = torch.Size(places).numel()
    shapes = (images, tokens, width), (outputs, width), (outputs,)
    made = (torch.randn(s, generator=generator) * f for s, f in zip(shapes, (1.0, width**-0.5, 0.3), strict=True))
    return [t.to(DEVICE, dtype) for t in made]


def check(tensors, out, bias=True):
    x, weight, b = tensors
    b = b if bias else None
    triton_impl.into(x, weight, b, None, out)
    plain = torch_impl.forward(x, weight, b, None, None).view(out.shape)
    exact = reference.forward(x.double(), weight.double(), None if b is None else b.double(), None, None)
    assert_as_good_as(out, plain, exact.view(out.shape), floor=FLOORS[x.dtype])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, order):
    check(inputs(shape, 40, torch.float32), room(shape, order, torch.float32), bias=shape[0] != 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_and_a_float32_weight(dtype):
    shape = SHAPES[0]
    x, weight, bias = inputs(shape, 33, dtype)
    out, other = (room(shape, "by head", dtype) for _ in range(2))
    check([x, weight, bias], out)
    triton_impl.into(x, weight.float(), bias.float(), None, other)
    assert torch.equal(out, other)


def test_the_launches_of_the_table(monkeypatch):
    """As on a GPU: a tile that goes beyond all the rows, columns that are several heads, and 197 tokens."""
    monkeypatch.undo()
    shape = (1, 197, 2, 2, 2, 32)
    check(inputs(shape, 70, torch.bfloat16), room(shape, "by head", torch.bfloat16))
    shape = (1, 3, 1, 2, 3, 32)
    check(inputs(shape, 40, torch.float32), room(shape, "by layer", torch.float32))


def test_a_part_of_a_pool_is_written_and_nothing_beside_it():
    pool = room((4, 20, 2, 2, 2, 8), "by head", torch.float32)
    x, weight, bias = inputs((2, 19, 2, 2, 2, 8), 24, torch.float32)
    part = pool[1:3, :19]
    check([x, weight, bias], part)
    assert pool[[0, 3]].isnan().all() and pool[:, 19].isnan().all() and part.isfinite().all()


def test_strides_of_x_and_weight_and_rows_alone():
    shape = (3, 7, 2, 2, 1, 8)
    x, weight, bias = inputs(shape, 40, torch.float32)
    wanted, got = (room(shape, "by head", torch.float32) for _ in range(2))
    triton_impl.into(x[..., 8:].contiguous(), weight[:, 8:].contiguous(), bias, None, wanted)
    triton_impl.into(x[..., 8:], weight[:, 8:].T.contiguous().T, torch.stack([bias, bias], 1)[:, 0], None, got)
    assert torch.equal(got, wanted)
    alone = room((1, 1, *shape[2:]), "by token", torch.float32)
    triton_impl.into(x[1:2, 3:4, 8:], weight[:, 8:], bias, None, alone)
    assert torch.equal(alone, wanted[1:2, 3:4])


@pytest.mark.parametrize("bug", ["width", "rows", "heads", "bias"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    kernel, shape = triton_impl._into, (2, 17, 3, 2, 3, 8)
    at, wrong = {  # the argument that is changed: K, M, the near stride, the bias
        "width": (6, lambda a: a - 1),
        "rows": (4, lambda a: a - 1),
        "heads": (14, lambda a: a // 2),
        "bias": (2, lambda a: a * 0.9),
    }[bug]

    class Patched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                return kernel[grid](*args[:at], wrong(args[at]), *args[at + 1 :], **options)

            return launch

    monkeypatch.setattr(triton_impl, "_into", Patched())
    out = room(shape, "by head", torch.float32)
    with pytest.raises(AssertionError, match="error"):
        check(inputs(shape, 40, torch.float32), out.nan_to_num_(nan=9.0))


def test_limits():
    shape = (2, 3, 2, 2, 2, 8)
    x, weight, bias = inputs(shape, 8, torch.bfloat16)
    limits = next(i for i in into.INTO.impls if i.name == "triton").limits
    out = room(shape, "by head", torch.bfloat16)
    assert limits(x, weight, bias, None, out) is None and limits(x, weight.float(), bias, None, out) is None
    assert "the weight" in limits(x, weight.half(), bias, None, out)
    assert "bias" in limits(x, weight, bias.double(), None, out)
    assert "dense elements" in limits(x, weight, bias, None, torch.cat([out, out], -1)[..., ::2])
    steps = torch.empty(2, 3, 4, 3, 5, 16, dtype=torch.bfloat16)[:, :, ::2, :2, :2, :8]
    assert "places of three" in limits(x, weight, bias, None, steps)
    assert into.dense_dims(out, 2, 6, 3) == [(1, 0), (8, 24), (8, 1)] and into.dense_dims(out, 0, 2, 2) == [
        (2, 192),
        (3, 8),
    ]
