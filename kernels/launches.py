"""What a Triton kernel is launched with, and what is compiled of it ahead of time. Does not know triton."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch
    default: bool = False
    divisible: tuple[str, ...] = ()
    archs: tuple[str, ...] = ("sm_80", "sm_90")


def choose(op: str, shape_class: str, defaults: Mapping[str, Launch], device: Any) -> Launch:
    """The configuration for a shape class: the default."""
    return defaults[shape_class]
