"""The language-model head as others have it: all logits by the fastest product at hand, then the largest and the sum.

Knows oneDNN's products and PyTorch's reductions; does not know our implementations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Bound
from miss.benchmarks.peers import onednn
from miss.kernels.quant_linear import PackedWeight


def largest(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor) -> Bound:
    """The largest logit and its place: greedy decoding wants no more."""
    logits = _logits(hidden, weight, bias)
    return lambda: logits().max(-1, keepdim=True)


def largest_and_sum(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor) -> Bound:
    """The log-sum-exp too, as an answer's score wants it."""
    logits = _logits(hidden, weight, bias)

    def run() -> tuple[Any, ...]:
        z = logits().float()
        values, indices = z.max(-1, keepdim=True)
        return values, indices, torch.logsumexp(z, -1)

    return run


def _logits(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor) -> Callable[[], Tensor]:
    if isinstance(weight, PackedWeight):
        return onednn.quant_linear(hidden, weight, bias)
    return onednn.linear(hidden, weight, bias)
