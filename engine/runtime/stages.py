"""Named stages of answering, for whoever wants to know where the time goes: a profiler, and on CUDA an NVTX range.

Knows names and who listens; does not know what is done in a stage, or how long it takes.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch


class Observer(Protocol):
    """Who is told of stages as they begin and end: a profiler."""

    def begin(self, stage: str) -> None: ...

    def end(self, stage: str) -> None: ...


_observers: list[Observer] = []


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tells `observer` of every stage inside this block, in the thread that runs it."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextlib.contextmanager
def stage(name: str, device: torch.device) -> Iterator[None]:
    """The block is the stage `name`."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.nvtx.range_push(name)
    observers = tuple(_observers)
    for observer in observers:
        observer.begin(name)
    try:
        yield
    finally:
        if on_cuda:
            torch.cuda.nvtx.range_pop()
        for observer in observers:
            observer.end(name)
