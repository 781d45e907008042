"""What a benchmark is made of: a case, its peers, and the row that comes of each implementation.

Knows their fields; does not know how anything is measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Cache = Literal["warm", "cold"]
Bound = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """A way to compute a case that is not in the operation's table, at its best settings.

    `bind` takes one set of inputs and returns the call: what a user does once (packing a weight) it does before.
    """

    name: str
    bind: Callable[..., Bound]
    missing: str | None = None  # why it cannot run here
    tolerance: float | None = None  # where its arithmetic is another
    results: int | None = None  # how many of the results it gives, where not all
    skips: int = 0  # how many of the first results it does not give


@dataclass(frozen=True)
class Case:
    """One shape of one operation.

    `make(generator)` gives one set of inputs, `call` takes it; `bind`, where there is something to prepare once (panels
    of a weight), takes it and returns the call. `flops` and bytes are those of the formula: each input read once, each
    output written once, nothing between. `truth` is `call` by the table's reference in float64 where None.
    """

    op: str  # the table's name
    shape: str
    dtype: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    call: Callable[..., Any]
    flops: float
    reads: float
    writes: float
    peers: Sequence[Peer] = ()
    caches: Sequence[Cache] = ("warm",)
    kind: str | None = None  # the compute ceiling: fp32, bf16, fp16, int8; by the first tensor's dtype where None
    truth: Callable[..., Any] | None = None
    tolerance: float | None = None
    bind: Callable[..., Bound] | None = None

    @property
    def label(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"


@dataclass
class Row:
    """What was measured of one implementation. Rates are in 1e9 a second, `share_of_ceiling` is of the nearer roof."""

    op: str
    implementation: str
    shape: str
    dtype: str
    cache: Cache
    median_ms: float
    spread: float  # (80th - 20th percentile) / median
    gflops: float
    gbps: float
    share_of_ceiling: float
    ceiling: str
    error: float  # largest, relative to the truth's largest value
    ratio_to_peer: float | None  # the fastest peer's time / this time: above 1 is faster than it
    error_absolute: float
    peer: str | None
    ratios: dict[str, float]  # the same to each peer
    ours: bool
    chosen: bool  # what runs by itself
    repeats: int
    calls: int  # of a sample
    flops: float
    bytes: float
    ceiling_gflops: float  # measured in the same rounds
    ceiling_gbps: float
    other_load: float  # what other processes took of all cores' time meanwhile


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)  # wrong answers, not timed
    skipped: list[dict[str, Any]] = field(default_factory=list)  # cannot run here, and why
    cases: list[dict[str, Any]] = field(default_factory=list)  # how far each came: going_on.py
    lost: bool = False  # the device went with the last case: nothing more can be measured in this process


@dataclass(frozen=True)
class Settings:
    device: torch.device
    repeats: int = 20
    deadline: float = math.inf  # of time.time(), after which no case begins
    # Seconds beyond which it hangs, and the process is ended: of one implementation until it has been checked, which
    # compiles it, and of the rounds of all.
    stall: float = math.inf
    heard: Callable[[], None] = lambda: None  # something was done: what hangs is counted from here
