"""The momentum twin: slow float32 copies of the towers whose features are contrasted, and what they left in the queue.

Knows which parameters have a twin and how it follows; does not know when an update was made, or who holds the weights
(a sharding engine hands its own values in). It is no part of the trained model's modules: an engine that casts, shards
or optimises those never sees it.

Shapes: B pairs, P width of a feature.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from miss.kernels.ema import ema_
from miss.models.joint import JointEncoder
from miss.models.linear import Linear
from miss.models.objectives import normalised
from miss.models.queue import Queue
from miss.models.vision import VisionTransformer

HALVES = (torch.bfloat16, torch.float16)


class MomentumTwin(nn.Module):
    """Copies of the image encoder, of the joint encoder as it reads text alone, and of both projections.

    Parameters have the names of those that they follow. Cross-attention has none here: a text alone never reads it
    (28.4 M of the original's 223.5 M copies at base).
    """

    def __init__(
        self, vision: VisionTransformer, encoder: JointEncoder, image_projection: Linear, text_projection: Linear
    ) -> None:
        super().__init__()
        self.vision, self.encoder = deepcopy(vision), _text_alone(encoder)
        self.image_projection, self.text_projection = deepcopy(image_projection), deepcopy(text_projection)
        self.float().requires_grad_(False)
        self.train(False)

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, ids: Tensor, lengths: Tensor, dtype: torch.dtype, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of images and of captions, (B, P) each, of length 1. `dtype`: that the products run in."""
        half = torch.autocast(pixels.device.type, dtype) if dtype in HALVES else nullcontext()
        with half:
            image = self.image_projection(self.vision.first(pixels))
            text = self.text_projection(self.encoder.first(ids, lengths, seed=seed))
        return normalised(image), normalised(text)

    def follow(self, values: Mapping[str, Tensor], momentum: float) -> None:
        """average = momentum * average + (1 - momentum) * value, of every parameter, in one call.

        `values`: the trained parameters by name, whole and as precise as there are; more than are followed may be in
        it, and parts of the twin may follow one after the other where not all fit at once.

        Raises:
            ValueError: none of the parameters is followed.
        """
        pairs = [(average, values[name]) for name, average in self.named_parameters() if name in values]
        if not pairs:
            raise ValueError(f"the momentum twin follows none of {', '.join(list(values)[:3])}")
        ema_([average for average, _ in pairs], [value for _, value in pairs], momentum)

    def become(self, values: Mapping[str, Tensor]) -> None:
        """The trained parameters' present values: how a run starts."""
        with torch.no_grad():
            for name, average in self.named_parameters():
                average.copy_(values[name])


def _text_alone(encoder: JointEncoder) -> JointEncoder:
    """A copy without cross-attention."""
    copy: JointEncoder = deepcopy(encoder)
    del copy.cross_kv
    for layer in copy.layers:
        del layer.cross_attention
    return copy


@dataclass
class Memory:
    """What a step leaves for the next beside weights: the momentum twin and the queue."""

    twin: MomentumTwin
    queue: Queue

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: `twin.…` and `queue.…`."""
        twin = {f"twin.{name}": p.detach() for name, p in self.twin.named_parameters()}
        return twin | {f"queue.{name}": t for name, t in self.queue.tensors().items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, exactly.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        own = self.tensors()
        got, wanted = ({name: tuple(t.shape) for name, t in these.items()} for these in (tensors, own))
        if got != wanted:
            wrong = sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))
            raise ValueError(f"momentum twin and queue: {', '.join(wrong[:5])} do not fit this model")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves along with the model, but never becomes a half."""

        def wide(tensor: Tensor) -> Tensor:
            like = fn(tensor.new_empty(0))
            dtype = torch.promote_types(like.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
            return tensor.to(like.device, dtype)

        self.twin._apply(wide)
        self.queue = self.queue.moved(wide)
