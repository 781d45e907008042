"""Whose numbers were not finite: the rows of each rank whose loss, or whose part's gradient, is not a number.

Knows ids, gradients before they are added up over ranks, and one file; does not know the loop or the engine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from miss.engine.training.state import write_json

FILE = "not-finite.json"
_SHOWN = 20  # ids a message names; the file names all


class NotFinite(ValueError):
    """The loss or a gradient is not a number, or infinite; nothing was updated with it."""


@dataclass(frozen=True)
class Suspects:
    """What one rank found: ids of rows with such a loss, of parts with such a gradient, of its whole share of the step,
    and the parameters whose gradient it was."""

    loss: list[str]
    gradient: list[str]
    share: list[str]
    parameters: list[str]


@contextmanager
def watched_gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, backward passes note here whose gradients of this process alone are not finite (by parameter)."""
    found: dict[str, Tensor] = {}

    def watch(name: str, gradient: Tensor) -> None:
        found[name] = found.get(name, torch.zeros((), dtype=torch.bool, device=gradient.device)) | (
            ~gradient.isfinite().all()
        )

    hooks = [
        p.register_hook(lambda gradient, name=name: watch(name, gradient))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def describe(everyone: Sequence[Suspects], step: int, what: str, output: Path) -> str:
    """The error's message, in the same words on all ranks."""
    named = [(rank, one.loss or one.gradient) for rank, one in enumerate(everyone)]
    named = [(rank, ids) for rank, ids in named if ids] or [(r, one.share) for r, one in enumerate(everyone)]
    rows = "; ".join(_rank(rank, len(everyone)) + _some(ids) for rank, ids in named)
    parameters = sorted({name for one in everyone for name in one.parameters})
    gradients = f" Gradients of: {_some(parameters)}." if parameters else ""
    return (
        f"step {step}: {what}; stopped before the update. Rows: {rows}.{gradients} All are in {output / FILE}. "
        f"Check these rows or lower the rates, and start anew with --init on the best weights so far"
    )


def write(everyone: Sequence[Suspects], step: int, what: str, output: Path) -> None:
    """`not-finite.json`: by rank, what `Suspects` holds."""
    ranks = [{"rank": rank, **asdict(one)} for rank, one in enumerate(everyone)]
    write_json(output / FILE, {"step": step, "what": what, "ranks": ranks})


def _rank(rank: int, count: int) -> str:
    return f"rank {rank}: " if count > 1 else ""


def _some(ids: Sequence[str]) -> str:
    rest = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(ids[:_SHOWN]) + rest
