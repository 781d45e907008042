"""The features that past batches left behind, for the contrast of the next: a ring of fixed size.

Knows features, caption numbers and where the next one goes; does not know ranks (what is put in has been gathered, in
one order everywhere, so that every process holds the same queue) or how features are made.

Shapes: Q places, N new rows, P width of a feature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NO_CAPTION = -1  # the number of a place that no caption has taken yet; captions are numbered from 0


class Features(NamedTuple):
    """Momentum features of pairs: image and text (N, P), of length 1; ids int64 (N,), equal for equal captions."""

    image: Tensor
    text: Tensor
    ids: Tensor


@dataclass
class Queue:
    """`pointer`: int64 0-dim on the features' device, the place that the next row takes."""

    features: Features
    pointer: Tensor

    @classmethod
    def fresh(cls, size: int, width: int, seed: int = 0) -> "Queue":
        """A queue of random directions, as the original starts: the same on every process for a seed."""
        generator = torch.Generator().manual_seed(seed)
        image, text = (F.normalize(torch.randn(size, width, generator=generator), dim=1) for _ in range(2))
        ids = torch.full((size,), NO_CAPTION, dtype=torch.int64, device="cpu")
        return cls(Features(image, text, ids), torch.zeros((), dtype=torch.int64, device="cpu"))

    def __len__(self) -> int:
        return len(self.features.ids)

    @torch.no_grad()
    def put(self, new: Features) -> None:
        """Takes N rows in, any number of them, over the oldest; of more than Q rows the last Q stay.

        Nothing is read by the host: the pointer lives on the device.
        """
        size, count = len(self), len(new.ids)
        if not size or not count:
            return
        skipped = max(0, count - size)
        places = (self.pointer + torch.arange(skipped, count, device=self.pointer.device)) % size
        for kept, rows in zip(self.features, new, strict=True):
            kept.index_copy_(0, places, rows[skipped:].detach().to(kept))
        self.pointer.copy_((self.pointer + count) % size)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {**self.features._asdict(), "pointer": self.pointer}

    @torch.no_grad()
    def restart(self) -> None:
        """Random directions again, as `fresh` made them."""
        for tensor, start in zip(
            self.tensors().values(), Queue.fresh(*self.features.image.shape).tensors().values(), strict=True
        ):
            tensor.copy_(start)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Queue":
        """The queue with every tensor moved."""
        return Queue(Features(*(move(t) for t in self.features)), move(self.pointer))
