"""Linear and exact GELU in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round, its erf, races between programs, or alignment.
"""

import pytest
import torch

from miss.kernels import triton_parts
from miss.kernels.gelu_mlp import op, reference, torch_impl, triton_impl
from miss.kernels.launches import Launch
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

# rows, width, inner width
SHAPES = [((2, 17), 48, 65), ((65,), 31, 17), ((3, 7), 16, 64), ((), 32, 16), ((1, 1), 1, 7), ((0, 3), 8, 5)]
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # a place of the dtype


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    product = {"BM": 16, "BN": 32, "BK": 16, "GROUP": 2}
    table = {"forward": product, "forward-float32": product, "backward": {"BM": 4, "BN": 32, "PARTS": 3}}
    for kind, blocks in {**table, "sum": {"BP": 2, "BC": 32}}.items():
        monkeypatch.setitem(triton_impl.LAUNCHES, kind, (Launch(blocks, 1, 1),))


def inputs(rows, width, inner, dtype):
    """x, weight, bias, dy."""
    generator = torch.Generator().manual_seed(0)
    shapes = (*rows, width), (inner, width), (inner,), (*rows, inner)
    scales = 2.0, width**-0.5, 0.2, 1.0
    made = (torch.randn(s, generator=generator) * f for s, f in zip(shapes, scales, strict=True))
    return [t.to(DEVICE, dtype) for t in made]


def run(module, tensors, bias=True):
    x, weight, b, dy = tensors
    y, pre = module.forward(x, weight, b if bias else None, True, None)
    return [y, pre, *module.backward(dy, x, weight, pre)]


def check(tensors, bias=True, module=triton_impl):
    dtype = tensors[0].dtype
    exactly = [t.double() for t in tensors]
    results = run(module, tensors, bias), run(torch_impl, tensors, bias), run(reference, exactly, bias)
    names = ("y", "z", "dx", "dweight", "dbias")
    for name, got, plain, exact in zip(names, *results, strict=True):
        assert got.dtype == plain.dtype
        assert_as_good_as(got, plain, exact, floor=FLOORS[dtype], what=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape):
    check(inputs(*shape, torch.float32), bias=shape[1] != 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype):
    check(inputs((37,), 48, 65, dtype))


def test_the_launches_of_the_table(monkeypatch):
    """As on a GPU: tiles that go beyond all the rows and columns, and 197 rows."""
    monkeypatch.undo()
    check(inputs((5,), 70, 130, torch.float32))
    check(inputs((197,), 64, 129, torch.bfloat16))


def test_the_exact_form_not_the_approximation():
    x = torch.linspace(-6, 6, 121, device=DEVICE)[:, None]
    y, none = triton_impl.forward(x, torch.ones(1, 1, device=DEVICE), None, False, None)
    assert (y - x.double() * torch.special.ndtr(x.double())).abs().max() < 2e-6 and none.numel() == 0


def test_strides_and_a_float32_weight():
    x, weight, bias, dy = inputs((4, 6), 40, 20, torch.float32)
    wanted = run(triton_impl, [x[:, ::2, 8:].contiguous(), weight[:, 8:].contiguous(), bias, dy[:, ::2].contiguous()])
    strided = [x[:, ::2, 8:], weight[:, 8:], torch.stack([bias, bias], 1)[:, 0], dy[:, ::2]]
    assert all(map(torch.equal, run(triton_impl, strided), wanted))
    strided[1] = weight[:, 8:].T.contiguous().T
    assert all(map(torch.equal, run(triton_impl, strided)[:2], wanted[:2]))
    half = x.bfloat16()
    y, pre = triton_impl.forward(half, weight, bias, True, None)
    assert torch.equal(y, triton_impl.forward(half, weight.bfloat16(), bias, False, None)[0])
    dx, dweight, dbias = triton_impl.backward(dy.bfloat16(), half, weight, pre)
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_a_row_does_not_see_the_others_and_runs_repeat():
    tensors = inputs((41,), 48, 65, torch.float32)
    whole = run(triton_impl, tensors)
    assert all(map(torch.equal, run(triton_impl, tensors), whole))
    for row in (0, 23, 40):
        alone = triton_impl.forward(tensors[0][row : row + 1], *tensors[1:3], True, None)
        assert all(torch.equal(a, w[row : row + 1]) for a, w in zip(alone, whole, strict=False))


@pytest.mark.parametrize("bug", ["tail", "rows", "approximation", "slope", "parts"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    tensors = inputs((37,), 50, 65, torch.float32)
    if bug in ("approximation", "slope"):
        name, wrong = {
            "approximation": ("erf_gelu", lambda z: z * triton_impl.tl.sigmoid(1.702 * z)),
            "slope": ("erf_gelu_grad", lambda z: triton_parts.erf_gelu_grad(z) * (z < 2.0)),
        }[bug]
        monkeypatch.setattr(triton_impl, name, wrong)
    else:
        name, at = {"tail": ("_forward", 7), "rows": ("_backward", 4), "parts": ("sum_parts", 3)}[bug]  # C, M, P
        kernel = getattr(triton_impl, name)

        class Patched:
            def __getitem__(self, grid):
                def launch(*args, **options):
                    return kernel[grid](*args[:at], args[at] - 1, *args[at + 1 :], **options)

                return launch

        monkeypatch.setattr(triton_impl, name, Patched())
    with pytest.raises(AssertionError, match="error"):
        check(tensors)


def test_limits():
    x, weight, bias, dy = inputs((3,), 8, 5, torch.bfloat16)
    forward, backward = (next(i for i in t.impls if i.name == "triton").limits for t in (op.FORWARD, op.BACKWARD))
    assert forward(x, weight.float(), bias, True, None) is None and backward(dy, x, weight, dy) is None
    assert "the weight" in forward(x, weight.half(), bias, True, None)
    assert "bias" in forward(x, weight, bias.double(), True, None)
    assert "column" in forward(x[:, :0], weight[:, :0], bias, True, None)
    assert "one dtype" in backward(dy.float(), x, weight, dy)
