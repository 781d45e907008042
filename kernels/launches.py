"""What a Triton kernel is launched with, and what is compiled of it ahead of time. Does not know triton."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class Place(NamedTuple):
    """What a launch is tuned for: an operation as its launcher says it, a kind of its own, and `shape`: the dtype, and
    of the sizes those that are a row's own, down to a power of two as evidence has them, so that a class of its shapes
    has one launch. What shares the batch has no say: it must not change a row's rounding."""

    op: str
    kind: str
    shape: str

    def __str__(self) -> str:
        return "/".join(self)


Table = Mapping[str, Launch]  # by a place's text


def table(path: Path) -> Table:
    """The launches of a file in tuned/, {operation: {kind: {shape: launch}}}; none where there is no file."""
    if not path.is_file():
        return {}
    return {
        str(Place(op, kind, shape)): Launch(**launch)
        for op, kinds in json.loads(path.read_text()).items()
        for kind, shapes in kinds.items()
        for shape, launch in shapes.items()
    }


@functools.cache
def tuned(gpu: str) -> Table:
    """What was tuned on a GPU, by the name that PyTorch gives it."""
    return table(TUNED / file_name(gpu))


@functools.cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


Pick = Callable[[Place, Launch], Launch | None]  # of a place and its default
Asked = dict[str, Any]  # place -> the launch that was tuned for it, None where none was
_trials: list[Pick] = []
_watchers: list[Asked] = []


@contextlib.contextmanager
def trial(pick: Pick) -> Iterator[None]:
    """Asks `pick` before all else inside this block, and before the picks of blocks around it: how launches are tried
    out, one after another."""
    _trials.append(pick)
    try:
        yield
    finally:
        _trials.remove(pick)


@contextlib.contextmanager
def watched(asked: Asked) -> Iterator[None]:
    """Writes down which places are asked for inside this block, and what was tuned for each: what is measured there was
    measured with that, and says nothing of other launches."""
    _watchers.append(asked)
    try:
        yield
    finally:
        _watchers[:] = [one for one in _watchers if one is not asked]


def same(asked: Mapping[str, Any], now: Table) -> bool:
    """Whether each place that was asked for has the launch that it had then."""
    return all((None if key not in now else asdict(now[key])) == then for key, then in asked.items())


def _class(one: int | torch.dtype) -> str:
    return str(one).removeprefix("torch.") if isinstance(one, torch.dtype) else str(1 << one.bit_length() >> 1)


def choose(op: str, kind: str, defaults: Mapping[str, Launch], like: Tensor, *own: int | torch.dtype) -> Launch:
    """The launch for a kind of call: what was tuned on this GPU for this dtype and these sizes, else the default. What
    was tuned for a kernel of other blocks is not taken.

    like: a tensor of the call's dtype, on its device. own: sizes (and a weight's dtype) as `Place` says.
    """
    default = defaults[kind]
    known = tuned(_device_name(like.device.index)) if like.device.type == "cuda" else {}
    if not (known or _trials or _watchers):
        return default
    place = Place(op, kind, " ".join(map(_class, (like.dtype, *own))))
    for pick in reversed(_trials):
        tried = pick(place, default)
        if tried is not None:
            return tried
    found = known.get(str(place))
    for asked in _watchers:
        asked[str(place)] = None if found is None else asdict(found)
    return found if found is not None and found.blocks.keys() == default.blocks.keys() else default
