"""What a pretraining run will need: bytes of memory on a rank, bytes between ranks in a step, by engine and stage.

Knows the model's sizes and what each stage shards; does not know data. Sums are of what stands there between and during
steps; what an allocator keeps beyond it is not in them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miss.models.pretrain import MissPretrain

STAGES = ("plain", "zero 0", "zero 1", "zero 2", "zero 3")


@dataclass(frozen=True)
class Sizes:
    """Numbers (not bytes) of a model: all parameters, those that are trained, the largest one, what the twin follows;
    and bytes of the queue."""

    total: int
    trained: int
    largest: int
    twin: int
    queue_bytes: int
    feature_width: int

    @classmethod
    def of(cls, model: MissPretrain) -> "Sizes":
        parameters = list(model.parameters())
        queue = sum(t.numel() * t.element_size() for t in model.memory.queue.tensors().values())
        return cls(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            max(p.numel() for p in parameters),
            sum(p.numel() for p in model.memory.twin.parameters()),
            queue,
            model.objective.feature_width,
        )


def rank_memory(sizes: Sizes, stage: str, ranks: int, bf16: bool, activations: int) -> dict[str, int]:
    """Bytes on one rank, by what they are for.

    Halves (`bf16` at stages 1 to 3) have float32 masters and add up gradients in float32. `copy`: the whole model that
    validation and export need where the engine keeps none.
    """
    number = STAGES.index(stage) - 1
    halves = bf16 and number >= 1
    width, share = 2 if halves else 4, ranks if number >= 1 else 1
    weights = width * sizes.total
    if number == 3:
        weights = width * (-(-sizes.total // ranks) + 2 * sizes.largest)  # its shard, and what a layer gathers
    gradients = 4 * sizes.trained // (ranks if number >= 2 else 1)
    if halves and number == 1:
        gradients += 2 * sizes.trained
    return {
        "weights": weights,
        "gradients": gradients,
        "masters": 4 * sizes.trained // share if number >= 1 else 0,
        "moments": 8 * sizes.trained // share,
        "twin": 4 * sizes.twin,
        "queue": sizes.queue_bytes,
        "copy": 4 * sizes.total if number == 3 or halves else 0,
        "activations": activations,
    }


def step_bytes(sizes: Sizes, stage: str, ranks: int, bf16: bool, pairs: int, parts: int) -> dict[str, int]:
    """Bytes that one rank sends in a step, as rings do it: (n - 1) / n of a tensor for a gather or a scatter, twice
    that for a sum. `pairs`: of the whole step; `parts`: of a rank's share."""
    number = STAGES.index(stage) - 1
    halves = bf16 and number >= 1
    width, ring = 2 if halves else 4, (ranks - 1) / ranks
    times = parts if number >= 2 else 1  # sharded gradients are sent after each part
    sums = 2 if number <= 0 else 1
    gathers = {-1: 0, 0: 0, 1: 1, 2: 1, 3: 2 * parts}[number]  # stage 3: forward and backward of every part
    followed = 4 * sizes.twin if number == 3 or halves else 0
    return {
        "gradients": round(ring * sums * times * width * sizes.trained),
        "weights": round(ring * gathers * width * sizes.total),
        "twin": round(ring * followed),
        "features": round(ring * pairs * (8 + 2 * 4 * sizes.feature_width)),
    }


def saved_bytes(run: Callable[[], Any], model: MissPretrain) -> int:
    """Bytes of distinct memory that a forward pass keeps for its backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in model.memory.tensors().values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = run()
    del held
    return sum(kept.values())


def resident_bytes() -> int:
    """What this process has in memory now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
