"""W8A8 into given places in Triton: the reference's bits in float32, the error rule in halves; nothing beside them.

Interpreted, this does not show races between programs, alignment, or whether a GPU's compiler fuses the epilogue's
multiplication and addition (one rounding fewer).
"""

import pytest
import torch

from miss.kernels.launches import Launch
from miss.kernels.quant_linear import into, pack_int8, reference, triton_into_impl
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

# the order in memory of (images, tokens, layers, keys and values, heads, width)
ORDERS = {"by token": (0, 1, 2, 3, 4, 5), "by head": (0, 2, 3, 4, 1, 5), "by layer": (2, 0, 1, 3, 4, 5)}
# images, tokens, layers, 2, heads, width
SHAPES = [(2, 17, 3, 2, 3, 8), (1, 5, 2, 2, 1, 32), (3, 1, 1, 2, 5, 4), (1, 1, 1, 1, 1, 1), (0, 5, 2, 2, 1, 4)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    small = Launch({"BM": 16, "BN": 32, "BK": 32, "GROUP": 2}, 1, 1)
    monkeypatch.setitem(triton_into_impl.LAUNCHES, "into", (small,))


def room(shape, order, dtype):
    """A tensor of `shape` whose memory is in another order, full of NaN."""
    dims = ORDERS[order]
    memory = torch.full([shape[d] for d in dims], float("nan"), dtype=dtype, device=DEVICE)
    return memory.permute([dims.index(d) for d in range(6)])


def inputs(shape, width, dtype=torch.float32):
    """x, packed weight, bias."""
    generator = torch.Generator().manual_seed(0)
    images, tokens, *places = shape
    outputs = torch.Size(places).numel()
    x = torch.randn(images, tokens, width, generator=generator).to(DEVICE, dtype)
    weight = pack_int8(torch.randn(outputs, width, generator=generator), dynamic=True).to(DEVICE)
    return x, weight, torch.randn(outputs, generator=generator).to(DEVICE, dtype)


def run(x, packed, bias, out):
    triton_into_impl.into(x, packed.data, packed.scale, bias, None, None, out)
    return out


def check(x, packed, bias, out):
    run(x, packed, bias, out)
    exact = reference.dynamic(x.double(), packed.data, packed.scale, None if bias is None else bias.double())
    plain = reference.dynamic(x, packed.data, packed.scale, bias)
    floor = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[x.dtype]  # a place: bfloat16 truncates
    assert_as_good_as(out, plain.view(out.shape), exact.view(out.shape), floor=floor)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_the_references_bit_for_bit(shape, order):
    x, packed, b = inputs(shape, 40)
    for bias in (b, None):
        out = run(x, packed, bias, room(shape, order, torch.float32))
        wanted = reference.dynamic(x, packed.data, packed.scale, bias).view(out.shape)
        assert torch.equal(out, wanted) if DEVICE == "cpu" else torch.allclose(out, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 33, 64])
def test_error_rule_in_halves(dtype, width):
    check(*inputs(SHAPES[0], width, dtype), room(SHAPES[0], "by head", dtype))


def test_the_launch_of_the_table(monkeypatch):
    """As on a GPU: a tile that goes beyond all the rows, columns that are several heads, and 197 tokens."""
    monkeypatch.undo()
    shape = (1, 197, 2, 2, 2, 32)
    check(*inputs(shape, 70, torch.bfloat16), room(shape, "by head", torch.bfloat16))


def test_a_part_of_a_pool_is_written_and_nothing_beside_it():
    pool = room((4, 20, 2, 2, 2, 8), "by head", torch.float32)
    part = pool[1:3, :19]
    check(*inputs((2, 19, 2, 2, 2, 8), 24), part)
    assert pool[[0, 3]].isnan().all() and pool[:, 19].isnan().all() and part.isfinite().all()


def test_strides_of_x_and_rows_alone_are_the_same_bits():
    shape = (3, 7, 2, 2, 1, 8)
    x, packed, bias = inputs(shape, 40)
    wanted = run(x, packed, bias, room(shape, "by head", torch.float32))
    strided = torch.cat([x, x], -1)[..., 40:]
    assert torch.equal(run(strided, packed, bias, room(shape, "by layer", torch.float32)), wanted)
    alone = run(x[1:2, 3:4], packed, bias, room((1, 1, *shape[2:]), "by token", torch.float32))
    assert torch.equal(alone, wanted[1:2, 3:4])


def test_a_row_of_nan_stays_alone():
    x, packed, bias = inputs(SHAPES[0], 40)
    x[0, 3, 5] = float("nan")
    out = run(x, packed, bias, room(SHAPES[0], "by head", torch.float32))
    assert out[0, 3].isnan().all() and out.isfinite().sum() == out.numel() - out[0, 3].numel()


@pytest.mark.parametrize("bug", ["width", "rows", "heads", "bias", "scale"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    kernel, shape = triton_into_impl._into, (2, 17, 3, 2, 3, 8)
    at, wrong = {  # the argument that is changed: K, M, the near stride, the bias, the rows' scales
        "width": (8, lambda a: a - 1),
        "rows": (6, lambda a: a - 1),
        "heads": (14, lambda a: a // 2),
        "bias": (4, lambda a: a * 0.9),
        "scale": (1, lambda a: a.flip(0)),
    }[bug]

    class Patched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                return kernel[grid](*args[:at], wrong(args[at]), *args[at + 1 :], **options)

            return launch

    monkeypatch.setattr(triton_into_impl, "_into", Patched())
    out = room(shape, "by head", torch.float32)
    with pytest.raises(AssertionError, match="error"):
        check(*inputs(shape, 40), out.nan_to_num_(nan=9.0))


def test_limits():
    shape = (2, 3, 2, 2, 2, 8)
    x, packed, bias = inputs(shape, 8, torch.bfloat16)
    limits = next(i for i in into.INTO.impls if i.name == "triton").limits
    out = room(shape, "by head", torch.bfloat16)

    def why(x=x, data=packed.data, bias=bias, out=out):
        return limits(x, data, packed.scale, bias, None, None, out)

    assert why() is None
    assert (
        "out" in why(out=out.float()) and "bias" in why(bias=bias.double()) and "int8" in why(data=packed.data.float())
    )
    assert "dense elements" in why(out=torch.cat([out, out], -1)[..., ::2])
    steps = torch.empty(2, 3, 4, 3, 5, 16, dtype=torch.bfloat16)[:, :, ::2, :2, :2, :8]
    assert "places of three" in why(out=steps)
