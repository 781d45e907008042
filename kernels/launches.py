"""What a Triton kernel is launched with, and what is compiled of it ahead of time. Does not know triton."""

import functools
import json
from collections.abc import Mapping
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


@functools.cache
def _tuned(name: str) -> dict[str, dict[str, Launch]]:
    """Operation -> shape class -> launch from tuned/<device name, spaces as _>.json; empty where there is no file."""
    path = TUNED / f"{name.replace(' ', '_')}.json"
    if not path.is_file():
        return {}
    table = json.loads(path.read_text())
    return {op: {shape: Launch(**launch) for shape, launch in rows.items()} for op, rows in table.items()}


@functools.cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def choose(op: str, shape_class: str, defaults: Mapping[str, Launch], device: torch.device) -> Launch:
    """The launch for a shape class: what was tuned on this GPU, else the default."""
    if torch.device(device).type == "cuda":
        tuned = _tuned(_device_name(torch.device(device).index)).get(op, {}).get(shape_class)
        if tuned is not None:
            return tuned
    return defaults[shape_class]
