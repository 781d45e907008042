"""Tensors held against the shapes that a configuration asks for: what fits, what is missing, what had to be resized.

Knows names, shapes and initial values; does not know files, models or other projects' names.
"""

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miss.models.vision import interpolate_positions

POSITIONS = "vision.position_embedding"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as it is; the message names the file or the tensor."""


@dataclass(frozen=True)
class Resized:
    """A tensor that was interpolated to another shape."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors.

    matched:    taken as they are
    missing:    expected, not there; freshly initialised because that was allowed
    unexpected: there, not expected; left out because that was allowed
    resized:    interpolated to another shape
    dropped:    left out by rule (a conversion's momentum twins, queues and copies)
    digest:     SHA-256 of the tensors, "" where the file carries none
    notes:      what the user should know about the form in which the tensors run
    """

    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[Resized, ...] = ()
    dropped: tuple[str, ...] = ()
    digest: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{len(self.matched)} tensors matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.resized)} resized, {len(self.dropped)} dropped"
        ]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("dropped", self.dropped)):
            if names:
                lines.append(f"  {title}: {shown(names)}")
        lines += [f"  resized: {r.name} {list(r.before)} -> {list(r.after)}" for r in self.resized]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def fit(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    allow_resize: bool = False,
    where: str = "the checkpoint",
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors that a model of these shapes takes.

    Raises:
        CheckpointError: what is missing, unexpected or of a wrong shape and not allowed to be, all of it at once.
    """
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    chosen: dict[str, Tensor] = {}
    resized, wrong = [], []
    for name, shape in expected.items():
        value = tensors.get(name)
        if value is None:
            continue
        before = tuple(value.shape)
        if before != shape and allow_resize and name == POSITIONS and _is_grid(before, shape):
            value = resize_positions(value, shape[1])
            resized.append(Resized(name, before, shape))
        if tuple(value.shape) != shape or not value.is_floating_point():
            wrong.append(f"{name} is {list(before)} {_kind(value)}, wanted {list(shape)} floats")
        chosen[name] = value
    problems = [
        _listed("wrong shape", wrong),
        _listed("missing", [n for n in missing if not allowed(n, allow_missing)]),
        _listed("unexpected", [n for n in unexpected if not allowed(n, allow_unexpected)]),
    ]
    if any(problems):
        raise CheckpointError(f"{where}: does not fit its configuration: {'; '.join(filter(None, problems))}")
    matched = [name for name in chosen if not any(r.name == name for r in resized)]
    for name in missing:
        chosen[name] = fresh_tensor(name, expected[name])
    return chosen, LoadReport(tuple(matched), tuple(missing), tuple(unexpected), tuple(resized))


def resize_positions(table: Tensor, num_positions: int) -> Tensor:
    """A position table (1, 1 + n*n, C) on another square grid, bicubic: (1, num_positions, C)."""
    side = _side(num_positions)
    return interpolate_positions(table, (side, side))


def fresh_tensor(name: str, shape: tuple[int, ...], seed: int = 0, std: float = 0.02) -> Tensor:
    """An initial value for a tensor, the same on every machine: norms 1, biases 0, the rest normal (std 0.02)."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if ".norm" in name and len(shape) == 1:
        return torch.ones(shape)
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(own))


def _is_grid(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return (
        len(before) == 3 and (before[0], before[2]) == (after[0], after[2]) and _side(before[1]) ** 2 + 1 == before[1]
    )


def _side(num_positions: int) -> int:
    return round((num_positions - 1) ** 0.5)


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def allowed(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _listed(title: str, names: Sequence[str]) -> str:
    return f"{title}: {shown(names)}" if names else ""


def shown(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
