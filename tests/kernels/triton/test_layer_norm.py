"""Layer normalization in Triton against float64, by the error rule; codes bit for bit; planted bugs are seen.

Interpreted, this does not show what a GPU rounds to bfloat16 (it truncates here), its reciprocal square root, the order
of sums within a row, or races between programs.
"""

import pytest
import torch

from miss.kernels.dropout import as_seed, keep_mask
from miss.kernels.launches import Launch
from miss.kernels.layer_norm import op, reference, torch_impl, triton_impl
from miss.kernels.layer_norm.quantised import ADD_QUANTISED, QUANTISED
from miss.kernels.quant_linear.packing import quantise_rows
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

EPS = 1e-5
SHAPES = [(1, 1), (5, 17), (2, 3, 65), (7,), (0, 5, 8), (1, 197, 12)]
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # a place of the dtype: see above
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    backward = {"ROWS": 2, "PROGRAMS": 3, "STAGES": 1}
    for kind, blocks in (("forward", {"ROWS": 4}), ("backward", backward), ("sum", {"BP": 2, "BC": 32})):
        monkeypatch.setitem(triton_impl.LAUNCHES, kind, (Launch(blocks, 1, 1),))


def inputs(shape, dtype):
    """x, residual, weight, bias, dy, dsummed."""
    generator = torch.Generator().manual_seed(0)
    x, residual, dy, dsummed = (torch.randn(shape, generator=generator) * 2 + 0.5 for _ in range(4))
    weight, bias = torch.randn(2, shape[-1], generator=generator) * 0.3 + 1
    return [t.to(DEVICE, dtype) for t in (x, residual, weight, bias, dy, dsummed)]


def run(module, tensors, p=None, seed=7):
    """Every result, forward and backward; p is None for the plain form."""
    x, residual, weight, bias, dy, dsummed = tensors
    if p is None:
        y, mean, rstd = module.forward(x, weight, bias, EPS)
        return [y, mean, rstd, *module.backward(dy, x, weight, mean, rstd)]
    seed = as_seed(seed, p)
    y, summed, mean, rstd = module.add_forward(x, residual, weight, bias, EPS, p, seed)
    return [y, summed, mean, rstd, *module.add_backward(dy, dsummed, summed, weight, mean, rstd, p, seed)]


def check(shape, dtype, p=None, module=triton_impl, tensors=None):
    tensors = tensors or inputs(shape, dtype)
    results = run(module, tensors, p), run(torch_impl, tensors, p), run(reference, [t.double() for t in tensors], p)
    for i, (got, plain, exact) in enumerate(zip(*results, strict=True)):
        assert got.dtype == plain.dtype
        assert_as_good_as(got, plain, exact, floor=FLOORS[dtype], what=f"result {i}")


