"""Running out of memory in a batch costs only the request that needs too much.

Knows what running out of memory looks like, and how to halve; does not know what is run.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from miss.engine.runtime.request import OutOfMemory, Request

Result = TypeVar("Result")
# What PyTorch's CPU allocator and oneDNN say in a plain RuntimeError.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def survive(
    requests: Sequence[Request], run: Callable[[Sequence[Request]], list[Result]]
) -> list[tuple[Request, Result]]:
    """`run` on all, which gives a result a request; where memory runs out on each half, down to the one request that
    does not fit alone: it fails, and the others have their results. `run` may be repeated on the same requests."""
    if not requests:
        return []
    try:
        return list(zip(requests, run(requests), strict=True))
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
    if len(requests) == 1:
        requests[0].fail(
            OutOfMemory("there was not enough memory for this request alone; ask for less, or a shorter one")
        )
        return []
    half = len(requests) // 2
    return survive(requests[:half], run) + survive(requests[half:], run)
