"""Linear layers whose result goes to given places: the same numbers as without, in any layout, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.kernels import registry
from miss.kernels.linear import linear, linear_into, prepare
from miss.kernels.quant_linear import pack_int8, quant_linear, quant_linear_into
from miss.kernels.quant_linear import prepare as prepare_packed

ORDERS = {"by token": (0, 1, 2, 3, 4, 5), "by head": (0, 2, 3, 4, 1, 5), "by layer": (2, 0, 1, 3, 4, 5)}


def room(shape: tuple[int, ...], order: str, dtype: torch.dtype) -> torch.Tensor:
    """(I, N, layers, 2, H, D) whose memory is in another order, full of NaN."""
    dims = ORDERS[order]
    memory = torch.full([shape[d] for d in dims], float("nan"), dtype=dtype)
    return memory.permute([dims.index(d) for d in range(6)])


@settings(max_examples=30, deadline=None)
@given(
    order=st.sampled_from(sorted(ORDERS)),
    images=st.integers(0, 3),
    tokens=st.sampled_from([1, 5, 49, 64, 131]),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    int8=st.booleans(),
)
def test_the_same_numbers_in_other_places(
    order: str, images: int, tokens: int, heads: int, width: int, dtype: torch.dtype, int8: bool
) -> None:
    torch.manual_seed(images * tokens + heads)
    shape = (images, tokens, 2, 2, heads, width)
    num_outputs = 4 * heads * width
    x, weight, bias = torch.randn(images, tokens, 48), torch.randn(num_outputs, 48), torch.randn(num_outputs)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    out = room(shape, order, dtype)
    if int8:
        packed = prepare_packed(pack_int8(weight, True))
        wanted, got = quant_linear(x, packed, bias), quant_linear_into(x, packed, bias, out)
    else:
        panels = prepare(weight)
        wanted, got = linear(x, weight, bias, None, panels), linear_into(x, weight, bias, out, panels)
    assert got is out
    assert torch.equal(out, wanted.view(shape)) or torch.allclose(out, wanted.view(shape), rtol=2e-2, atol=2e-2)
    if width != 8:  # one row of the table computed both
        assert torch.equal(out, wanted.view(shape))


def test_a_part_of_a_pool_is_written_and_nothing_beside_it() -> None:
    pool = room((4, 70, 2, 2, 2, 32), "by head", torch.float32)
    x, weight = torch.randn(1, 70, 16), torch.randn(256, 16)
    linear_into(x, weight, None, pool[2:3], prepare(weight))
    assert torch.equal(pool[2:3], linear(x, weight, None, None, prepare(weight)).view(1, 70, 2, 2, 2, 32))
    assert pool[[0, 1, 3]].isnan().all()


def test_every_row_of_the_table_writes_it() -> None:
    x, weight = torch.randn(70, 16), torch.randn(64, 16)
    packed = prepare_packed(pack_int8(weight, True))
    for name in ("torch", "reference"):
        with registry.use(linear_into=name, quant_linear_into=name):
            out = linear_into(x, weight, None, torch.empty(2, 32, 70).permute(2, 0, 1))
            assert torch.allclose(out.flatten(1), x @ weight.T, atol=1e-4)
            out = quant_linear_into(x, packed, None, torch.empty(2, 32, 70).permute(2, 0, 1))
            assert torch.allclose(out.flatten(1), quant_linear(x, packed, None), atol=1e-4)


def test_operator_checks() -> None:
    x, weight, out = torch.randn(3, 70, 16), torch.randn(64, 16), torch.empty(3, 70, 2, 32)
    torch.library.opcheck(torch.ops.miss.linear_into.default, (x, weight, None, prepare(weight), out))
    packed = prepare_packed(pack_int8(weight, True))
    args = (x, packed.data, packed.scale, None, *(packed.prepared or (None, None)), out)
    torch.library.opcheck(torch.ops.miss.quant_linear_into.default, args)


@pytest.mark.parametrize(
    "out", [torch.empty(70, 2, 31), torch.empty(69, 2, 32), torch.empty(70, 2, 32, dtype=torch.float64)]
)
def test_a_place_that_does_not_fit_is_an_error(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="wanted"):
        linear_into(torch.randn(70, 16), torch.randn(64, 16), None, out)
