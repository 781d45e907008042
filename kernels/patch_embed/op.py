"""Patch embedding of raw pixels: normalise, cut into patches, project.

Knows its formula, its gradient and who computes it; does not know resizing, files or positions.

    y[b, n] = W @ (patch n of (pixels[b] * scale + shift)) + bias

pixels uint8 or float (B, height, width, 3), as decoded; scale, shift float32 (3,), per channel; weight (C, 3, P, P), as
of a convolution with stride P; bias (C,); y (B, N, C) in the weight's dtype, patches row by row. The normalisation is
computed on the values, in float32 (float64 in float64), not folded into the weight, so that it rounds as the usual
preprocessing does; products accumulate in float32. Under autocast weight and bias take the autocast dtype.

Gradient: dweight = dy.T @ rows, dbias = sum(dy), and for float pixels dpixels = (dy @ W) * scale, put back in place.
scale and shift are constants.

Source: arXiv 2010.11929.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.linear.op import of_dtype
from miss.kernels.patch_embed import reference, torch_impl
from miss.kernels.registry import ALL_FLOATS, FLOATS, Impl, Op, autocast_to, lazy, triton

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})


def _limits(weight: Tensor, bias: Tensor, pixels: Tensor, *_: object) -> str | None:
    if pixels.dtype not in (torch.uint8, torch.float32):
        return f"takes uint8 and float32 pixels, got {pixels.dtype}"
    return None if bias.dtype in CPU_DTYPES else "takes a float32 or bfloat16 bias"


def _triton_limits(weight: Tensor, bias: Tensor, pixels: Tensor, *_: object) -> str | None:
    if pixels.dtype not in FLOATS | {torch.uint8}:
        return f"takes uint8, float32, float16 and bfloat16 pixels, got {pixels.dtype}"
    if bias.dtype not in FLOATS:
        return f"takes a float32, float16 or bfloat16 bias, got {bias.dtype}"
    return None if len(weight) else "needs at least one column"


def _triton_backward_limits(dy: Tensor, weight: Tensor, pixels: Tensor, *rest: Any) -> str | None:
    if dy.dtype != weight.dtype:
        return f"dy is {dy.dtype}, the weight {weight.dtype}: takes one dtype"
    if rest[-1] and not pixels.is_floating_point():
        return f"{pixels.dtype} pixels have no gradient"
    return _triton_limits(weight, weight, pixels)


# The weight comes first: a table judges device and dtype by its first tensor, and pixels are bytes.
FORWARD = Op(
    "patch_embed",
    Impl(
        "cpu",
        lazy("patch_embed.cpu_impl", "forward"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_limits,
    ),
    triton("patch_embed.triton_impl", "forward", _triton_limits),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "patch_embed_backward",
    triton("patch_embed.triton_impl", "backward", _triton_backward_limits),
    Impl("torch", torch_impl.backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.backward, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::patch_embed", mutates_args=())
def _forward(
    weight: Tensor, bias: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, panels: Tensor | None = None
) -> Tensor:
    return FORWARD(weight, bias, pixels, scale, shift, panels)


@_forward.register_fake
def _(
    weight: Tensor, bias: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, panels: Tensor | None = None
) -> Tensor:
    size = weight.shape[-1]
    grid = (pixels.shape[1] // size) * (pixels.shape[2] // size)
    return weight.new_empty(pixels.shape[0], grid, weight.shape[0])


@torch.library.custom_op("miss::patch_embed_backward", mutates_args=())
def _backward(
    dy: Tensor, weight: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, need_pixels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(dy, weight, pixels, scale, shift, need_pixels)


@_backward.register_fake
def _(
    dy: Tensor, weight: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, need_pixels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dpixels = pixels.new_empty(pixels.shape if need_pixels else 0)
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), dpixels


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _, pixels, scale, shift, _ = inputs
    ctx.save_for_backward(weight, pixels, scale, shift)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_pixels = ctx.needs_input_grad[2]
    dweight, dbias, dpixels = _backward(dy.contiguous(), *ctx.saved_tensors, need_pixels)
    return dweight, dbias, dpixels if need_pixels else None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)


def patch_embed(
    pixels: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, panels: Tensor | None = None
) -> Tensor:
    """Patch tokens (B, N, C) of pixels (B, height, width, 3), uint8 or float, not normalised.

    `panels`: `miss.kernels.linear.prepare` of the weight as a matrix (C, 3 * P * P), which spares that at every call;
    ignored where they are of another dtype or no row here reads them.

    Raises:
        ValueError: pixels are not (B, height, width, 3), or height or width is not a multiple of the patch size.
    """
    size = weight.shape[-1]
    if pixels.dim() != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"patch_embed: pixels are {tuple(pixels.shape)}; wanted (batch, height, width, 3)")
    if pixels.shape[1] % size or pixels.shape[2] % size or 0 in pixels.shape[1:3]:
        raise ValueError(
            f"patch_embed: an image of {pixels.shape[1]} x {pixels.shape[2]} pixels does not divide into patches of "
            f"{size} x {size}: resize it to multiples of {size}"
        )
    weight, bias = autocast_to(weight, bias)
    return FORWARD.call(_forward, weight, bias, pixels, scale, shift, of_dtype(panels, weight))
