"""From pixels to patch tokens."""

from miss.kernels.patch_embed.op import patch_embed

__all__ = ["patch_embed"]
