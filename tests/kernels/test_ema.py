"""Moving averages: against float64 after a thousand steps, any shapes and dtypes of values, in place."""

import pytest
import torch
from torch import Tensor

from miss.kernels.ema import ema_, op
from tests.helpers import assert_as_good_as, route

ROUTES = ["torch", "reference"]
SHAPES = [(7,), (33, 5), (), (0, 4), (2, 3, 4), (1,)]


def tensors(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    return [torch.randn(s) for s in SHAPES], [torch.randn(s).to(dtype) for s in SHAPES]


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_thousand_steps_stay_at_the_truth(dtype, name):
    """Values that wander, as parameters do: the twin's error is that of a float32 sum, not of the values' dtype."""
    averages, values = tensors(dtype)
    plain, exact = [a.clone() for a in averages], [a.double() for a in averages]
    generator = torch.Generator().manual_seed(1)
    with route(name, op.UPDATE):
        for _ in range(1000):
            ema_(averages, values, 0.995)
            for p, e, v in zip(plain, exact, values, strict=True):
                p.mul_(0.995).add_(v.float(), alpha=0.005)
                e.mul_(0.995).add_(v.double(), alpha=0.005)
            values = [(v + 0.01 * torch.randn(v.shape, generator=generator).to(dtype)).to(dtype) for v in values]
    for got, p, e in zip(averages, plain, exact, strict=True):
        assert_as_good_as(got, p, e, floor=3e-6)


@pytest.mark.parametrize("name", ROUTES)
def test_mixed_values_any_strides_and_float64(name):
    torch.manual_seed(0)
    averages = [torch.randn(4, 6).T, torch.randn(5)]
    values = [torch.randn(12, 4)[::2], torch.randn(10).bfloat16()[::2]]
    wanted = [a * 0.9 + v.float() * 0.1 for a, v in zip(averages, values, strict=True)]
    places = [a.data_ptr() for a in averages]
    with route(name, op.UPDATE):
        ema_(averages, values, 0.9)
        double = [torch.zeros(3, dtype=torch.float64)]
        ema_(double, [torch.ones(3)], 0.75)
    for got, w in zip(averages, wanted, strict=True):
        torch.testing.assert_close(got, w)
    assert [a.data_ptr() for a in averages] == places and double[0].tolist() == [0.25] * 3


@pytest.mark.parametrize("name", ROUTES)
def test_ends(name):
    averages, values = tensors(torch.float32)
    before = [a.clone() for a in averages]
    with route(name, op.UPDATE):
        ema_(averages, values, 1.0)
        assert all(map(torch.equal, averages, before))
        ema_(averages, values, 0.0)
        for a, v in zip(averages, values, strict=True):
            torch.testing.assert_close(a, v)
    ema_([], [], 0.5)


def test_parameters_as_values_get_no_graph():
    average, value = torch.zeros(3), torch.nn.Parameter(torch.ones(3))
    ema_([average], [value], 0.5)
    assert not average.requires_grad and average.tolist() == [0.5] * 3


def test_bad_arguments():
    a, b = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="as many"):
        ema_([a], [], 0.5)
    with pytest.raises(ValueError, match="lost in rounding"):
        ema_([a.bfloat16()], [b], 0.5)
    with pytest.raises(ValueError, match="one shape"):
        ema_([a], [b[:2]], 0.5)
    with pytest.raises(ValueError, match="momentum"):
        ema_([a], [b], 1.5)


def test_opcheck_and_compile():
    torch.library.opcheck(op._update, ([torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)], 0.5))
    average = torch.zeros(3)

    def function(value):
        ema_([average], [value], 0.5)
        return average + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(3)).tolist() == [1.5] * 3 and average.tolist() == [0.5] * 3
