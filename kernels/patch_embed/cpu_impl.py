"""Pixels to patch tokens by csrc/cpu/patch_embed.inl.h.

Knows which function of the extension computes it; does not know how.
"""

from torch import Tensor

from miss.kernels import extension

_ops = extension.ops()


def forward(
    weight: Tensor, bias: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, panels: Tensor | None = None
) -> Tensor:
    panels = (
        _ops.pack_panels(weight.flatten(1)) if panels is None else panels
    )  # a fiftieth of the product at 577 tokens
    affine = scale.float().contiguous(), shift.float().contiguous()
    return _ops.patch_embed(pixels.contiguous(), panels, bias.contiguous(), *affine, weight.shape[-1])