@pytest.mark.parametrize("p", [None, 0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, p):
    check(shape, torch.float32, p)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("p", [None, 0.3])
def test_halves(dtype, p):
    check((9, 33), dtype, p)


def test_the_launches_of_the_table(monkeypatch):
    """As on a GPU, wide rows too: one block of rows and a part of one."""
    monkeypatch.undo()
    for width in (768, 1025):
        check((5, width), torch.float32, 0.1)


def test_strides_parameters_of_another_dtype_and_a_large_mean():
    x, residual, weight, bias, dy, dsummed = inputs((4, 6, 20), torch.float32)
    sliced = [t.transpose(0, 1)[:, ::2, 4:] for t in (x, residual, dsummed)]
    every_second = torch.cat([dy, dy], -1)[..., :40:2].transpose(0, 1)[:, ::2, 4:]
    assert not every_second.is_contiguous() and every_second.stride(-1) == 2
    arguments = [sliced[0], sliced[1], weight[4:], torch.stack([bias, bias], 1)[4:, 0], every_second, sliced[2]]
    for p in (None, 0.3):
        wanted = run(triton_impl, [t.contiguous() for t in arguments], p)
        assert all(map(torch.equal, run(triton_impl, arguments, p), wanted))
    half = [t.bfloat16() for t in (x, residual, dy, dsummed)]
    mixed = run(triton_impl, [half[0], half[1], weight, bias, half[2], half[3]], 0.3)
    assert [t.dtype for t in mixed[-2:]] == [torch.float32] * 2 and mixed[0].dtype == torch.bfloat16
    check(None, torch.float32, tensors=[x + 64, residual, weight, bias, dy, dsummed])


def test_dropout_has_the_bits_of_the_mask():
    """Also those of a negative seed, of a row that is no multiple of four, and of a p near a step's half."""
    x, residual = torch.ones(7, 13, device=DEVICE), torch.zeros(7, 13, device=DEVICE)
    one, zero = torch.ones(13, device=DEVICE), torch.zeros(13, device=DEVICE)
    for seed in (3, -5, 2**62 + 1):
        for p in (0.1, 0.5, 0.999):
            mask = keep_mask(as_seed(seed, p), x.shape, p, x.device)
            y, summed, mean, rstd = triton_impl.add_forward(x, residual, one, zero, EPS, p, as_seed(seed, p))
            assert torch.equal(summed != 0, mask)
            dx, *_ = triton_impl.add_backward(x * 0, x, summed, one, mean, rstd, p, as_seed(seed, p))
            assert torch.equal(dx != 0, mask)


@pytest.mark.parametrize("width", [1, 65, 100])
def test_codes_are_those_of_the_definition(width):
    """Bit for bit, the ends of the range and halves between two codes included."""
    x, residual, weight, bias, *_ = inputs((23, width), torch.float32)
    codes, scale = triton_impl.quantised(x, weight, bias, EPS)
    wanted = quantise_rows(triton_impl.forward(x, weight, bias, EPS)[0])
    assert torch.equal(codes, wanted.codes) and torch.equal(scale, wanted.scale)
    for keep_y in (True, False):
        codes, scale, y, summed = triton_impl.add_quantised(x, residual, weight, bias, EPS, keep_y)
        exact, total, *_ = triton_impl.add_forward(x, residual, weight, bias, EPS, 0.0, None)
        wanted = quantise_rows(exact)
        assert torch.equal(codes, wanted.codes) and torch.equal(scale, wanted.scale) and torch.equal(summed, total)
        assert torch.equal(y, exact) if keep_y else y.numel() == 0
    levels = torch.tensor([[254.0, 1, 3, -5, -254, 2.5]], device=DEVICE)  # halves where the scale is 2
    got = triton_impl.quantised(torch.zeros_like(levels), torch.ones_like(levels[0]), levels[0], EPS)
    assert torch.equal(got[0], quantise_rows(levels).codes) and got[1] == 2


def test_codes_of_zeros_nan_and_infinity():
    x, w, b = torch.randn(4, 67, device=DEVICE), torch.ones(67, device=DEVICE), torch.zeros(67, device=DEVICE)
    x[0], x[2, 66], x[3, 0] = 3.0, float("nan"), float("-inf")
    codes, scale = triton_impl.quantised(x, w, b, EPS)
    assert (codes[[0, 2, 3]] == 128).all() and (codes[1] != 128).any()
    assert scale[0] == 1 and scale[[2, 3]].isnan().all()


def test_a_row_does_not_see_the_others_and_runs_repeat():
    tensors = inputs((11, 40), torch.float32)
    whole, again = run(triton_impl, tensors, 0.0), run(triton_impl, tensors, 0.0)
    assert all(map(torch.equal, whole, again))
    x, residual, weight, bias, dy, dsummed = tensors
    alone = run(triton_impl, [x[6:7], residual[6:7], weight, bias, dy[6:7], dsummed[6:7]], 0.0)
    assert all(torch.equal(a, w[6:7]) for a, w in zip(alone[:6], whole[:6], strict=True))


@pytest.mark.parametrize("bug", ["width", "dropout", "tail", "parts"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    if bug == "dropout":  # backward drops other elements than forward did

        class Wrong:
            add_forward = triton_impl.add_forward

            @staticmethod
            def add_backward(*args):
                return triton_impl.add_backward(*args[:-1], args[-1] + 1)

        with pytest.raises(AssertionError, match="error"):
            check((9, 33), torch.float32, 0.3, Wrong)
        return
    name = {"width": "_forward", "tail": "_backward", "parts": "sum_parts"}[bug]
    kernel = getattr(triton_impl, name)

    class Patched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                arguments = list(args)
                at = {"width": 12, "tail": 10, "parts": 3}[bug]  # C, R, P
                arguments[at] -= 1
                return kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(triton_impl, name, Patched())
    with pytest.raises(AssertionError, match="error"):
        check((9, 33), torch.float32)


def test_limits():
    x, residual, weight, bias, dy, _ = inputs((2, 5), torch.float32)
    forward, backward = (next(i for i in t.impls if i.name == "triton").limits for t in (op.FORWARD, op.BACKWARD))
    assert forward(x, weight, bias, EPS) is None and backward(dy, x, weight, x, x) is None
    assert "parameters" in forward(x, weight.double(), bias, EPS)
    assert "4096 columns" in forward(x.new_empty(1, 4097), x.new_empty(4097), x.new_empty(4097), EPS)
    assert "gradients" in backward(dy.bfloat16(), x, weight, x, x)
    for table in (op.ADD_FORWARD, ADD_QUANTISED):
        limits = next(i for i in table.impls if i.name == "triton").limits
        assert "residual" in limits(x, residual.bfloat16(), weight, bias, EPS, 0.0, None)
    assert "triton" in QUANTISED.names and "triton" in op.ADD_BACKWARD.names
