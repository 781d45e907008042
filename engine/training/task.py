"""What a training loop asks of what is trained: a part's loss, what follows an update, what the log says.

Knows the answering model's task; does not know the loop, engines' insides or files. Pretraining's is in
`pretrain_task.py`.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from miss.engine.data.augment import hash64
from miss.engine.training.flops import training_flops
from miss.engine.training.plain import Engine
from miss.engine.training.ranks import Ranks

DROPOUT = 21  # what a hash is for


class Work(Protocol):
    """A step as a process has it: `index` from 0, this process's parts, and what the step has on all processes."""

    @property
    def index(self) -> int: ...
    @property
    def parts(self) -> Sequence[Any]: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_images(self) -> int: ...


class Loader(Protocol):
    """Steps by number; the same whatever came before."""

    def steps(self, first: int) -> Generator[Any, None, None]:
        """Steps first, first + 1, … without end."""

    def epoch_of_step(self, index: int) -> float:
        """How many epochs are done when step `index` begins."""


@dataclass
class Outcome:
    """What a part of a step gave.

    loss:   this process's, such that the mean over processes of the sum over parts is the step's loss.
    sums:   float64, one for each of the task's `names`, to be added up over parts and processes.
    output: what the task itself wants to see again after the update.
    """

    loss: Tensor
    sums: Tensor
    output: Any


class Task(Protocol):
    """What is trained. All processes call everything in the same order."""

    names: tuple[str, ...]
    unit: str  # what a row is, for people
    loss_is: str  # what the loss is, for people

    def run(self, engine: Engine, work: Any, number: int) -> Outcome:
        """The forward pass of a part, under the loop's autocast."""

    def updated(self, engine: Engine, outcomes: list[Outcome]) -> None:
        """What follows an update."""

    def rows(self, work: Any, number: int) -> list[str]:
        """The names of a part's rows."""

    def not_finite(self, work: Any, outcomes: list[Outcome]) -> list[str]:
        """This process's rows whose own numbers, as far as they can be told from others', are not finite."""

    def figures(self, sums: dict[str, float], loss: float, steps: int, rows: int) -> dict[str, Any]:
        """What the log says of `steps` steps: their added sums, mean loss and rows."""

    def flops(self, work: Any) -> float:
        """Of this process's parts."""

    def tensors(self) -> dict[str, Tensor]:
        """State beside weights and optimiser that a checkpoint keeps; the same on every process."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""


class Answering:
    """A model called as `model(batch, label_smoothing, seed)` that gives `loss_per_row` and `num_tokens`."""

    names: tuple[str, ...] = ("tokens",)
    unit = "samples"
    loss_is = "loss (sum over answer tokens, mean over questions)"

    def __init__(self, model: nn.Module, config: Any, device: torch.device, ranks: Ranks) -> None:
        self.model, self.config, self.device, self.ranks = model, config, device, ranks

    def run(self, engine: Engine, work: Any, number: int) -> Outcome:
        config, part = self.config, work.parts[number]
        batch = part.batch.to(self.device, non_blocking=True)
        seed = hash64(config.seed, DROPOUT, work.index, work.first_part + number) >> 1
        if batch.image_tokens is not None and not config.bf16:
            batch.image_tokens = batch.image_tokens.to(next(self.model.parameters()).dtype)
        output = engine(batch, config.label_smoothing, seed)
        loss = output.loss_per_row.sum() / work.num_rows * self.ranks.world_size
        return Outcome(loss, output.num_tokens.sum().double()[None], output.loss_per_row.detach())

    def updated(self, engine: Engine, outcomes: list[Outcome]) -> None: ...

    def rows(self, work: Any, number: int) -> list[str]:
        qids: list[str] = work.parts[number].qids
        return qids

    def not_finite(self, work: Any, outcomes: list[Outcome]) -> list[str]:
        qids = [qid for part in work.parts for qid in part.qids]
        bad = (~torch.cat([outcome.output for outcome in outcomes]).isfinite()).tolist()
        return [qid for qid, is_bad in zip(qids, bad, strict=True) if is_bad]

    def figures(self, sums: dict[str, float], loss: float, steps: int, rows: int) -> dict[str, Any]:
        return {"loss_per_token": loss * rows / max(sums["tokens"], 1)}

    def flops(self, work: Any) -> float:
        model_config = getattr(self.model, "config", None)
        if model_config is None:
            return 0.0
        words = self.model.get_parameter("encoder.embeddings.word.weight").requires_grad
        vision = self.config.train_vision
        return sum(training_flops(model_config, part.batch, vision, words) for part in work.parts)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None: ...
