"""What a frozen image encoder says of images, remembered: each is encoded once, however often a run comes back to it.

Knows pixels and an encoder; does not know pairs, losses or files. Nothing is kept on disk: a resumed run encodes again.

An image is known by its pixels, and encoded by itself: what is remembered depends on nothing that shared its batch, so
that a resumed run has the same tokens. Shapes: B images, S side in pixels, N tokens, C width.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


class RememberedTokens:
    """Called with pixels, gives tokens.

    Args:
        encode: uint8 (1, S, S, 3) -> (1, N, C); its weights stay as they are.
        dtype: in which tokens are kept; None: as they come.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        self._encode, self._dtype = encode, dtype
        self._known: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._known)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (B, S, S, 3), B at least 1 -> (B, N, C) on the pixels' device."""
        return torch.stack([self._tokens(image) for image in pixels]).to(pixels.device)

    def _tokens(self, image: Tensor) -> Tensor:
        key = hashlib.blake2b(image.cpu().contiguous().numpy().data, digest_size=16).digest()
        if key not in self._known:
            self._known[key] = self._encode(image[None])[0].to("cpu", self._dtype)
        return self._known[key]
