"""What a pretraining run's needs follow from: sizes of its model, facts of its setting; and bytes that ranks send.

Knows a model's parameters and a run's configuration; does not know what an engine holds when (`pretrain_memory.py`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from miss.engine.data.pairs import Pair
from miss.engine.training.pretrain_config import PretrainConfig
from miss.engine.training.pretrain_pass import LARGE
from miss.engine.training.pretrain_task import augments
from miss.engine.training.zero_config import default_bucket
from miss.models.pretrain import MissPretrain, PretrainBatch

STAGES = ("plain", "zero 0", "zero 1", "zero 2", "zero 3")


@dataclass(frozen=True)
class Sizes:
    """Numbers (not bytes) of a model: all parameters, those that are trained, the largest one, those that are large
    blocks in float32, the largest group of the optimiser's, what the twin follows and what of that is not trained; and
    bytes of the queue."""

    total: int
    trained: int
    largest: int
    large: int
    group: int
    twin: int
    twin_frozen: int
    queue_bytes: int
    feature_width: int

    @classmethod
    def of(cls, model: MissPretrain, groups: Collection[Collection[str]]) -> "Sizes":
        """groups: the names in each of the optimiser's groups."""
        parameters = dict(model.named_parameters())
        twin = dict(model.memory.twin.named_parameters())
        queue = sum(t.numel() * t.element_size() for t in model.memory.queue.tensors().values())
        return cls(
            sum(p.numel() for p in parameters.values()),
            sum(p.numel() for p in parameters.values() if p.requires_grad),
            max(p.numel() for p in parameters.values()),
            sum(p.numel() for p in parameters.values() if p.requires_grad and 4 * p.numel() > LARGE),
            max(sum(parameters[name].numel() for name in group) for group in groups),
            sum(p.numel() for p in twin.values()),
            sum(p.numel() for name, p in twin.items() if not parameters[name].requires_grad),
            queue,
            model.objective.feature_width,
        )


@dataclass(frozen=True)
class Setting:
    """What of a run, beside the model, its memory follows from.

    bucket: numbers in DeepSpeed's buckets. eight_bits: moments are bitsandbytes'. average: whether there is a moving
    average. pairs: bytes of decoded pairs on a rank (those made ready ahead, those of validation). remembered: bytes of
    a frozen encoder's tokens. library: what DeepSpeed's import takes.
    """

    ranks: int
    bf16: bool = False
    bucket: int = 1 << 22
    eight_bits: bool = False
    average: bool = False
    pairs: int = 0
    remembered: int = 0
    library: int = 0


def setting_of(
    config: PretrainConfig,
    model: MissPretrain,
    train: Sequence[Pair],
    num_validation: int,
    part: PretrainBatch,
    ranks: int,
    library: int,
) -> Setting:
    """part: the largest of a step on a rank. A frozen encoder's tokens of unchanged images are remembered on each rank
    (`remembered.py`): of as many images as there are, or as the run's steps have on a rank."""
    data, validation = config.data, config.validation
    pair = part.pixels[:1].numel()
    ahead = len(part.ids) * data.accumulation * (data.ahead + 2)  # made ready, in work, and being made
    parts = -(-num_validation // validation.batch_pairs) if num_validation else 0
    own = min(num_validation, -(-parts // ranks) * validation.batch_pairs)
    remembered = 0
    if not (config.train_vision or augments(config)):
        with torch.no_grad(), torch.autocast(part.pixels.device.type, torch.bfloat16, enabled=config.bf16):
            tokens = model.memory.twin.vision(part.pixels[:1])
        visits = config.schedule.total_steps * len(part.ids) * data.accumulation
        remembered = tokens.numel() * tokens.element_size() * min(visits, len({one.key for one in train}))
    return Setting(
        ranks,
        config.bf16,
        default_bucket(model.config.encoder.hidden_size),
        config.optimizer.name == "adamw8bit",
        config.ema.decay > 0,
        pair * (ahead + own),
        remembered,
        library,
    )


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
