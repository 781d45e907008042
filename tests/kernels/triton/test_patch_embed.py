"""Patch embedding in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round, races between programs, or alignment.
"""

import pytest
import torch

from miss.kernels.launches import Launch
from miss.kernels.patch_embed import op, reference, torch_impl, triton_impl
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

SCALE = torch.tensor([1 / 255 / 0.229, 1 / 255 / 0.224, 1 / 255 / 0.225], device=DEVICE)
SHIFT = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], device=DEVICE)
# batch, height, width, columns, patch
SHAPES = [
    (2, 28, 42, 17, 14),
    (1, 16, 16, 31, 16),
    (3, 8, 12, 5, 4),
    (1, 4, 4, 33, 4),
    (5, 1, 1, 1, 1),
    (0, 8, 8, 5, 4),
]
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # a place of the dtype


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    product = {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2}
    blocks = {
        "forward": product,
        "weight": {"BC": 16, "BK": 32, "BM": 16, "SPLITS": 3},
        "pixels": product,
        "sum": {"BP": 2, "BC": 64},
    }
    for kind in triton_impl.LAUNCHES:
        monkeypatch.setitem(triton_impl.LAUNCHES, kind, (Launch(blocks[kind.partition("-")[0]], 1, 1),))


def inputs(batch, height, width, columns, size, dtype, source=torch.float32):
    """weight, bias, pixels, dy."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, 3, size, size, generator=generator) * 0.05
    bias = torch.randn(columns, generator=generator) * 0.1
    dy = torch.randn(batch, height // size * (width // size), columns, generator=generator)
    pixels = torch.randint(0, 256, (batch, height, width, 3), generator=generator).to(DEVICE, source)
    return [weight.to(DEVICE, dtype), bias.to(DEVICE, dtype), pixels, dy.to(DEVICE, dtype)]


def run(module, tensors):
    weight, bias, pixels, dy = tensors
    y = module.forward(weight, bias, pixels, SCALE, SHIFT)
    return [y, *module.backward(dy, weight, pixels, SCALE, SHIFT, pixels.is_floating_point())]


def check(tensors, module=triton_impl):
    dtype = tensors[0].dtype
    exactly = [t.double() if t.is_floating_point() else t for t in tensors]
    results = run(module, tensors), run(torch_impl, tensors), run(reference, exactly)
    for name, got, plain, exact in zip(("y", "dweight", "dbias", "dpixels"), *results, strict=True):
        assert got.dtype == plain.dtype and got.is_contiguous()
        # Gradients of pixels lie between thousandths: a place is one of the largest's.
        floor = FLOORS[dtype] * (1.0 if name == "y" or not exact.numel() else exact.abs().max().clamp(max=1).item())
        assert_as_good_as(got, plain, exact, floor=floor, what=name)


@pytest.mark.parametrize("source", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, source):
    check(inputs(*shape, torch.float32, source))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_halves(dtype, source):
    check(inputs(2, 12, 8, 19, 4, dtype, source))


def test_the_launches_of_the_table(monkeypatch):
    """As on a GPU: tiles that go beyond all the patches and columns, and 14 x 14 = 196 patches."""
    monkeypatch.undo()
    check(inputs(1, 32, 48, 40, 16, torch.float32))
    for size in (16, 6):
        check(inputs(1, 14 * size, 14 * size, 130, size, torch.bfloat16, torch.uint8))


def test_the_normalisation_is_float_mathematics_on_the_values():
    """One-pixel patches under an identity weight give the normalised values themselves, to one rounding."""
    values = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    eye, zero = torch.eye(3, device=DEVICE)[:, :, None, None], torch.zeros(3, device=DEVICE)
    wanted = values.flatten(1, 2).float() * SCALE + SHIFT
    got = triton_impl.forward(eye, zero, values, SCALE, SHIFT)
    assert (got - wanted).abs().max() <= torch.finfo(torch.float32).eps * 2


def test_strides():
    """A crop of larger images is read where it lies; lines that are not dense are copied."""
    weight, bias, pixels, dy = inputs(2, 16, 24, 7, 4, torch.float32)
    crop, turned = pixels[:, 4:12, 4:20], pixels.permute(0, 2, 1, 3)
    dy = torch.cat([dy, dy], -1)[..., :7]
    odd = weight.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    for view in (crop, turned, pixels[:1].expand(2, -1, -1, -1)):
        rows = view.shape[1] // 4 * (view.shape[2] // 4)
        got = run(triton_impl, [odd, bias, view, dy[:, :rows]])
        wanted = run(triton_impl, [weight, bias, view.contiguous(), dy[:, :rows].contiguous()])
        assert all(map(torch.equal, got, wanted))


def test_an_image_does_not_see_its_batch_and_runs_repeat():
    tensors = inputs(3, 8, 12, 21, 4, torch.float32)
    whole = run(triton_impl, tensors)
    assert all(map(torch.equal, run(triton_impl, tensors), whole))
    alone = run(triton_impl, [*tensors[:2], *(t[1:2] for t in tensors[2:])])
    assert torch.equal(alone[0], whole[0][1:2]) and torch.equal(alone[3], whole[3][1:2])


@pytest.mark.parametrize("bug", ["tail", "channels", "line", "splits", "scale", "place"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    tensors = inputs(2, 12, 8, 19, 4, torch.float32)
    # the argument that is changed: K, shift for scale, line_stride, M, scale, line_stride
    name, at, wrong = {
        "tail": ("_forward", 8, lambda a: a[8] - 1),
        "channels": ("_forward", 3, lambda a: a[3].flip(0)),
        "line": ("_weight", 13, lambda a: a[13] - 3),
        "splits": ("_weight", 6, lambda a: a[6] - 1),
        "scale": ("_pixels", 2, lambda a: a[2] * 1.01),
        "place": ("_pixels", 11, lambda a: a[11] - 3),
    }[bug]
    kernel = getattr(triton_impl, name)

    class Patched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                return kernel[grid](*args[:at], wrong(args), *args[at + 1 :], **options)

            return launch

    monkeypatch.setattr(triton_impl, name, Patched())
    with pytest.raises(AssertionError, match="error"):
        check(tensors)


def test_limits():
    weight, bias, pixels, dy = inputs(1, 8, 8, 5, 4, torch.float32, torch.uint8)
    forward, backward = (next(i for i in t.impls if i.name == "triton").limits for t in (op.FORWARD, op.BACKWARD))
    assert forward(weight, bias, pixels, SCALE, SHIFT) is None
    assert backward(dy, weight, pixels, SCALE, SHIFT, False) is None
    assert "pixels" in forward(weight, bias, pixels.double(), SCALE, SHIFT)
    assert "bias" in forward(weight, bias.double(), pixels, SCALE, SHIFT)
    assert "no gradient" in backward(dy, weight, pixels, SCALE, SHIFT, True)
    assert "one dtype" in backward(dy.half(), weight, pixels, SCALE, SHIFT, False)
