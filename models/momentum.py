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
from miss.models.fitting import CheckpointError, shown
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
        self,
        pixels: Tensor,
        ids: Tensor,
        lengths: Tensor,
        dtype: torch.dtype,
        seed: int | None = None,
        cls: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features of images and of captions, (B, P) each, of length 1. `dtype`: that the products run in. `cls`: the
        images' [CLS], where it is known what the twin's encoder would say."""
        half = torch.autocast(pixels.device.type, dtype) if dtype in HALVES else nullcontext()
        with half:
            image = self.image_projection(self.vision.first(pixels) if cls is None else cls)
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
    def load(self, tensors: Mapping[str, Tensor], where: str = "momentum twin and queue") -> None:
        """The inverse of `tensors`, exactly; all of it or nothing.

        Raises:
            CheckpointError: names, shapes or types are not those of this model.
        """
        own = self.tensors()
        check_memory(own, tensors, where)
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


def check_memory(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Holds the tensors of a twin and a queue against those of a model.

    Raises:
        CheckpointError: names, shapes or types are not those, or the queue's pointer is outside of it; all at once.
    """
    wrong = [
        f"{name} is {list(tensors[name].shape)} {tensors[name].dtype}, wanted {list(t.shape)} {t.dtype}"
        for name, t in own.items()
        if name in tensors
        and (
            tensors[name].shape != t.shape
            or tensors[name].is_floating_point() != t.is_floating_point()
            or not (t.is_floating_point() or tensors[name].dtype == t.dtype)
        )
    ]
    problems = {
        "wrong": wrong,
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
    }
    pointer, places = tensors.get("queue.pointer"), len(own["queue.ids"])
    if pointer is not None and not wrong and not 0 <= int(pointer) < max(1, places):
        problems["wrong"] = [f"queue.pointer is {int(pointer)}, wanted a place of {places}"]
    if any(problems.values()):
        listed = "; ".join(f"{title}: {shown(names)}" for title, names in problems.items() if names)
        raise CheckpointError(f"{where}: the momentum twin and the queue do not fit this model: {listed}")
