"""Patch embedding from bytes, by the error rule and against a convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.patch_embed import op, patch_embed
from miss.kernels.registry import use
from tests.helpers import assert_as_good_as, check_error_rule, route, threads, unaligned

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ROUTES = ["torch", "reference", "custom", "cpu"]
ROUTED = [(name, dtype) for name in ROUTES for dtype in DTYPES if name != "cpu" or dtype in op.CPU_DTYPES]
SCALE = torch.tensor([1 / 255 / 0.229, 1 / 255 / 0.224, 1 / 255 / 0.225])
SHIFT = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


def weights(width: int, size: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(width, 3, size, size) * 0.05, torch.randn(width) * 0.1]


def pixels(batch: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)


def convolution(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The usual way: normalise in float32 (float64 in float64), then a convolution with stride P."""
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    values = (pixels.to(acc) * SCALE.to(acc) + SHIFT.to(acc)).permute(0, 3, 1, 2).to(weight.dtype)
    return F.conv2d(values, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("name", "dtype"), ROUTED, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 28, 42, 17, 14), (1, 16, 16, 31, 16), (3, 8, 12, 5, 4), (0, 8, 8, 5, 4)], ids=str
)
def test_error_rule(shape, name, dtype):
    batch, height, wide, width, size = shape
    image = pixels(batch, height, wide)

    def plain(w, b):
        return convolution(image, w, b) if batch else (w.sum() + b.sum()) * w.new_zeros(0, 4, width)

    with route(name, op.FORWARD):
        floor = 1e-12 if dtype == torch.float64 else 1e-6
        check_error_rule(
            lambda w, b: patch_embed(image, w, b, SCALE, SHIFT), plain, weights(width, size), dtype, 2, floor
        )


@pytest.mark.parametrize("name", ROUTES)
def test_float_pixels_have_a_gradient(name):
    image = pixels(2, 8, 12).float()
    with route(name, op.FORWARD):
        check_error_rule(
            lambda p, w, b: patch_embed(p, w, b, SCALE, SHIFT), convolution, [image, *weights(5, 4)], torch.float32
        )


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), rows=st.integers(1, 4), columns=st.integers(1, 4), size=st.integers(1, 7))
def test_any_grid(batch, rows, columns, size):
    image, (w, b) = pixels(batch, rows * size, columns * size), weights(3, size)
    for name in ("torch", "reference", "cpu"):
        with route(name, op.FORWARD):
            got = patch_embed(image, w, b, SCALE, SHIFT)
        assert_as_good_as(got, convolution(image, w, b), convolution(image, w.double(), b.double()), slack=3)


@pytest.mark.parametrize("name", ROUTES)
def test_the_normalisation_is_float_mathematics_on_the_values(name):
    """One-pixel patches under an identity weight give the normalised values themselves, to one rounding."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    with route(name, op.FORWARD):
        got = patch_embed(values, torch.eye(3)[:, :, None, None], torch.zeros(3), SCALE, SHIFT)
    wanted = values.flatten(1, 2).float() * SCALE + SHIFT
    assert (got - wanted).abs().max() <= torch.finfo(torch.float32).eps * 2  # a fused multiply-add rounds once


def test_strided_pixels():
    image, (w, b) = pixels(2, 16, 24), weights(5, 4)
    view = image.permute(0, 2, 1, 3)
    for name in ROUTES:
        with route(name, op.FORWARD):
            torch.testing.assert_close(
                patch_embed(view, w, b, SCALE, SHIFT), patch_embed(view.contiguous(), w, b, SCALE, SHIFT)
            )


def test_autocast_and_half_weights_normalise_in_float32():
    image, (w, b) = pixels(1, 8, 8), weights(5, 4)
    halves = patch_embed(image, w.bfloat16(), b.bfloat16(), SCALE, SHIFT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(patch_embed(image, w, b, SCALE, SHIFT), halves)
    assert halves.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 15, 16, 3), (1, 16, 18, 3), (1, 0, 16, 3), (16, 16, 3), (1, 3, 16, 16)])
def test_bad_pixels(shape):
    with pytest.raises(ValueError, match="patch_embed: "):
        patch_embed(torch.zeros(shape, dtype=torch.uint8), *weights(5, 4), SCALE, SHIFT)


def test_opcheck():
    w, b = (t.requires_grad_() for t in weights(5, 4))
    image = pixels(2, 8, 12)
    torch.library.opcheck(op._forward, (w, b, image, SCALE, SHIFT))
    checks = ("test_schema", "test_faketensor")
    for name in ROUTES[:2]:
        with route(name, op.FORWARD):
            for dtype in DTYPES:
                w, b = (t.to(dtype) for t in weights(5, 4))
                torch.library.opcheck(op._forward, (w, b, image, SCALE, SHIFT), test_utils=checks)
                for p, need in ((image, False), (image.float(), True)):
                    args = (torch.randn(2, 6, 5, dtype=dtype), w, p, SCALE, SHIFT, need)
                    torch.library.opcheck(op._backward, args, test_utils=checks)


def test_compiles_without_a_break():
    w, b = (t.requires_grad_() for t in weights(5, 4))
    function = torch.compile(
        lambda p: patch_embed(p, w, b, SCALE, SHIFT).square().sum(), fullgraph=True, backend="aot_eager"
    )
    for image in (pixels(2, 8, 12), pixels(2, 8, 12).float().requires_grad_()):
        got, wanted = function(image), patch_embed(image, w, b, SCALE, SHIFT).square().sum()
        torch.testing.assert_close(got, wanted)
        leaves = (w, b, image) if image.requires_grad else (w, b)
        for g, e in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_row_does_not_see_its_batch_or_the_threads(dtype, kind):
    """More patches than a chunk of rows, in a width and a patch that end within vectors, and from an odd address."""
    image = pixels(5, 40, 44).to(getattr(torch, kind))
    w, b = (t.to(dtype) for t in weights(70, 4))
    with route("cpu", op.FORWARD):
        whole = patch_embed(image, w, b, SCALE, SHIFT)
        assert_as_good_as(
            whole, convolution(image.float(), w, b), convolution(image.double(), w.double(), b.double()), floor=2e-6
        )
        for count in (2, 3):
            with threads(count):
                assert torch.equal(patch_embed(image, w, b, SCALE, SHIFT), whole)
        alone = patch_embed(unaligned(image[3:4]), w, b, SCALE, SHIFT)
    assert torch.equal(alone, whole[3:4])


def test_cpu_row_refuses_other_pixels():
    image, (w, b) = pixels(1, 8, 8), weights(5, 4)
    with use(patch_embed="cpu"), pytest.raises(NotImplementedError, match="uint8 and float32 pixels|not built"):
        patch_embed(image.double(), w, b, SCALE, SHIFT)
    assert patch_embed(image.double(), w, b, SCALE, SHIFT).dtype == torch.float32
