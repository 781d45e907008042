"""What a Triton kernel is launched with, and what is compiled of it ahead of time. Does not know triton."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Launch:
    """One launch configuration."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Case:
    """One offline compilation."""

    op: str
    name: str
    kernel: Any  # a triton.jit function
    signature: Mapping[str, str]  # runtime argument -> "*bf16", "i32", "fp32", …, in order
    constants: Mapping[str, Any]  # constexpr arguments, blocks included
    launch: Launch
    default: bool = False  # a default configuration may not spill
    divisible: tuple[str, ...] = ()  # arguments known to be divisible by 16
    archs: tuple[str, ...] = ("sm_80", "sm_90")


def file_name(gpu: str) -> str:
    """Of what was tuned on a GPU, by the name that PyTorch gives it."""
    return f"{gpu.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def _tuned(name: str) -> dict[str, dict[str, Launch]]:
    """Operation -> shape class -> launch from a GPU's file in tuned/; empty where there is none."""
    path = TUNED / file_name(name)
    if not path.is_file():
        return {}
    table = json.loads(path.read_text())
    return {op: {shape: Launch(**launch) for shape, launch in rows.items()} for op, rows in table.items()}


@functools.cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


Pick = Callable[[str, str, Launch], Launch | None]  # of an operation, a shape class and its default
_trials: list[Pick] = []


@contextlib.contextmanager
def trial(pick: Pick) -> Iterator[None]:
    """Asks `pick` before all else inside this block: how launches are tried out, one after another."""
    _trials.append(pick)
    try:
        yield
    finally:
        _trials.remove(pick)


def choose(op: str, shape_class: str, defaults: Mapping[str, Launch], device: torch.device) -> Launch:
    """The launch for a shape class: what was tuned on this GPU, else the default. What was tuned for a kernel of other
    blocks is not taken."""
    for pick in _trials:
        tried = pick(op, shape_class, defaults[shape_class])
        if tried is not None:
            return tried
    if torch.device(device).type == "cuda":
        tuned = _tuned(_device_name(torch.device(device).index)).get(op, {}).get(shape_class)
        if tuned is not None and tuned.blocks.keys() == defaults[shape_class].blocks.keys():
            return tuned
    return defaults[shape_class]
