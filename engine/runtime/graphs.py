"""Functions of fixed tensors, each captured once as a CUDA graph and then replayed as one launch.

Knows keys, capture and a budget in bytes; does not know what is computed. Off CUDA it calls the function: what is
captured on a GPU is what runs, and is tested, everywhere.

Source: torch.cuda.graph; a step of base is about 200 launches, whose gaps a graph removes.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[[], None]
_WARM = 2  # runs before a capture: what is compiled, tuned or allocated at first use must not be part of it


@dataclass
class _Program:
    run: Function  # once, in place
    owner: Any  # what holds the fixed tensors
    bytes: int


class Graphs:
    """`program(key, make)` is what `make` built for a key, captured where the device has graphs.

    `bytes`: what captured graphs hold, their tensors' memory included. Beyond `budget` the least recently used ones are
    dropped; one that does not fit alone runs uncaptured, which the log says once.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device, self.budget = device, budget
        self.bytes = self.num_captured = self.num_dropped = 0
        self._programs: OrderedDict[Hashable, _Program] = OrderedDict()
        self._refused: set[Hashable] = set()

    def program(self, key: Hashable, make: Callable[[], tuple[Any, Function]]) -> tuple[Any, Function]:
        """(owner, function) of `make()`, made once a key; the function is the captured one, where there is one."""
        found = self._programs.get(key)
        if found is None:
            found = self._build(key, make)
            self._programs[key] = found
            self.bytes += found.bytes
            self._shrink()
        self._programs.move_to_end(key)
        return found.owner, found.run

    def clear(self) -> None:
        """Forgets every program: whoever moves or changes a tensor that they read calls this."""
        self._programs.clear()
        self.bytes = 0

    def _build(self, key: Hashable, make: Callable[[], tuple[Any, Function]]) -> _Program:
        if self.device.type != "cuda" or self.budget == 0 or key in self._refused:
            owner, function = make()
            return _Program(function, owner, 0)
        before = torch.cuda.memory_reserved(self.device)
        owner, function = make()
        replay = self._capture(function)
        size = max(0, torch.cuda.memory_reserved(self.device) - before)
        if size > self.budget:
            logging.getLogger(__name__).warning(
                "a graph of %d bytes exceeds the budget of %d: it runs uncaptured", size, self.budget
            )
            self._refused.add(key)
            return _Program(function, owner, 0)
        self.num_captured += 1
        return _Program(replay, owner, size)

    def _capture(self, function: Function) -> Function:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other threads may go on
            function()
        return graph.replay

    def _shrink(self) -> None:
        while self.bytes > self.budget and len(self._programs) > 1:
            _, dropped = self._programs.popitem(last=False)
            self.bytes -= dropped.bytes
            self.num_dropped += 1
